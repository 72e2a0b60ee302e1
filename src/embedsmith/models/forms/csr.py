"""CSR as sentence-transformers' SparseEncoder has it: a dense model whose vector becomes a few of many directions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from embedsmith.core.settings import Count, Width
from embedsmith.core.shelf import forms
from embedsmith.models.folder import FolderFacts, FolderFiles, read_folder_file, read_pooling, write_json
from embedsmith.models.heads.base import cpu_state
from embedsmith.models.heads.csr import CsrHead, CsrSpec
from embedsmith.models.layers import LAYERS
from embedsmith.models.layout import ST, modules_in, name_model, write_modules
from embedsmith.models.write import Saved


@dataclass(frozen=True)
class _AutoEncoderFile:
    """The config.json of a SparseAutoEncoder."""

    input_dim: Width
    hidden_dim: Width = 512
    k: Count = 8
    normalize: bool = False


@forms.register("csr")
class Csr:
    """SparseEncoder: Transformer, Pooling, any number of layers, SparseAutoEncoder."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        kinds = files.kinds
        inside = all(kind in LAYERS for kind in kinds[2:-1])
        if kinds[:2] != ("Transformer", "Pooling") or kinds[-1] != "SparseAutoEncoder" or not inside:
            return None
        folder = files.modules[-1].path
        said = read_folder_file(_AutoEncoderFile, folder / "config.json")
        k = files.general.max_active_dims or said.k
        spec = CsrSpec(said.input_dim, said.hidden_dim, k, said.normalize, folder / "model.safetensors")
        pooling, include_prompt = read_pooling(files.modules[1].path / "config.json", files.more.pooling)
        layers = tuple(LAYERS[module.kind](module.path) for module in files.modules[2:-1])
        return FolderFacts(
            **files.shared_of_sparse(files.modules[0].path),
            pooling=pooling,
            include_prompt=include_prompt,
            projections=layers,
            normalize=False,
            form="csr",
            heads={"sparse": spec},
        )

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        head = saved.heads["sparse"]
        assert isinstance(head, CsrHead)
        (root / head.file).unlink()
        types = {entry["path"]: entry["type"] for entry in modules_in(root)}
        place = f"{len(types)}_SparseAutoEncoder"
        (root / place).mkdir()
        tensors = cpu_state(head)
        tensors["decoder.linear.weight"] = tensors.pop("encoder.weight")  # the decoder is the encoder turned round
        tensors["stats_last_nonzero"] = torch.zeros(head.spec.width, dtype=torch.int64)
        save_file(tensors, root / place / "model.safetensors")
        spec = head.spec
        said = {"input_dim": spec.width_in, "hidden_dim": spec.width, "k": spec.k, "normalize": spec.normalize}
        write_json(root / place / "config.json", {**said, "k_aux": min(512, spec.width), "dead_threshold": 30})
        write_modules(root, {**types, place: ST + "sparse_encoder.models.SparseAutoEncoder"})
        name_model(root, "SparseEncoder", "dot", max_active_dims=spec.k)
