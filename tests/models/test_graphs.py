"""Graphs for ONNX Runtime and OpenVINO: they compute what the model does, open like it, and are refused where they
would not. One model is traced for all; the other families are slow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import embedsmith
from embedsmith.core.encoder import fingerprint
from embedsmith.core.errors import CheckpointError, ModelError
from embedsmith.core.reps import Dense
from embedsmith.index.vector_store import lexical_weights
from embedsmith.models import load
from embedsmith.models.exports import trace, write_graph
from embedsmith.models.exports.write_graph import GraphConfig, export_graph
from embedsmith.models.graphs.graph_files import FILES, output_names
from tests.models import lm
from tests.models.graphs import FAMILIES, apart, largest_difference, model_of
from tests.models.tiny import TEXTS

HEADS = ("dense", "sparse", "multivector")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT with every head, prompts that are left out of the pooling, and a projection."""
    options = {"heads": HEADS, "multivector_dim": 8, "dimension": 24, "include_prompt": False, "new_heads": True}
    prompts = {"query": "the fox ", "document": "text "}
    return model_of("bert", tmp_path_factory.mktemp("bert"), prompts=prompts, **options)


@pytest.fixture(scope="module")
def traced(model, tmp_path_factory):
    """The graph as `write_onnx` makes it, with the kinds of its heads; and the folder that is made of it."""
    folder = tmp_path_factory.mktemp("exported") / "graph"
    export_graph(model, folder, GraphConfig("onnx"), TEXTS)
    return folder


@pytest.fixture
def traced_before(model, traced, monkeypatch):
    """Tracing takes seconds: what comes after it starts from the graph that is there."""
    kinds = {name: type(rep) for name, rep in model.represent(["a"], role="query", outputs=HEADS).items()}

    def copied(_model, file, half=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(traced / "onnx" / "model.onnx", file)
        return kinds

    monkeypatch.setattr(write_graph, "write_onnx", copied)


@pytest.mark.parametrize("head", HEADS)
def test_a_graph_computes_every_head_at_every_length_and_padding(model, traced, head):
    graph = load(str(traced))
    assert graph.backend == "onnx"
    assert largest_difference(model, graph, head) <= 1e-5


def test_a_graph_is_an_embedder_with_the_folders_prompts(model, traced):
    graph = load(str(traced))
    for role in ("query", "document"):
        expected = model.represent(TEXTS, role=role, outputs=HEADS)
        found = graph.represent(TEXTS, role=role, outputs=HEADS)
        for head in HEADS:
            for one, other in zip(expected[head].tensors(), found[head].tensors(), strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    assert (graph.dimension, graph.max_length, graph.outputs) == (24, model.max_length, HEADS)
    np.testing.assert_allclose(graph.encode("a fox", dim=8), model.encode("a fox", dim=8), atol=1e-5)
    np.testing.assert_allclose(graph.encode(TEXTS, prompt="dog "), model.encode(TEXTS, prompt="dog "), atol=1e-5)
    assert graph.encode([]).shape == (0, 24)
    assert set(load(str(traced), heads=["dense"]).outputs) == {"dense"}
    cut = load(str(traced), max_length=6, prompts={"query": "late "})
    expected = load_like(model, max_length=6, prompts={"query": "late "})
    np.testing.assert_allclose(cut.encode(TEXTS, "query"), expected.encode(TEXTS, "query"), atol=1e-5)


def load_like(model, **changes):
    """The model under other settings."""
    prompts = changes.pop("prompts")
    other = embedsmith.Embedder.__new__(type(model))
    other.__dict__ = dict(model.__dict__)
    other.settings = replace(model.settings, **changes).with_prompts(prompts)
    return other


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_chunks_are_computed_side_by_side(model, traced, two_threads):
    graph = load(str(traced))
    chunks = {"role": "query", "outputs": HEADS, "token_budget": 30}
    expected, found = (one.represent(TEXTS * 8, **chunks) for one in (model, graph))
    for head in HEADS:
        for one, other in zip(expected[head].tensors(), found[head].tensors(), strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    assert sorted(graph.session._session_of) == [1, 2]


def test_states_of_tokens_are_an_output_too(model, traced):
    expected, found = (
        one.represent(TEXTS, role="document", outputs=("tokens",))["tokens"] for one in (model, load(str(traced)))
    )
    assert torch.equal(expected.mask_NT, found.mask_NT)
    torch.testing.assert_close(found.vector_NTD[found.mask_NT], expected.vector_NTD[found.mask_NT], atol=1e-5, rtol=0)


def test_the_folder_is_laid_out_as_others_look_for_it(model, traced):
    proto = onnx.load(str(traced / "onnx" / "model.onnx"))
    assert [one.name for one in proto.graph.input] == ["input_ids", "attention_mask", "prompt_length"]
    outputs = [one.name for one in proto.graph.output]
    assert outputs[:2] == ["last_hidden_state", "sentence_embedding"]
    assert outputs[2:] == ["sparse_coordinate", "sparse_weight", "multivector_vector", "multivector_mask"]
    sizes = [one.dim_param for one in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "length"]
    assert str(traced.parent).encode() not in proto.SerializeToString()
    assert b"site-packages" not in proto.SerializeToString()  # no path of this machine
    names = {path.relative_to(traced).as_posix() for path in traced.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "onnx/graph.json"} <= names
    assert not [name for name in names if name.endswith(("model.safetensors", ".pt")) and "Dense" not in name]
    card = (traced / "README.md").read_text()
    assert "onnx/model.onnx" in card
    assert "AutoModel" not in card
    assert json.loads((traced / "config.json").read_text())["architectures"] == ["BertModel"]


def test_the_same_command_again_changes_nothing_and_another_needs_overwrite(model, traced, traced_before, tmp_path):
    out = tmp_path / "out"
    export_graph(model, out, GraphConfig("onnx"), TEXTS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    export_graph(model, out, GraphConfig("onnx"), TEXTS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(CheckpointError, match="overwrite"):
        export_graph(model, out, GraphConfig("onnx", "int8", floor=0), TEXTS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_openvino_computes_the_same_in_the_place_of_another(model, traced, traced_before, two_threads, tmp_path):
    shutil.copytree(traced, tmp_path / "out")
    export_graph(model, tmp_path / "out", GraphConfig("openvino"), TEXTS, overwrite=True)
    assert not (tmp_path / "out" / "onnx").exists()
    graph = load(str(tmp_path / "out"))
    assert graph.backend == "openvino"
    for head in HEADS:
        for lengths in ([1], [5, 1, 40], [7] * 33):
            assert max(apart(model, graph, lengths, left, head) for left in (False, True)) <= 1e-5
    made = graph.encode(TEXTS * 8, token_budget=30)
    np.testing.assert_allclose(made, model.encode(TEXTS * 8), atol=1e-5)
    assert sorted(graph.session._model_of) == [False, True]


def test_int8_is_near_told_and_refused_below_the_floor(model, traced_before, tmp_path):
    scores = lambda one: {"mine": float(one.encode(TEXTS[:2]).sum() > 99) + (0.5 if hasattr(one, "facts") else 0.75)}
    made = export_graph(model, tmp_path / "out", GraphConfig("onnx", "int8", floor=0.9), TEXTS, score=scores)
    graph = load(str(tmp_path / "out"))
    cosine = (graph.encode(TEXTS) * model.encode(TEXTS)).sum(1)
    assert made.facts.cosine["mean"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert made.facts.cosine["least"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert 0.95 < cosine.mean() < 0.99999
    operators = {node.op_type for node in onnx.load(str(tmp_path / "out/onnx/model.onnx")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert "mine: 75.00, 50.00, 25.00" in made.text
    assert "| mine | 75.00 | 50.00 | 25.00 |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ModelError, match=r"in int8 the vectors have a mean cosine(.|\n)*--floor 0\.9"):
        export_graph(model, tmp_path / "none", GraphConfig("onnx", "int8", floor=1), TEXTS)
    assert not (tmp_path / "none").exists()


def test_in_int8_a_vector_does_not_depend_on_who_shares_its_batch(model, traced_before, tmp_path):
    export_graph(model, tmp_path / "out", GraphConfig("onnx", "int8", floor=0), TEXTS)
    graph = load(str(tmp_path / "out"))
    together = graph.encode(TEXTS)
    np.testing.assert_allclose([graph.encode(text) for text in TEXTS], together, atol=1e-5)


def test_a_graph_that_computes_something_else_is_refused(model, traced, monkeypatch, tmp_path):
    kinds = {name: type(rep) for name, rep in model.represent(["a"], role="query", outputs=HEADS).items()}

    def wrong(_model, file, half=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        proto = onnx.load(str(traced / "onnx" / "model.onnx"))
        weight = next(one for one in proto.graph.initializer if len(one.dims) == 2 and one.data_type == 1)
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
        onnx.save(proto, str(file))
        return kinds

    monkeypatch.setattr(write_graph, "write_onnx", wrong)
    with pytest.raises(ModelError, match="does not compute what the model does"):
        export_graph(model, tmp_path / "out", GraphConfig("onnx"), TEXTS)
    assert not (tmp_path / "out").exists()


def test_an_operator_that_onnx_lacks_is_named_and_nothing_is_written(model, monkeypatch, tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self, model, heads):
            super().__init__()
            self.model = SimpleNamespace(backbone=model.backbone)

        def forward(self, id_NT, mask_NT, prompt_N=None):
            return torch.special.bessel_j0(id_NT.float()), torch.special.bessel_j0(mask_NT.float())

    monkeypatch.setattr(trace, "Graph", Odd)
    monkeypatch.setattr(trace, "heads_of", lambda model: ("dense",))
    with pytest.raises(ModelError, match=r"no operator for prims\.bessel_j0, which BertModel"):
        export_graph(model, tmp_path / "out", GraphConfig("onnx"), TEXTS)
    assert not (tmp_path / "out").exists()


def test_what_is_settled_in_a_graph_cannot_be_changed(model, traced, tmp_path):
    with pytest.raises(ModelError, match=r"model\.pooling of an exported graph"):
        load(str(traced), pooling="cls")
    with pytest.raises(ModelError, match="cannot be trained"):
        load(str(traced), new_heads=True)
    with pytest.raises(ModelError, match="no head 'retromae'"):
        load(str(traced), heads=["retromae"])
    with pytest.raises(ModelError, match="no graph for openvino"):
        load(str(traced), backend="openvino")
    with pytest.raises(ModelError, match="no output 'middle'"):
        load(str(traced)).represent(["a"], role="query", outputs=("middle",))
    with pytest.raises(ModelError, match="no weights to save"):
        load(str(traced)).save(tmp_path / "saved")
    with pytest.raises(ModelError, match="computes in fp32"):
        load(str(traced)).encode("a", dtype="bfloat16")
    with pytest.raises(ModelError, match="not made by embedsmith export"):
        shutil.copytree(traced, tmp_path / "foreign")
        (tmp_path / "foreign" / "onnx" / "graph.json").unlink()
        load(str(tmp_path / "foreign"))
    with pytest.raises(ModelError, match="cannot open this graph"):
        shutil.copytree(traced, tmp_path / "broken")
        (tmp_path / "broken" / "onnx" / "model.onnx").write_bytes(b"no graph")
        load(str(tmp_path / "broken"))


def test_a_model_that_is_not_loaded_plainly_is_refused(tmp_path):
    model = model_of("bert", tmp_path / "bert", dtype="bfloat16")
    with pytest.raises(ModelError, match="not float32"):
        export_graph(model, tmp_path / "out", GraphConfig("onnx"))
    assert not (tmp_path / "out").exists()


def test_fingerprints_tell_graphs_apart(model, traced, traced_before, tmp_path):
    export_graph(model, tmp_path / "out", GraphConfig("onnx", "int8", floor=0), TEXTS)
    one, other = load(str(traced)), load(str(tmp_path / "out"))
    assert fingerprint(one) == fingerprint(load(str(traced)))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(load(str(traced), prompts={"query": "x "}))


def test_verbs_run_a_graph_where_they_name_a_model(traced, files, typed, tmp_path):
    rows = [{"_id": n, "text": text} for n, text in enumerate(TEXTS) if text]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {
        "evaluate": [traced, "--tasks", files / "scored.jsonl"],
        "encode": [tmp_path / "texts.jsonl", tmp_path / "vectors", "--model", traced],
        "index": [traced, tmp_path / "texts.jsonl", "--to", tmp_path / "index"],
        "geometry": [traced, "--task", files / "scored.jsonl"],
    }
    for verb, arguments in runs.items():
        _, err, code = typed(verb, *arguments, "--backend", "onnx")
        assert code == 0, err
    out, err, code = typed("search", "late vectors", "--index", tmp_path / "index", "--json", "--explain")
    assert (code, len(json.loads(out)["hits"])) == (0, len(rows)), err
    expected = load(str(traced)).encode([row["text"] for row in rows])
    np.testing.assert_allclose(np.load(tmp_path / "vectors" / "vectors.npy"), expected, atol=1e-6)
    _, err, code = typed("evaluate", traced, "--tasks", files / "scored.jsonl", "--backend", "torch")
    assert code == 1
    _, err, code = typed("export", traced, tmp_path / "again", "--to", "onnx")
    assert (code, "no weights" in err) == (1, True)


def test_a_stage_of_a_pipeline_exports(bert, traced_before, monkeypatch, tmp_path):
    from embedsmith.api import exporting
    from embedsmith.cli.stages import PipelineRecipe, run
    from embedsmith.core.recipe import parse

    seen = {}
    monkeypatch.setattr(exporting, "export_graph", lambda model, out, config, texts, **more: seen.update(config=config))
    stages = [{"name": "small", "verb": "export", "recipe": {"model": str(bert), "to": "openvino", "dtype": "int8"}}]
    monkeypatch.setattr(exporting, "load", lambda path, **options: load(path, pooling="mean", **options))
    (tmp_path / "p" / "small").mkdir(parents=True)
    made = run(parse(PipelineRecipe, {"output": str(tmp_path / "p"), "stages": stages}))
    assert made == {"small": tmp_path / "p" / "small"}
    assert seen["config"] == GraphConfig("openvino", "int8")


def test_the_names_of_outputs():
    assert output_names("dense", Dense) == ("sentence_embedding",)
    assert output_names("other", Dense) == ("other_vector",)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_at_every_length_and_padding(family, tmp_path):
    model = model_of(family, tmp_path / "model")
    export_graph(model, tmp_path / "out", GraphConfig("onnx"), TEXTS)
    assert largest_difference(model, load(str(tmp_path / "out"))) <= 1e-5
    write_graph.to_openvino(tmp_path / "out" / FILES["onnx"], tmp_path / "out" / FILES["openvino"], half=False)
    shutil.copy(tmp_path / "out" / "onnx" / "graph.json", tmp_path / "out" / "openvino")
    graph = load(str(tmp_path / "out"), backend="openvino")
    for lengths in ([1], [40], [5, 1, 40, 13], [7] * 33):
        assert max(apart(model, graph, lengths, left) for left in (False, True)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_half_of_the_bytes_and_nearly_the_same_vectors(backend, tmp_path):
    model = model_of("bert", tmp_path / "model")
    export_graph(model, tmp_path / "out", GraphConfig(backend, "fp16"), TEXTS)
    vectors = load(str(tmp_path / "out")).encode(TEXTS)
    assert vectors.dtype == np.float32
    assert 0 < abs(vectors - model.encode(TEXTS)).max() < 5e-3


@pytest.mark.slow
def test_a_splade_graph_gives_the_same_words(tmp_path):
    folder, options = str(lm.folder(tmp_path, "bert")), {"pooling": "mean", "heads": ("sparse",), "sparse": "splade"}
    model = load(folder, sparse_terms=9, device="cpu", **options)
    export_graph(model, tmp_path / "out", GraphConfig("onnx"), TEXTS)
    reps = [
        one.represent(TEXTS, role="document", outputs=("sparse",))["sparse"]
        for one in (model, load(str(tmp_path / "out")))
    ]
    first, second = (lexical_weights(rep) for rep in reps)
    assert [one.keys() for one in first] == [one.keys() for one in second]
    for one, other in zip(first, second, strict=True):
        assert list(other.values()) == pytest.approx(list(one.values()), abs=1e-5)
