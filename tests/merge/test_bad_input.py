"""Whatever cannot be merged is refused before anything is written, in words that say what to do."""

import json
import os
import shutil

import pytest
import torch

import embedsmith
from embedsmith.core.errors import CheckpointError, ModelError, RecipeError
from embedsmith.merge.folders import INDEX
from tests.merge.models import child, rewrite, tiny_base, weights


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    base = tiny_base(root / "base")
    return base, [child(base, root / f"parent{place}", place) for place in range(2)]


@pytest.fixture
def models(originals, tmp_path):
    """Copies that a test may spoil."""
    base, parents = originals
    return shutil.copytree(base, tmp_path / "base"), [shutil.copytree(p, tmp_path / p.name) for p in parents]


def merge(models, tmp_path, **settings):
    base, parents = models
    recipe = {"parents": [str(p) for p in parents], "base": str(base), "method": "slerp", "cache": None, **settings}
    return embedsmith.merge(**recipe, output=str(tmp_path / "out"))


def refused(models, tmp_path, match, kind=CheckpointError, **settings):
    with pytest.raises(kind, match=match) as caught:
        merge(models, tmp_path, **settings)
    assert not (tmp_path / "out").exists()
    return caught.value


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_different_architectures(models, tmp_path):
    edit(models[1][1] / "config.json", hidden_act="relu")
    error = refused(models, tmp_path, "hidden_act of config.json differ: 'gelu' in parent0, 'relu' in parent1")
    assert "one architecture" in error.fix


def test_different_sizes(models, tmp_path):
    edit(models[1][1] / "config.json", hidden_size=32)
    refused(models, tmp_path, "hidden_size of config.json differ: 16 in parent0, 32 in parent1")


def test_different_families(models, tmp_path):
    edit(models[1][1] / "config.json", model_type="roberta")
    refused(models, tmp_path, "differ")


def test_training_only_settings_are_a_note(models, tmp_path):
    edit(models[1][1] / "config.json", hidden_dropout_prob=0.3)
    assert any("hidden_dropout_prob" in note for note in merge(models, tmp_path).report["notes"])


def test_different_attention_modes(models, tmp_path):
    for path in (models[0], *models[1]):
        edit(path / "config.json", is_decoder=False)
    edit(models[1][1] / "config.json", is_decoder=True)
    error = refused(models, tmp_path, "is_decoder of config.json differ")
    assert "attention modes" in error.fix


def test_different_poolings(models, tmp_path):
    edit(models[1][1] / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    refused(models, tmp_path, "pooling differ: 'mean' in parent0, 'cls' in parent1")


def test_poolings_written_by_other_versions_are_compared_by_meaning(models, tmp_path):
    """A config without the newer keys means the same pooling."""
    path = models[1][1] / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}))
    merge(models, tmp_path)


def test_the_empty_folder_of_normalize_may_be_lost(models, tmp_path):
    """git and wheels drop it; the result has it again."""
    for path in (models[0], *models[1]):
        (path / "2_Normalize").rmdir()
    assert (merge(models, tmp_path).path / "2_Normalize").is_dir()


def test_one_normalises(models, tmp_path):
    path = models[1][1] / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    refused(models, tmp_path, "normalize differ")


def test_different_prompts(models, tmp_path):
    for place, path in enumerate(models[1]):
        edit(path / "config_sentence_transformers.json", prompts={"query": f"q{place}: "})
    error = refused(models, tmp_path, "prompts of parent0 and parent1 differ", RecipeError)
    assert "packaging.prompts=parent1" in error.fix
    result = merge(models, tmp_path, packaging={"prompts": "parent1"})
    assert embedsmith.load(str(result.path)).settings.prompts == {"query": "q1: "}
    written = embedsmith.merge(
        parents=[str(p) for p in models[1]],
        base=str(models[0]),
        method="slerp",
        output=str(tmp_path / "mine"),
        cache=None,
        packaging={"prompts": {"document": "d: "}},
    )
    assert embedsmith.load(str(written.path)).settings.prompts == {"document": "d: "}


def test_lengths_take_the_smallest(models, tmp_path):
    for place, path in enumerate(models[1]):
        edit(path / "sentence_bert_config.json", max_seq_length=16 + place)
    result = merge(models, tmp_path)
    assert embedsmith.load(str(result.path)).max_length == 16
    assert any("max_length" in note for note in result.report["notes"])


def reorder_vocabulary(folder, seed=0):
    """Give every word another id, and move the rows of the table with it: the same model."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    fixed = 5  # special tokens keep their places: other files name them by id
    order = torch.cat([torch.arange(fixed), fixed + torch.randperm(len(vocabulary) - fixed)])
    tokenizer["model"]["vocab"] = {token: int(order[place]) for token, place in vocabulary.items()}
    path.write_text(json.dumps(tokenizer))
    table = weights(folder)["embeddings.word_embeddings.weight"]
    moved = torch.empty_like(table)
    moved[order] = table
    rewrite(folder, {"embeddings.word_embeddings.weight": moved})


def test_different_vocabularies_are_refused_or_aligned(models, originals, tmp_path):
    plain = embedsmith.merge(
        parents=[str(p) for p in originals[1]],
        base=str(originals[0]),
        method="slerp",
        output=str(tmp_path / "plain"),
        cache=None,
    )
    reorder_vocabulary(models[1][1])
    error = refused(models, tmp_path, "vocabularies of base and parent1 differ: 0 tokens only in the first, 0 only")
    assert "vocabulary=align" in error.fix
    aligned = merge(models, tmp_path, packaging={"vocabulary": "align"})
    for name, tensor in weights(plain.path).items():
        torch.testing.assert_close(weights(aligned.path)[name], tensor, rtol=0, atol=1e-7)


def grow_vocabulary(folder, token, row):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    place = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"][token] = place
    path.write_text(json.dumps(tokenizer))
    table = weights(folder)["embeddings.word_embeddings.weight"]
    rewrite(folder, {"embeddings.word_embeddings.weight": torch.cat([table[:place], row[None]])})
    edit(folder / "config.json", vocab_size=place + 1)


def test_a_token_that_one_parent_has_keeps_its_row(models, tmp_path):
    """Neither diluted by the parents that never saw it, nor by a base that has no such row."""
    row = torch.linspace(-1, 1, 16)
    grow_vocabulary(models[1][1], "newword", row)
    result = merge(models, tmp_path, packaging={"vocabulary": "align", "like": "parent1"}, method="average")
    table = weights(result.path)["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(table[-1], row)
    assert embedsmith.load(str(result.path)).encode("newword").shape == (16,)


def test_a_parent_without_a_token_has_the_bases_row(models, tmp_path):
    """So that the parent adds nothing to it, where the base knows the token."""
    row = torch.linspace(-0.05, 0.05, 16)
    grow_vocabulary(models[0], "newword", row)
    grow_vocabulary(models[1][1], "newword", 2 * row)
    result = merge(models, tmp_path, packaging={"vocabulary": "align", "like": "parent1"}, method="average")
    torch.testing.assert_close(weights(result.path)["embeddings.word_embeddings.weight"][-1], 1.5 * row)


def test_tokenizers_that_cut_differently(models, tmp_path):
    path = models[1][1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    refused(models, tmp_path, "tokenizers of base and parent1 cut .* differently")


def test_not_a_descendant(models, tmp_path):
    stranger = tiny_base(tmp_path / "stranger-home")
    rewrite(stranger, {name: torch.randn_like(tensor) for name, tensor in weights(stranger).items()})
    error = refused((models[0], [models[1][0], stranger]), tmp_path, "stranger-home is no descendant of base")
    assert "unrelated=true" in error.fix
    merge((models[0], [models[1][0], stranger]), tmp_path, unrelated=True)


def test_a_missing_shard(models, tmp_path):
    index = {"metadata": {}, "weight_map": {name: "model-00002-of-00002.safetensors" for name in weights(models[1][1])}}
    (models[1][1] / INDEX).write_text(json.dumps(index))
    (models[1][1] / "model.safetensors").unlink()
    refused(models, tmp_path, r"1 of 1 weight files are missing: model-00002", (CheckpointError, ModelError))


def test_no_weights(models, tmp_path):
    (models[1][0] / "model.safetensors").unlink()
    refused(models, tmp_path, "no weights in this folder")


@pytest.mark.parametrize("change", [lambda kept: kept[:-100], lambda kept: kept + bytes(512)], ids=["cut", "padded"])
def test_a_cut_off_or_padded_file(models, tmp_path, change):
    file = models[1][0] / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    refused(models, tmp_path, r"model\.safetensors: the file has .* bytes, its header speaks of")


def test_a_pipe_in_the_place_of_weights(models, tmp_path):
    file = models[1][0] / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    refused(models, tmp_path, r"model\.safetensors: this is a pipe", ModelError)


def test_a_file_that_is_no_safetensors(models, tmp_path):
    (models[1][0] / "model.safetensors").write_bytes(b"\xff" * 200)
    refused(models, tmp_path, "not a readable safetensors file")


def test_a_missing_tensor(models, tmp_path):
    rewrite(models[1][0], {"encoder.layer.0.output.dense.weight": None})
    refused(models, tmp_path, "1 weights of the architecture in config.json are missing: encoder.layer.0.output.dense")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["average", "slerp", "ties", "dare"])
def test_weights_that_are_not_finite(models, tmp_path, method, bad):
    table = weights(models[1][1])["encoder.layer.1.output.dense.weight"].clone()
    table[3, 4] = bad
    rewrite(models[1][1], {"encoder.layer.1.output.dense.weight": table})
    error = refused(
        models, tmp_path, r"parent1: the weight backbone.encoder.layer.1.output.dense.weight holds NaN", method=method
    )
    assert f"element {3 * 24 + 4}" in str(error)


def test_a_parent_that_is_the_base(models, tmp_path):
    """A zero task vector: SLERP has no angle and interpolates linearly."""
    result = merge((models[0], [models[1][0], models[0]]), tmp_path)
    assert result.report["coefficients"]["model"] == [0.5, 0.5]


def test_opposite_parents(models, tmp_path):
    base, (one, two) = models
    mirrored = {name: 2 * tensor - weights(one)[name] for name, tensor in weights(base).items()}
    rewrite(two, mirrored)
    refused(models, tmp_path, "model: two task vectors point in opposite directions", RecipeError)
    merge(models, tmp_path, method={"type": "slerp", "on_antipodal": "linear"})


@pytest.mark.parametrize("method", ["karcher", "normalised_mean"])
def test_opposite_parents_have_no_mean_direction(models, tmp_path, method):
    """What rounding leaves of two opposite vectors is not stretched to their length; the restored mean stays short."""
    base, (one, two) = models
    start, moved = weights(base), weights(one)
    rewrite(two, {name: 2 * start[name] - moved[name] for name in moved})
    refused(models, tmp_path, "cancel out", RecipeError, method=method)
    plain = merge(models, tmp_path, method={"type": "average", "restore_norm": True})
    for name, tensor in weights(plain.path).items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-4, atol=1e-5)


def test_no_base(models, tmp_path):
    error = refused(models, tmp_path, "slerp works on task vectors", RecipeError, base=None)
    assert "method: average" in error.fix


def test_one_parent_twice(models, tmp_path):
    parents = [{"path": str(models[1][0]), "id": "x"}, {"path": str(models[1][1]), "id": "x"}]
    refused(models, tmp_path, "two parents are called 'x'", RecipeError, parents=parents)


def test_a_quantised_parent(models, tmp_path):
    edit(models[1][0] / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(models, tmp_path, r"the weights are quantised \(bitsandbytes\)", ModelError)


def test_no_such_folder(models, tmp_path):
    refused((models[0], [tmp_path / "nothing"]), tmp_path, "no such model folder|could not be fetched", ModelError)


def test_a_head_that_one_parent_lacks(models, tmp_path):
    base, (one, two) = models
    rich = child(two, tmp_path / "rich", 7, heads=("dense", "sparse"))
    error = refused((base, [one, rich]), tmp_path, r"token_heads.sparse.linear.* is in rich and not in parent0")
    assert "packaging.heads" in error.fix
    dropped = merge((base, [one, rich]), tmp_path, packaging={"heads": "drop"})
    assert embedsmith.load(str(dropped.path)).outputs == ("dense", "middle")
    copied = embedsmith.merge(
        parents=[str(one), str(rich)],
        base=str(base),
        method="slerp",
        output=str(tmp_path / "copied"),
        cache=None,
        packaging={"heads": "copy"},
    )
    head = torch.load(copied.path / "sparse_linear.pt", weights_only=True)
    wanted = torch.load(rich / "sparse_linear.pt", weights_only=True)
    assert torch.equal(head["weight"], wanted["weight"])


def test_a_base_without_the_parents_heads(tmp_path):
    """Heads that were new in training have no ancestor: they are averaged, and a note says so."""
    base = tiny_base(tmp_path / "base")
    torch.manual_seed(0)
    root = child(base, tmp_path / "root", 1, heads=("dense", "sparse", "multivector"))
    parents = [child(root, tmp_path / f"p{i}", i) for i in range(2)]
    result = merge((base, parents), tmp_path)
    assert embedsmith.load(str(result.path)).outputs == ("dense", "middle", "sparse", "multivector")
    found, one, two = (
        torch.load(p / "colbert_linear.pt", weights_only=True)["weight"] for p in (result.path, *parents)
    )
    torch.testing.assert_close(found, (one + two) / 2)
    assert any("without an ancestor" in note for note in result.report["notes"])


def test_projections_of_other_widths(models, tmp_path):
    other = child(models[1][1], tmp_path / "narrow", 5, dimension=8)
    refused((models[0], [models[1][0], other]), tmp_path, "Dense layers .* differ")


def test_position_tables_are_cut_to_the_shortest(models, tmp_path):
    short = models[1][1]
    rewrite(
        short, {"embeddings.position_embeddings.weight": weights(short)["embeddings.position_embeddings.weight"][:20]}
    )
    edit(short / "config.json", max_position_embeddings=20)
    edit(short / "sentence_bert_config.json", max_seq_length=20)
    result = merge(models, tmp_path)
    assert weights(result.path)["embeddings.position_embeddings.weight"].shape == (20, 16)
    assert embedsmith.load(str(result.path)).max_length == 20
