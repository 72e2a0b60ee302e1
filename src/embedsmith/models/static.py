"""A table of vectors in the place of a transformer: sentence-transformers' `StaticEmbedding` and model2vec's models (a
text is the mean of its tokens' vectors), and `SparseStaticEmbedding` (a weight a token, as the queries of
inference-free SPLADE).

The table is a backbone like any other: token ids in, states out. Pooling, heads, training, encoding and saving are
those of all models. No special tokens stand around a text, and the text of no token has a vector of zeros.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from embedsmith.core.errors import ModelError

WEIGHTS = "model.safetensors"
_DENSE, _MODEL2VEC, _SPARSE = "embedding.weight", "embeddings", "weight"


class StaticConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "embedsmith_static"

    def __init__(self, vocab_size: int = 1, hidden_size: int = 1, **more: Any) -> None:
        super().__init__(**more)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, 0


class StaticTable(PreTrainedModel):  # type: ignore[misc]
    """State t is row id_t of the table; the id behind the last row, which stands for no token, has zeros."""

    config_class = StaticConfig
    base_model_prefix = "static"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)  # sentence-transformers' name
        self.post_init()

    @property
    def nothing(self) -> int:
        """The id of no token."""
        return self.embedding.num_embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        absent_NT = input_ids >= self.nothing
        state_NTH = self.embedding(input_ids.masked_fill(absent_NT, 0)).masked_fill(absent_NT[..., None], 0.0)
        return BaseModelOutput(
            last_hidden_state=state_NTH, hidden_states=(state_NTH,) if output_hidden_states else None
        )

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """The table alone: what else transformers would write means nothing to those who read such folders."""
        save_file({_DENSE: self.embedding.weight.detach().cpu().contiguous()}, Path(save_directory) / WEIGHTS)


def is_static(folder: Path) -> bool:
    """Whether the weights in a folder are a table alone."""
    path = folder / WEIGHTS
    if not path.is_file() or not (folder / "tokenizer.json").exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError):
        return False
    return _DENSE in names or _MODEL2VEC in names or names == {_SPARSE}


def load_static(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StaticTable:
    """The table in a folder; of a model2vec model with its rows shared by tokens and its weights of tokens put in.

    Errors: `ModelError` for a damaged file.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        if _DENSE in found:
            row_VD = found[_DENSE]
        elif _MODEL2VEC in found:
            row_VD = found[_MODEL2VEC].float()
            if "mapping" in found:
                row_VD = row_VD[found["mapping"].long()]
            if "weights" in found:
                row_VD = row_VD * found["weights"].float()[:, None]
        else:
            row_VD = found[_SPARSE][:, None]
    except (OSError, SafetensorError, LookupError, RuntimeError) as error:
        raise ModelError(
            f"cannot read the table of vectors: {error}", where=path, fix="copy the folder again, as a whole"
        ) from error
    with torch.device(device):
        table = StaticTable(StaticConfig(*row_VD.shape))
    if device == "cpu":
        table.embedding.weight = nn.Parameter(row_VD.to(dtype).contiguous())
    table.config.dtype = dtype
    return table
