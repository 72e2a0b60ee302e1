"""Public folders of every kind are trained on, mined with, evaluated, indexed and merged; bad ones are refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SparseStaticEmbedding, SpladePooling

import embedsmith as es
from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import load
from embedsmith.models.exports.libraries import export_head
from embedsmith.models.forms import routed
from tests.models import lm

TEXTS = ["the red cat sat", "a big old tree", "far on the mat", "the dog ran by", "new blue mat", "old far dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of every kind, made by sentence-transformers."""
    root = tmp_path_factory.mktemp("folders")
    base = str(lm.folder(root / "lm"))
    torch.manual_seed(0)
    tokenizer = lm.tiny_tokenizer()
    words = Transformer(base, transformer_task="fill-mask")
    weights = SparseStaticEmbedding(tokenizer, weight=torch.rand(len(tokenizer)))
    names = {"module_input_name": "token_embeddings"}
    late = [Dense(16, 6, bias=False, activation_function=torch.nn.Identity(), **names), MultiVectorMask([","])]
    filled = Transformer(base, query_expansion={"strategy": "fixed", "attend": False, "length": 8})
    code = SparseAutoEncoder(16, hidden_dim=40, k=6, k_aux=8)
    models = {
        "splade": SparseEncoder(modules=[words, SpladePooling()], device="cpu"),
        "router": SparseEncoder(modules=[Router.for_query_document([weights], [words, SpladePooling()])], device="cpu"),
        "csr": SparseEncoder(modules=[Transformer(base), Pooling(16), code], device="cpu"),
        "late": MultiVectorEncoder(modules=[filled, *late, Normalize("token_embeddings")], device="cpu"),
        "static": SentenceTransformer(
            modules=[StaticEmbedding(tokenizer, torch.randn(len(tokenizer), 12)), Normalize()], device="cpu"
        ),
        "joined": SentenceTransformer(modules=[Transformer(base), Pooling(16, ("mean", "max"))], device="cpu"),
    }
    for name, model in models.items():
        model.save(str(root / name))
    rows = [{"query": a, "positives": [b]} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


KINDS = {"splade": SparseEncoder, "router": SparseEncoder, "csr": SparseEncoder, "late": MultiVectorEncoder}


@pytest.mark.parametrize(
    "name",
    ["router", "late", "static", *(pytest.param(n, marks=pytest.mark.slow) for n in ("splade", "csr", "joined"))],
)
def test_every_kind_is_trained_and_comes_back_as_its_kind(folders, tmp_path, name):
    before = load(str(folders / name), device="cpu")
    head = before.main_head
    data = [{"path": str(folders / "pairs.jsonl"), "loss": {"type": "infonce", "head": head}}]
    run = es.train(
        model=str(folders / name), data=data, steps=2, batch_size=4, learning_rate=1e-2, output=tmp_path / "run"
    )
    after = load(str(run.folder), device="cpu")
    assert (after.settings.form, after.main_head) == (before.settings.form, head)
    moved = [key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])]
    assert moved
    if name == "router":
        assert {key.split(".")[0] for key in moved} >= {"query_side", "backbone"}
    there = KINDS.get(name, SentenceTransformer)(str(run.folder), device="cpu")
    expected = np.asarray(there.similarity(there.encode_query(TEXTS), there.encode_document(TEXTS)))
    queries, documents = (after.represent(TEXTS, role=r, outputs=(head,))[head] for r in ("query", "document"))
    np.testing.assert_allclose(queries.scores(documents)[0].numpy(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_scored_is_what_the_model_is_made_for(folders, tmp_path):
    rows = [{"text1": a, "text2": b, "score": n} for n, (a, b) in enumerate(itertools.pairwise(TEXTS))]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, head in (("splade", "sparse"), ("late", "multivector"), ("joined", "dense")):
        results = es.evaluate(str(folders / name), str(tmp_path / "scored.jsonl"))
        assert results.about["head"] == head
        assert (
            results.main_scores()
            == es.evaluate(str(folders / name), str(tmp_path / "scored.jsonl"), head=head).main_scores()
        )


def test_late_scores_in_an_index_are_the_models_own(folders, tmp_path):
    pytest.importorskip("qdrant_edge")
    es.index(str(folders / "late"), TEXTS, to=tmp_path / "index")
    found = es.search(TEXTS[0], tmp_path / "index", k=3, explain=True)[0]
    model = load(str(folders / "late"), device="cpu")
    queries, documents = (
        model.represent(TEXTS, role=role, outputs=("multivector",))["multivector"] for role in ("query", "document")
    )
    scores = queries.scores(documents)[0][0]
    assert len(found.hits) == 3
    for hit, explained in zip(found.hits, found.explanations, strict=True):
        assert hit.scores["multivector"] == pytest.approx(float(scores[int(hit.id)]), abs=1e-4)
        assert sum(match.score for match in explained.matches["multivector"]) == pytest.approx(
            hit.scores["multivector"], abs=1e-4
        )


def test_the_head_of_colbert_is_new_where_it_is_trained(folders, tmp_path):
    model = load(
        str(folders / "lm"), pooling="cls", heads=("multivector",), multivector="colbert", new_heads=True, device="cpu"
    )
    model.save(tmp_path / "both")
    again = load(str(tmp_path / "both"), device="cpu")
    assert again.outputs == ("dense", "middle", "multivector")
    one, two = (m.represent(TEXTS, role="query", outputs=("multivector",))["multivector"] for m in (model, again))
    assert torch.equal(one.vector_NTD, two.vector_NTD)
    assert one.vector_NTD.shape[-1] == 128
    export_head(model, tmp_path / "late", "pylate")
    types = [entry["type"] for entry in json.loads((tmp_path / "late" / "modules.json").read_text())]
    assert types == ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    back = load(str(tmp_path / "late"), device="cpu")
    three = back.represent(TEXTS, role="query", outputs=("multivector",))["multivector"]
    torch.testing.assert_close(one.vector_NTD, three.vector_NTD)


@pytest.mark.parametrize("head", ["sparse", "multivector"])
def test_what_export_writes_is_read_back(folders, tmp_path, head):
    model = load(
        str(folders / "lm"),
        pooling="cls",
        heads=("sparse", "multivector"),
        sparse="splade",
        new_heads=True,
        device="cpu",
    )
    export_head(model, tmp_path / "out", head)
    again = load(str(tmp_path / "out"), device="cpu")
    assert (again.main_head, again.outputs) == (head, (head,))
    made = []
    for one in (model, again):
        queries, documents = (one.represent(TEXTS, role=r, outputs=(head,))[head] for r in ("query", "document"))
        made.append(queries.scores(documents))
    torch.testing.assert_close(*made)


def test_a_splade_folder_with_an_adapter_goes_on_and_ends_as_a_splade_folder(folders, tmp_path):
    model = load(str(folders / "splade"), device="cpu", lora={"r": 2})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save(tmp_path / "apart", merge=False)
    apart = load(str(tmp_path / "apart"), device="cpu")
    model.save(tmp_path / "merged")
    merged = load(str(tmp_path / "merged"), device="cpu")
    assert apart.settings.form == merged.settings.form == "splade"
    made = [one.represent(TEXTS, role="query", outputs=("sparse",))["sparse"] for one in (model, apart, merged)]
    torch.testing.assert_close(made[0].scores(made[0]), made[1].scores(made[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[0].scores(made[0]), made[2].scores(made[2]), atol=1e-4, rtol=1e-4)


def edited(folder, target, file, change):
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return str(target)


def test_folders_of_mixed_kinds_are_refused_with_what_belongs_together(folders, tmp_path):
    def with_pooling(modules):
        return [*modules, {"idx": 9, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]

    mixed = edited(folders / "splade", tmp_path / "mixed", "modules.json", with_pooling)
    with pytest.raises(ModelError, match=r"Transformer, SpladePooling, Pooling(.|\n)*SparseEncoder: Transformer"):
        load(mixed)

    def with_words(modules):
        return [{"path": "", "type": "sentence_transformers.models.WordEmbeddings"}, *modules[1:]]

    other = edited(folders / "joined", tmp_path / "words", "modules.json", with_words)
    with pytest.raises(ModelError, match=r"WordEmbeddings' is not supported(.|\n)*SentenceTransformersEncoder"):
        load(other)


def test_a_head_of_another_width_is_named(folders, tmp_path):
    wider = edited(folders / "late", tmp_path / "late", "1_Dense/config.json", lambda said: {**said, "in_features": 20})
    save_file({"linear.weight": torch.randn(6, 20)}, tmp_path / "late" / "1_Dense" / "model.safetensors")
    with pytest.raises(ModelError, match="takes 20 numbers, and gets 16"):
        load(wider)
    code = edited(folders / "csr", tmp_path / "csr", "2_SparseAutoEncoder/config.json", lambda s: {**s, "input_dim": 8})
    with pytest.raises(ModelError, match="takes vectors of 8 numbers, and the model gives 16"):
        load(code)


def test_a_router_without_a_route_for_a_role_is_named_and_the_fix_works(folders, tmp_path):
    def renamed(said):
        routes = {"query": said["structure"]["query"], "doc": said["structure"]["document"]}
        return {**said, "structure": routes, "parameters": {**said["parameters"], "default_route": "doc"}}

    folder = edited(folders / "router", tmp_path / "router", "router_config.json", renamed)
    with pytest.raises(ModelError, match=r"no route for the role 'document': its routes are query, doc") as caught:
        load(folder)
    assert '"route_mappings": {"(\'document\', None)": "NAME"}' in str(caught.value)
    path = tmp_path / "router" / "router_config.json"
    said = json.loads(path.read_text())
    said["parameters"]["route_mappings"] = {"('document', None)": "doc"}
    path.write_text(json.dumps(said))
    assert load(folder, device="cpu").query_side is not None


def test_a_mapping_that_says_more_goes_before_one_that_says_less(tmp_path):
    """By sentence-transformers' rules, in whatever order they are listed."""
    mapped = {"(None, None)": "rest", "(None, 'text')": "texts", "('query', None)": "asked", "('query', 'image')": "no"}
    said = routed._RouterFile({}, dict.fromkeys(("rest", "texts", "asked", "no"), ()), routed._Parameters(None, mapped))
    assert [routed.route_of(role, said, tmp_path) for role in routed.ROUTES] == ["asked", "texts"]
    assert routed.route_of("query", routed._RouterFile({}, {"image": (), "text": ()}), tmp_path) == "text"


def test_a_loss_that_reads_no_output_of_the_model_says_what_to_write(folders, tmp_path):
    with pytest.raises(RecipeError, match=r"reads the head 'dense'(.|\n)*loss.head=multivector"):
        es.train(model=str(folders / "late"), data=str(folders / "pairs.jsonl"), steps=1, output=tmp_path / "run")


def test_models_of_one_kind_merge_and_those_that_would_lose_weights_do_not(folders, tmp_path):
    for name in ("late", "static"):
        one = load(str(folders / name), device="cpu")
        before = {key: value.clone() for key, value in one.state_dict().items()}
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(1.02)
        one.save(tmp_path / name / "b")
        parents = [str(folders / name), str(tmp_path / name / "b")]  # theirs, and what became of it here
        es.merge(parents=parents, method="average", output=tmp_path / name / "merged")
        merged = load(str(tmp_path / name / "merged"), device="cpu")
        assert merged.main_head == one.main_head
        for key, value in merged.state_dict().items():
            torch.testing.assert_close(value, 1.01 * before[key], msg=key)
    for name, fix in (("splade", "model.pooling=mean"), ("router", "apart")):
        with pytest.raises(ModelError, match=f"form {name} has weights that a merge would lose(.|\n)*{fix}"):
            es.merge(parents=[str(folders / name), str(folders / "lm")], method="average", output=tmp_path / "merged")


def test_negatives_are_mined_by_what_the_model_is_made_for(folders, tmp_path):
    made = []
    for number, head in enumerate([{}, {"head": "multivector"}]):
        out = tmp_path / f"mined-{number}.jsonl"
        search = {"type": "embedding", "model": str(folders / "late"), **head}
        es.mine(data=str(folders / "pairs.jsonl"), output=out, searchers=search, select={"negatives": 2})
        made.append(out.read_text())
    assert made[0] == made[1]
    assert "negatives" in made[0]
