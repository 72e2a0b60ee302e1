"""LoRA adapters as parents: what peft's own merge gives, piece by piece."""

import json
import shutil

import pytest
import torch

import embedsmith
from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.merge.folders import open_folder
from embedsmith.merge.lora_parent import AdapterFolder
from tests.merge.models import child, rewrite, tiny_base, weights

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("lora") / "base")


def adapter(base, folder, seed=0, **settings):
    """A random adapter saved by peft, and the weights peft itself merges it to."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value", "dense"], **settings}
    model = peft.get_peft_model(AutoModel.from_pretrained(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.005 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    whole = model.merge_and_unload()
    return folder, {f"backbone.{name}": tensor.detach() for name, tensor in whole.state_dict().items()}


KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"query": 2}, "alpha_pattern": {"self.value": 3, "value": 5}},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["query", "word_embeddings"]},
    "bias": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["LayerNorm"]},
    "tokens": {"trainable_token_indices": {"word_embeddings": [3, 7]}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_an_adapter_is_what_peft_merges(base, tmp_path, settings):
    folder, wanted = adapter(base, tmp_path / "adapter", **settings)
    parent = AdapterFolder.read(folder).on(open_folder(base, "base"), "adapter")
    moved = 0
    for name, weights_of in parent.tensors.items():
        whole = parent.tensor(name)
        torch.testing.assert_close(whole, wanted[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(whole, open_folder(base, "b").tensor(name))
        third = whole.numel() // 3 + 1
        pieces = [weights_of.read(a, min(a + third, whole.numel())) for a in range(0, whole.numel(), third)]
        assert torch.equal(torch.cat(pieces), whole.flatten()), "pieces do not depend on where they are cut"
    assert moved > 1


def test_adapters_merge_exactly(base, tmp_path):
    """The mean of two adapters is the mean of B A, not mean(B) mean(A)."""
    found = [adapter(base, tmp_path / f"a{seed}", seed) for seed in range(2)]
    result = embedsmith.merge(
        parents=[str(folder) for folder, _ in found],
        base=str(base),
        method="average",
        output=str(tmp_path / "out"),
        cache=None,
    )
    merged = weights(result.path)
    for name, tensor in merged.items():
        wanted = sum(state[f"backbone.{name}"] for _, state in found) / 2
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    assert embedsmith.load(str(result.path)).encode("a cat").shape == (16,)


def test_the_gram_matrix_of_adapters_from_their_factors(base, tmp_path):
    """K_ij = tr((A_i A_j^T)(B_j^T B_i)) s_i s_j equals what the streamed pass measures."""
    from safetensors.torch import load_file

    from embedsmith.core.recipe import parse
    from embedsmith.merge import MergeRecipe
    from embedsmith.merge.merge_plan import make_plan

    folders = [adapter(base, tmp_path / f"a{seed}", seed)[0] for seed in range(2)]
    tree = {"parents": [str(f) for f in folders], "base": str(base), "method": "slerp", "output": "x", "cache": None}
    job = make_plan(parse(MergeRecipe, tree)).job(("backbone.encoder.layer.0.attention.self.query.weight",))
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    key = "base_model.model.encoder.layer.0.attention.self.query.lora_{}.weight"
    factors = [(state[key.format("A")].double(), state[key.format("B")].double()) for state in states]
    for i, (a_i, b_i) in enumerate(factors):
        for j, (a_j, b_j) in enumerate(factors):
            wanted = 16.0 * torch.trace((a_i @ a_j.T) @ (b_j.T @ b_i))
            torch.testing.assert_close(job.gram.of(job.names)[i, j], wanted, rtol=1e-4, atol=1e-8)


def test_base_and_adapter_in_one_parent(base, tmp_path):
    folder, wanted = adapter(base, tmp_path / "adapter")
    result = embedsmith.merge(
        parents=[{"path": str(base), "adapter": str(folder)}],
        method="average",
        output=str(tmp_path / "out"),
        cache=None,
    )
    for name, tensor in weights(result.path).items():
        torch.testing.assert_close(tensor, wanted[f"backbone.{name}"], rtol=1e-5, atol=1e-6)


def test_an_adapter_saved_by_training(base, tmp_path):
    """embedsmith keeps adapters apart in checkpoints: the folder is a parent as it stands."""
    model = embedsmith.load(str(base), lora={"r": 2})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * parameter.requires_grad * torch.randn_like(parameter)
    model.save(tmp_path / "apart", merge=False)
    model.save(tmp_path / "whole")
    result = embedsmith.merge(
        parents=[str(tmp_path / "apart")], base=str(base), method="average", output=str(tmp_path / "out"), cache=None
    )
    one, two = (embedsmith.load(str(path)).encode(["the cat"]) for path in (result.path, tmp_path / "whole"))
    assert abs(one - two).max() < 1e-5


def test_heads_and_tokenizer_of_an_adapters_folder_are_merged_and_kept(tmp_path):
    """What was trained beside an adapter lies in its folder: as merging the same models as a whole."""
    base = tiny_base(tmp_path / "base")
    heads = {"heads": ("dense", "sparse", "multivector"), "dimension": 12}
    for place in range(2):
        torch.manual_seed(place)
        model = embedsmith.load(str(base), new_heads=True, lora={"r": 2}, **heads)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.001 * parameter.requires_grad * torch.randn_like(parameter)
        model.tokenizer.model_max_length = 17
        model.save(tmp_path / f"apart{place}", merge=False)
        model.save(tmp_path / f"whole{place}")
    found = []
    for kind in ("apart", "whole"):
        made = embedsmith.merge(
            parents=[str(tmp_path / f"{kind}{place}") for place in range(2)], base=str(base), method="average",
            output=str(tmp_path / f"{kind}-merged"), cache=None,
        )  # fmt: skip
        assert {"2_Dense", "sparse_linear.pt", "colbert_linear.pt"} <= {path.name for path in made.path.iterdir()}
        found.append(
            embedsmith.load(str(made.path)).represent(["the cat sat"], role="document", outputs=heads["heads"])
        )
    apart, whole = found
    torch.testing.assert_close(apart["dense"].vector_ND, whole["dense"].vector_ND, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart["sparse"].weight_NT, whole["sparse"].weight_NT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart["multivector"].vector_NTD, whole["multivector"].vector_NTD, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_quantised_base(base, tmp_path):
    quantised = shutil.copytree(base, tmp_path / "quantised")
    folder, _ = adapter(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(quantised)}))
    model = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**model, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        embedsmith.merge(parents=[str(folder)], base=str(base), method="average", output=str(tmp_path / "out"))


def test_an_adapter_of_another_model(base, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = adapter(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name.replace("layer.0", "layer.9"): t for name, t in state.items()}, file)
    with pytest.raises(ModelError, match="which the base does not have"):
        AdapterFolder.read(folder).on(open_folder(base, "base"), "x")
    save_file({name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in state.items()}, file)
    with pytest.raises(ModelError, match=r"is for a weight \(16, 15\), the base has \(16, 16\)"):
        AdapterFolder.read(folder).on(open_folder(base, "base"), "x")


def test_a_damaged_adapter_weight_is_found(base, tmp_path):
    spoiled = shutil.copytree(base, tmp_path / "spoiled")
    rewrite(spoiled, {"encoder.layer.0.attention.self.query.weight": torch.full((16, 16), float("nan"))})
    from embedsmith.core.errors import CheckpointError

    with pytest.raises(CheckpointError, match="NaN"):
        embedsmith.merge(parents=[str(spoiled)], method="average", output=str(tmp_path / "out"), unrelated=True)


def lora_merge(folders, base, out, **settings):
    return embedsmith.merge(
        parents=[{"path": str(f), "weight": w} for f, w in zip(folders, (1.0, 3.0), strict=True)],
        base=str(base),
        output=str(out),
        cache=None,
        unrelated=True,
        **{"method": "slerp", **settings},
    )


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["query", "word_embeddings"]}, {"use_rslora": True}])
def test_adapters_are_merged_in_their_factors(base, tmp_path, settings):
    """The adapter that is written holds what the merge of the whole models is, at the sum of the ranks."""
    folders = [adapter(base, tmp_path / f"a{seed}", seed, **settings)[0] for seed in range(2)]
    whole = lora_merge(folders, base, tmp_path / "whole")
    small = lora_merge(folders, base, tmp_path / "small", adapter={})
    assert max(small.report["adapter"]["rank"].values()) <= 8
    assert min(small.report["adapter"]["energy"].values()) == pytest.approx(1.0)
    assert small.report["adapter"]["left_out"] == 0
    assert not (small.path / "model.safetensors").exists()
    again = AdapterFolder.read(small.path).on(open_folder(base, "base"), "small")
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(again.tensor(f"backbone.{name}"), tensor, rtol=1e-5, atol=1e-6)
    one, two = (embedsmith.load(str(path)).encode(["the cat", "a dog"]) for path in (whole.path, small.path))
    assert abs(one - two).max() < 1e-5


def test_peft_loads_the_merged_adapter(base, tmp_path):
    from transformers import AutoModel

    folders = [adapter(base, tmp_path / f"a{seed}", seed)[0] for seed in range(2)]
    whole = lora_merge(folders, base, tmp_path / "whole")
    small = lora_merge(folders, base, tmp_path / "small", adapter={})
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), small.path).merge_and_unload()
    state = model.state_dict()
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_rank_keeps_the_largest_directions(base, tmp_path):
    """Cut to a rank, the factors are the best of that rank, by sums of adapters and by dense vectors alike."""
    folders = [adapter(base, tmp_path / f"a{seed}", seed)[0] for seed in range(2)]
    whole = weights(lora_merge(folders, base, tmp_path / "whole").path)
    small = lora_merge(folders, base, tmp_path / "small", adapter={"rank": 2})
    key = "encoder.layer.0.attention.self.query.weight"
    delta = whole[key].double() - weights(base)[key].double()
    _, size, _ = torch.linalg.svd(delta)
    kept = float(size[:2].square().sum() / size.square().sum())
    assert small.report["adapter"]["energy"][f"backbone.{key}"] == pytest.approx(kept, rel=1e-4)
    dense = lora_merge(folders, base, tmp_path / "dense", adapter={"rank": 2}, method={"type": "ties", "density": 1.0})
    assert dense.report["adapter"]["rank"][f"backbone.{key}"] == 2
    with pytest.raises(RecipeError, match=r"adapter\.rank"):
        lora_merge(folders, base, tmp_path / "none", adapter={}, method={"type": "ties", "density": 1.0})


def test_whole_parents_become_an_adapter(base, tmp_path):
    """Extraction: biases and norms have no place in one, and the report says how much that is."""
    parents = [child(base, tmp_path / f"p{seed}", seed) for seed in range(2)]
    found = lora_merge(parents, base, tmp_path / "out", adapter={"rank": 16})
    whole = lora_merge(parents, base, tmp_path / "whole").path
    old = weights(base)
    moved = {name: (tensor.double() - old[name].double()).square().sum() for name, tensor in weights(whole).items()}
    vectors = sum(float(square) for name, square in moved.items() if weights(whole)[name].dim() == 1)
    assert found.report["adapter"]["left_out"] == pytest.approx(vectors / float(sum(moved.values())), rel=1e-3)
    assert min(found.report["adapter"]["energy"].values()) > 0.99
    with pytest.raises(RecipeError, match=r"adapter\.rank"):
        lora_merge(parents, base, tmp_path / "bad", adapter={"rank": 0})
