"""A merge from folders to a folder: what is written, and that nothing half-done is ever seen."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import embedsmith
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge import folders, method, run, tensor_blocks
from embedsmith.merge.folders import Architecture
from embedsmith.models import load
from embedsmith.models.backbone import skeleton
from tests.merge.models import child, family, rewrite, tiny_base, weights
from tests.models import lm

TEXTS = ["the cat sat on the mat", "a big red dog", "new tree"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three parents with every head, a prompt and a projection."""
    root = tmp_path_factory.mktemp("models")
    base, parents = family(
        root, 3, dimension=8, heads=("dense", "sparse", "multivector"), prompts={"query": "the "}, max_length=24
    )
    return base, parents


def merged(models, out, **settings):
    base, parents = models
    recipe = {"parents": [str(p) for p in parents], "base": str(base), "method": "slerp", "cache": None, **settings}
    return embedsmith.merge(**recipe, output=str(out))


def test_a_merge_is_a_whole_embedder(models, tmp_path):
    result = merged(models, tmp_path / "out")
    model = load(str(result.path))
    assert model.outputs == ("dense", "middle", "sparse", "multivector")
    assert model.dimension == 8
    assert dict(model.settings.prompts) == {"query": "the "}
    assert model.max_length == 24
    reps = model.represent(TEXTS, role="document", outputs=("dense", "sparse", "multivector"))
    assert set(reps) == {"dense", "sparse", "multivector"}
    assert "slerp" in (result.path / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_sentence_transformers_loads_the_same_vectors(models, tmp_path):
    from sentence_transformers import SentenceTransformer

    result = merged(models, tmp_path / "out", method="karcher")
    theirs = SentenceTransformer(str(result.path), device="cpu").encode_query(TEXTS)
    ours = load(str(result.path)).encode(TEXTS, role="query")
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_every_weight_is_the_formula(models, tmp_path):
    """Backbone, projection and token heads: theta_0 + sum c_i V_i with the coefficients that merge.json names."""
    result = merged(models, tmp_path / "out")
    coef = result.report["coefficients"]["model"]
    assert 0 < result.report["order_spread"]["model"] < 30
    base, *parents = (load(str(path)).state_dict() for path in (models[0], *models[1]))
    found = load(str(result.path)).state_dict()
    for name, tensor in found.items():
        wanted = base[name].double() + sum(
            c * (parent[name].double() - base[name].double()) for c, parent in zip(coef, parents, strict=True)
        )
        torch.testing.assert_close(tensor, wanted.float(), rtol=1e-6, atol=1e-8)
    vectors = [
        torch.cat([(p[n].double() - base[n].double()).flatten() for n in found if not n.endswith("marks_S")])
        for p in parents
    ]
    stacked = torch.stack(vectors)
    from embedsmith.merge.methods.formulas import sequential_slerp

    wanted = sequential_slerp(stacked @ stacked.T, torch.ones(3, dtype=torch.float64))
    assert coef == pytest.approx(wanted.tolist(), rel=1e-10)


def test_the_mean_of_identical_parents_is_the_parent_bit_for_bit(models, tmp_path):
    _, parents = models
    twins = [shutil.copytree(parents[0], tmp_path / f"twin{i}") for i in range(3)]
    result = embedsmith.merge(
        parents=[{"path": str(t), "weight": w} for t, w in zip(twins, (0.1, 0.2, 0.7), strict=True)],
        method="average",
        output=str(tmp_path / "out"),
        cache=None,
    )
    for name, tensor in weights(parents[0]).items():
        assert torch.equal(weights(result.path)[name], tensor), name


def test_streamed_equals_in_memory_for_every_block_size(models, tmp_path, monkeypatch):
    found = []
    for size in (8192, 1 << 20):
        monkeypatch.setattr(run, "BLOCK", size)
        found.append(weights(merged(models, tmp_path / f"out{size}", method={"type": "ties", "density": 0.5}).path))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_order_of_the_parents_does_not_matter_for_a_mean(models, tmp_path):
    base, parents = models
    one = merged(models, tmp_path / "one", method="karcher")
    two = merged((base, parents[::-1]), tmp_path / "two", method="karcher")
    assert all(torch.allclose(weights(one.path)[n], t, atol=1e-7) for n, t in weights(two.path).items())


def test_groups_and_overrides(models, tmp_path):
    overrides = [{"match": r"embeddings\.", "method": "average"}]
    result = merged(models, tmp_path / "out", granularity="block", overrides=overrides)
    found = result.report["coefficients"]
    assert {"backbone.encoder.layer.0", "backbone.encoder.layer.1", "projections.0", "token_heads.sparse"} < set(found)
    assert found["backbone.embeddings"] == pytest.approx([1 / 3] * 3)
    assert found["backbone.encoder.layer.0"] != pytest.approx(found["backbone.encoder.layer.1"], abs=1e-9)
    with pytest.raises(RecipeError, match="matches no tensor"):
        merged(models, tmp_path / "none", overrides=[{"match": "nothing", "method": "average"}])


def test_the_written_file_is_plain_safetensors(models, tmp_path):
    result = merged(models, tmp_path / "out")
    with safe_open(result.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(weights(models[1][0]))


def test_shards_have_at_most_so_many_bytes(models, tmp_path):
    whole = merged(models, tmp_path / "whole")
    parts = merged(models, tmp_path / "parts", shard_size="4KB")
    files = sorted(parts.path.glob("model-*.safetensors"))
    index = json.loads((parts.path / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    found = {}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(whole.path).items())
    assert np.allclose(load(str(parts.path)).encode(TEXTS), load(str(whole.path)).encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("size", ["5", "5000000", "5 parameters"])
def test_a_shard_size_needs_a_unit(models, tmp_path, size):
    with pytest.raises(RecipeError, match="unit of bytes"):
        merged(models, tmp_path / "out", shard_size=size)


def killed_after(blocks, models, out, **settings):
    """Merge in a child process that kills itself, hard, after so many blocks."""
    child_id = os.fork()
    if child_id == 0:
        count = 0
        whole = run.TensorFile.write

        def write(*arguments):
            nonlocal count
            whole(*arguments)
            count += 1
            if count == blocks:
                os.kill(os.getpid(), signal.SIGKILL)

        run.TensorFile.write = write
        merged(models, out, **settings)
        os._exit(0)
    _, status = os.waitpid(child_id, 0)
    assert os.WIFSIGNALED(status), "the merge ended before it could be killed"


@pytest.mark.parametrize("settings", [{"method": "slerp"}, {"method": "dare"}], ids=str)
def test_a_killed_merge_starts_anew(models, tmp_path, settings):
    """What an earlier run left, of this merge or another, is removed and has no say."""
    killed_after(18, models, tmp_path / "out", method="average")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))
    again = merged(models, tmp_path / "out", **settings)
    straight = merged(models, tmp_path / "straight", **settings)
    assert not list(tmp_path.glob(".out*"))
    for name, tensor in weights(straight.path).items():
        assert torch.equal(weights(again.path)[name], tensor), name
    for file in ("sparse_linear.pt", "colbert_linear.pt"):
        one, two = (torch.load(path / file, weights_only=True) for path in (again.path, straight.path))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_splade_head_is_merged_like_the_rest(tmp_path, kind):
    """Tied words with a transform, and an output layer of its own."""
    options = {"pooling": "last" if kind == "llama" else "cls", "heads": ("sparse",), "sparse": "splade"}
    load(str(lm.folder(tmp_path / "lm", kind)), sparse_terms=7, device="cpu", **options).save(tmp_path / "base")
    parents = [child(tmp_path / "base", tmp_path / f"parent{seed}", seed) for seed in range(2)]
    made = merged((tmp_path / "base", parents), tmp_path / "out", method="average")
    found, one, two = (load(str(path), device="cpu") for path in (made.path, *parents))
    assert found.outputs == ("dense", "middle", "sparse")
    assert found.token_heads["sparse"].terms == 7
    names = [name for name in found.state_dict() if name.startswith("token_heads.sparse.lm.")]
    assert names
    for name in names:
        mean = (one.state_dict()[name] + two.state_dict()[name]) / 2
        torch.testing.assert_close(found.state_dict()[name], mean, msg=lambda text, name=name: f"{name}: {text}")
    assert found.represent(TEXTS, role="query", outputs=("sparse",))["sparse"].weight_NT.any()


def test_a_full_disk_is_said_before_anything_is_written(models, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs .* GB and the disk has 0\.00 GB"):
        merged(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_meanwhile(models, tmp_path, monkeypatch):
    count = 0
    whole = os.pwrite

    def pwrite(*arguments):
        nonlocal count
        count += 1
        if count > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(CheckpointError, match="no space left"):
            merged(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merged(models, tmp_path / "out").path.exists()


def test_a_finished_merge_is_not_replaced_unasked(models, tmp_path):
    before = merged(models, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = merged(models, tmp_path / "out")
    assert again == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == written
    with pytest.raises(CheckpointError, match="another recipe"):
        merged(models, tmp_path / "out", method="dare")
    _, parents = models
    embedsmith.merge(parents=[str(parents[0])], method="average", output=str(tmp_path / "out"), overwrite=True)
    assert torch.equal(next(iter(weights(tmp_path / "out").values())), next(iter(weights(parents[0]).values())))


def test_a_merge_of_weights_that_changed_is_no_finished_merge(models, tmp_path):
    parents = models[1]
    base, copy = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (models[0], parents[0]))
    merged((base, [copy]), tmp_path / "out", method="average")
    shutil.copyfile(parents[1] / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)other weights.*--overwrite"):
        merged((base, [copy]), tmp_path / "out", method="average")
    (base / "train_script.py").write_text("")  # copied into every merge
    for _ in range(2):
        made = merged((base, [copy]), tmp_path / "out", method="average", overwrite=True)
    assert (made.path / "train_script.py").exists()
    assert torch.equal(next(iter(weights(made.path).values())), next(iter(weights(parents[1]).values())))


def test_an_output_that_is_a_file(models, tmp_path):
    (tmp_path / "out").write_text("kept")
    with pytest.raises(CheckpointError, match="this is a file"):
        merged(models, tmp_path / "out", method="average")
    assert (tmp_path / "out").read_text() == "kept"


def test_a_check_can_refuse_the_result(models, tmp_path):
    def refuse(folder):
        assert (folder / "model.safetensors").exists()
        raise CheckpointError("worse than its parents")

    _, parents = models
    with pytest.raises(CheckpointError, match="worse"):
        embedsmith.merge(
            parents=[str(parents[0])], method="average", output=str(tmp_path / "out"), cache=None, check=refuse
        )
    assert not (tmp_path / "out").exists()


def test_statistics_are_measured_once(models, tmp_path, monkeypatch):
    passes = []
    measure = method.Gram.by_a_pass
    monkeypatch.setattr(method.Gram, "by_a_pass", lambda *a: (passes.append(1), measure(*a))[1])
    cache = tmp_path / "cache"
    one = merged(models, tmp_path / "a", cache=str(cache), method="karcher")
    merged(models, tmp_path / "b", cache=str(cache), method="model_stock")
    moved = [shutil.copytree(path, tmp_path / f"copy{i}") for i, path in enumerate(models[1])]
    two = merged((models[0], moved), tmp_path / "c", cache=str(cache), method="karcher")
    assert len(passes) == 1, "the cache is keyed by contents, so copies and other methods find it"
    assert all(torch.equal(weights(one.path)[n], t) for n, t in weights(two.path).items())
    rewrite(moved[0], {name: t * 1.001 for name, t in weights(moved[0]).items()})
    merged((models[0], moved), tmp_path / "d", cache=str(cache), method="karcher")
    assert len(passes) == 2
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    merged(models, tmp_path / "e", cache=str(cache), method="karcher")
    assert len(passes) == 3


def test_an_architecture_is_built_once(models, tmp_path, monkeypatch):
    built: list[Path] = []
    monkeypatch.setattr(folders, "skeleton", lambda folder, trust: built.append(folder) or skeleton(folder, trust))
    base, cache = models[0], tmp_path / "cache"
    first = Architecture.of(base, cache=cache)
    assert Architecture.of(base, cache=cache) == first == Architecture.of(base)
    assert built == [base, base], "the second from the cache, the third without one"
    assert first.buffers, "nothing is lost on the way through the file"

    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert len(Architecture.of(other, cache=cache).names) < len(first.names)
    for file in cache.iterdir():
        file.write_text('{"names": 3}')
    assert Architecture.of(base, cache=cache) == first, "a damaged file is written again"
    assert Architecture.of(base, cache=cache) == first
    assert len(built) == 4
    Architecture.of(base, trust_remote_code=True, cache=cache)
    assert len(built) == 5, "code that is not ours may have changed"


def test_a_cache_that_cannot_be_written_is_done_without(models, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    found = merged(models, tmp_path / "out", cache=str(tmp_path / "cache"))
    plain = merged(models, tmp_path / "plain")
    assert all(torch.equal(tensor, weights(plain.path)[name]) for name, tensor in weights(found.path).items())
    assert "not kept for the next time" in caplog.text
    assert str(tmp_path / "cache") in caplog.text


def test_sums_do_not_know_the_block_size(models):
    from embedsmith.core.recipe import parse
    from embedsmith.merge import MergeRecipe
    from embedsmith.merge.merge_plan import make_plan

    base, parents = models
    tree = {"parents": [str(p) for p in parents], "base": str(base), "method": "slerp", "output": "x", "cache": None}
    job = make_plan(parse(MergeRecipe, tree)).job(("backbone.embeddings.word_embeddings.weight",))
    grams = [dataclasses.replace(job, block=size).gram.full(job.names) for size in (tensor_blocks.UNIT, 1 << 20)]
    assert torch.equal(*grams)


def test_sixteen_bits_and_what_they_cost(models, tmp_path):
    """Differences of 1e-3 of the weights drown in bfloat16, and the report says so."""
    base, _ = models
    near = [child(base, tmp_path / f"near{i}", i, step=1e-3) for i in range(2)]
    rough = merged((base, near), tmp_path / "rough", dtype="bfloat16")
    assert next(iter(weights(rough.path).values())).dtype == torch.bfloat16
    assert json.loads((rough.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert rough.report["rounding"]["total"] > 0.5
    far = merged(models, tmp_path / "far", dtype="bfloat16")
    assert far.report["rounding"]["total"] < 0.3
    assert merged(models, tmp_path / "fine").report["rounding"]["total"] is None


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    from embedsmith.merge.package import Rounding

    values = torch.full((20000,), 1 + 1 / 512, dtype=torch.float64)  # a quarter of the way between two bfloat16
    block = tensor_blocks.Block("x", (20000,), 0, 20000, None, ())
    found = Rounding(1)(values, torch.bfloat16, block)
    assert float(found.double().mean()) == pytest.approx(1 + 1 / 512, abs=1e-4)
    half = tensor_blocks.Block("x", (20000,), 10000, 20000, None, ())
    assert torch.equal(Rounding(1)(values[10000:], torch.bfloat16, half), found[10000:])
    assert set(Rounding()(values, torch.bfloat16, block).tolist()) == {1.0}


def test_float16_that_overflows_is_an_error(models, tmp_path):
    base, parents = models
    big = [shutil.copytree(path, tmp_path / path.name) for path in (base, *parents)]
    for path in big:
        rewrite(path, {"embeddings.word_embeddings.weight": weights(path)["embeddings.word_embeddings.weight"] * 1e6})
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        merged((big[0], big[1:]), tmp_path / "out", dtype="float16")


def test_the_widest_parent_decides_the_type(models, tmp_path):
    base, parents = models
    rough = shutil.copytree(parents[0], tmp_path / "rough")
    rewrite(rough, {name: tensor.bfloat16() for name, tensor in weights(rough).items()})
    one = embedsmith.merge(parents=[str(rough)], method="average", output=str(tmp_path / "a"), cache=None)
    two = merged((base, [rough, parents[1]]), tmp_path / "b")
    assert next(iter(weights(one.path).values())).dtype == torch.bfloat16
    assert next(iter(weights(two.path).values())).dtype == torch.float32


def test_slerp_turns_task_vectors_not_weights(tmp_path):
    """Weights whose cosine is above 0.9999: SLERP of them would be their average, half as long here as it should be."""
    base, parents = family(tmp_path / "near", 2, step=1e-3)
    one, two, origin = (torch.cat([t.flatten() for t in weights(p).values()]) for p in (*parents, base))
    assert float(torch.cosine_similarity(one, two, dim=0)) > 0.9999
    result = merged((base, parents), tmp_path / "out")
    turned = torch.cat([weights(result.path)[name].flatten() for name in weights(base)]) - origin
    assert float(turned.norm()) > 0.98 * float((one - origin).norm())
    assert float(((one + two) / 2 - origin).norm()) < 0.9 * float((one - origin).norm())


def test_sixteen_bit_parents_are_summed_in_full(models, tmp_path):
    """0.1 + 0.2 + 0.7 of bfloat16 weights: exact in float32, neither weights nor sums are 16-bit numbers."""
    _, parents = models
    rough = [shutil.copytree(path, tmp_path / path.name) for path in parents]
    for path in rough:
        rewrite(path, {name: tensor.bfloat16() for name, tensor in weights(path).items()})
    shares = (0.1, 0.2, 0.7)
    result = embedsmith.merge(
        parents=[{"path": str(path), "weight": share} for path, share in zip(rough, shares, strict=True)],
        method="average",
        dtype="float32",
        output=str(tmp_path / "out"),
        cache=None,
    )
    for name, tensor in weights(result.path).items():
        wanted = sum(share * weights(path)[name].double() for share, path in zip(shares, rough, strict=True))
        torch.testing.assert_close(tensor, wanted.float(), rtol=3e-7, atol=0)


def test_tied_weights_are_written_once(tmp_path):
    """A parent that stores both names of a tied tensor merges with one that stores one; unequal copies are refused."""
    base = tiny_base(tmp_path / "base")
    one, two = (child(base, tmp_path / f"p{i}", i) for i in range(2))
    table = weights(two)["embeddings.word_embeddings.weight"]
    rewrite(two, {"cls.predictions.decoder.weight": table})
    result = merged((base, [one, two]), tmp_path / "out")
    assert "cls.predictions.decoder.weight" not in weights(result.path)
    assert any("heads the encoder does not use" in note for note in result.report["notes"])


def test_prefixed_names_and_missing_poolers(tmp_path):
    """`bert.` in front, an integer buffer of an old version, and a pooler in one parent only."""
    base = tiny_base(tmp_path / "base")
    one, two = (child(base, tmp_path / f"p{i}", i) for i in range(2))
    plain = merged((base, [one, two]), tmp_path / "plain")
    found = {f"bert.{name}": tensor for name, tensor in weights(two).items()}
    found["bert.embeddings.position_ids"] = torch.arange(32)[None]
    found["bert.pooler.dense.weight"] = torch.randn(16, 16)
    save_file(found, two / "model.safetensors")
    result = merged((base, [one, two]), tmp_path / "out")
    assert all(torch.equal(weights(plain.path)[n], t) for n, t in weights(result.path).items())


def test_integer_buffers_are_copied_and_must_be_equal(models, tmp_path):
    base, parents = (models[0], models[1][:2])
    copies = [shutil.copytree(path, tmp_path / path.name) for path in (base, *parents)]
    ids = torch.arange(32)[None] * 257
    for path in copies:
        rewrite(path, {"embeddings.position_ids": ids})
    result = merged((copies[0], copies[1:]), tmp_path / "out", method={"type": "average"})
    assert torch.equal(weights(result.path)["embeddings.position_ids"], ids)
    rewrite(copies[1], {"embeddings.position_ids": ids + 1})
    with pytest.raises(CheckpointError, match="position_ids is no weight and differs"):
        merged((copies[0], copies[1:]), tmp_path / "other")


def test_parents_may_lie_in_shards(models, tmp_path):
    """Some parents in several files and some in one: the same merge, bit for bit."""
    from embedsmith.merge.folders import INDEX

    base, parents = models
    sharded = shutil.copytree(parents[1], tmp_path / "sharded")
    state = weights(sharded)
    names = sorted(state)
    places = {name: f"model-{1 + at % 3:05d}-of-00003.safetensors" for at, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, sharded / file, {"format": "pt"})
    (sharded / "model.safetensors").unlink()
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    method = {"type": "ties", "density": 0.5}
    one = merged((base, parents[:2]), tmp_path / "one", method=method)
    two = merged((base, [parents[0], sharded]), tmp_path / "two", method=method)
    assert all(torch.equal(a, b) for a, b in zip(weights(one.path).values(), weights(two.path).values(), strict=True))
    assert not (two.path / INDEX).exists()
    assert load(str(two.path)).encode("a cat").shape == (8,)


def test_a_trained_pooling_is_merged(tmp_path):
    """The weights of attention pooling are tensors of the merge like any other."""
    base = tiny_base(tmp_path / "base", pooling="attention")
    parents = [child(base, tmp_path / f"p{seed}", seed) for seed in range(2)]
    result = merged((base, parents), tmp_path / "out", method="average")
    found, one, two = (load_file(folder / "1_Pooling" / "pooler.safetensors") for folder in (result.path, *parents))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
        assert not torch.equal(tensor, one[name])
    assert load(str(result.path)).settings.pooling == "attention"


def test_pytorch_files_can_be_parents(models, tmp_path):
    base, parents = models
    old = shutil.copytree(parents[0], tmp_path / "old")
    torch.save(weights(old), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    one, two = merged((base, [old, parents[1]]), tmp_path / "a"), merged((base, parents[:2]), tmp_path / "b")
    assert all(torch.equal(weights(one.path)[n], t) for n, t in weights(two.path).items())
    assert [entry["weight"] for entry in two.report["models"]] == [1.0, 1.0, 0.0]  # the base counts for nothing


def test_checkpoints_by_pattern(models, tmp_path):
    _, parents = models
    for step, path in zip((20, 100, 3), parents, strict=True):
        shutil.copytree(path, tmp_path / "run" / f"step-{step}" / "model")
    pattern = str(tmp_path / "run" / "step-*" / "model")
    result = embedsmith.merge(
        parents=[{"path": pattern, "id": "run", "last": 2}], method="average", output=str(tmp_path / "out"), cache=None
    )
    assert [entry["id"] for entry in result.report["models"]] == ["run/step-20", "run/step-100"]
    with pytest.raises(RecipeError, match="no folder matches"):
        embedsmith.merge(parents=[str(tmp_path / "none-*")], method="average", output=str(tmp_path / "x"))


def test_command_line(models, tmp_path):
    from typer.testing import CliRunner

    from embedsmith.cli import app

    base, parents = models
    recipe = tmp_path / "merge.yaml"
    listed = "".join(f"  - {path}\n" for path in parents)
    recipe.write_text(f"parents:\n{listed}base: {base}\nmethod: slerp\noutput: {tmp_path / 'out'}\ncache: null\n")
    plan = CliRunner().invoke(app, ["merge", str(recipe), "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "3 parents" in plan.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["merge", str(recipe), "granularity=tensor"])
    assert done.exit_code == 0, done.output
    assert load(str(tmp_path / "out")).encode("a cat").shape == (8,)


def test_a_recipe_in_words(models, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'granularity'"):
        merged(models, tmp_path / "out", granularty="block")
    with pytest.raises(RecipeError, match="parents: at least one"):
        embedsmith.merge(parents=[], method="average", output=str(tmp_path / "out"))
