"""What is saved loads in sentence-transformers and in plain transformers with the same vectors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import CheckpointError
from embedsmith.models import load
from embedsmith.models import write as save_module
from embedsmith.models.exports.libraries import export_head
from embedsmith.models.heads.dense import Projection
from tests.models import tiny

PROMPTS = {"query": "query: ", "document": "passage: "}


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-2, "a model that maps all texts to one vector proves nothing"


def pooled_by_hand(name, states, mask):
    weight = {"mean": mask, "weighted_mean": mask * mask.cumsum(1)}.get(name)
    if weight is not None:
        return (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    if name == "max":
        return states.masked_fill(mask[..., None] == 0, -1e9).amax(1)
    return states[:, 0] if name == "cls" else states[torch.arange(len(states)), mask.sum(1) - 1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", tiny.POOLINGS)
def test_saved_model_agrees_with_its_peers(tmp_path, pooling, normalize):
    model = tiny.embedder(tmp_path / "base", pooling=pooling, prompts=PROMPTS, max_length=12, normalize=normalize)
    model.save(tmp_path / "saved")
    query, document = (model.encode(tiny.TEXTS, role=role) for role in ("query", "document"))
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.settings == model.settings
    np.testing.assert_array_equal(again.encode(tiny.TEXTS, role="query"), query)
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert peer.max_seq_length == 12
    assert_same(query, peer.encode_query(tiny.TEXTS))
    assert_same(document, peer.encode_document(tiny.TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    plain, report = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["unexpected_keys"]
    texts = [PROMPTS["query"] + text for text in tiny.TEXTS]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape[1] == 12, "the tokenizer must carry the maximum length"
    with torch.no_grad():
        vectors = pooled_by_hand(pooling, plain.eval()(**tokens).last_hidden_state, tokens.attention_mask)
    assert_same(query, torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", tiny.POOLINGS)
def test_dense_heads_and_prompts_left_out_of_the_pooling(tmp_path, pooling, include_prompt):
    """Both ways: their newest schema into ours, ours into theirs, with two dense layers of different activations."""
    tiny.folder(tmp_path / "base")
    torch.manual_seed(1)
    modules = [
        Transformer(str(tmp_path / "base")),
        Pooling(16, pooling_mode=THEIRS[pooling], include_prompt=include_prompt),
        Dense(16, 16, activation_function=torch.nn.Tanh(), use_residual=True),
        Dense(16, 8, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    peer = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query: "}, default_prompt_name="query")
    peer.save(str(tmp_path / "theirs"))
    assert "pooling_mode" in json.loads((tmp_path / "theirs/1_Pooling/config.json").read_text())  # the new schema
    model = load(str(tmp_path / "theirs"), device="cpu")
    assert (model.settings.default_prompt, model.settings.include_prompt) == ("query", include_prompt)
    assert_same(model.encode(tiny.TEXTS, role="query"), peer.encode_query(tiny.TEXTS))
    model.save(tmp_path / "ours")
    back = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert back.default_prompt_name == "query"
    assert_same(model.encode(tiny.TEXTS, role="query"), back.encode_query(tiny.TEXTS))
    np.testing.assert_array_equal(
        load(str(tmp_path / "ours"), device="cpu").encode(tiny.TEXTS), model.encode(tiny.TEXTS)
    )


THEIRS = {"cls": "cls", "mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "max": "max"}


def test_the_layout_is_the_legacy_one(tmp_path):
    """Keys that servers require, in the schema that sentence-transformers before 5.4 accepts."""
    model = tiny.embedder(tmp_path / "base", dimension=8, prompts=PROMPTS)
    model.encode(tiny.TEXTS)  # leaves its truncation in the tokenizer's state
    model.save(tmp_path / "saved")
    saved = {p.relative_to(tmp_path / "saved").as_posix(): p for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert not [name for name in saved if name.endswith((".bin", ".pt", ".pkl"))]
    read = {name: json.loads(p.read_text()) for name, p in saved.items() if name.endswith(".json")}
    kinds = [entry["type"] for entry in read["modules.json"]]
    assert kinds == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")
    ]
    assert [entry["path"] for entry in read["modules.json"]] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert read["1_Pooling/config.json"] == {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert read["sentence_bert_config.json"] == {"max_seq_length": 40, "do_lower_case": False}
    assert read["2_Dense/config.json"]["activation_function"] == "torch.nn.modules.linear.Identity"
    general = read["config_sentence_transformers.json"]
    assert (general["prompts"], general["default_prompt_name"]) == (PROMPTS, None)
    assert general["similarity_fn_name"] == "cosine"
    assert read["tokenizer_config.json"]["model_max_length"] == 40
    assert read["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it
    assert read["tokenizer.json"]["truncation"] is None
    assert all(not name.startswith("projections") for name in load_file(tmp_path / "saved/model.safetensors"))
    card = saved["README.md"].read_text(encoding="utf-8")
    assert '| `query` | `"query: "` |' in card


def test_the_snippet_in_the_card_runs_and_agrees(tmp_path):
    for pooling in tiny.POOLINGS:
        model = tiny.embedder(tmp_path / "base", pooling=pooling)
        model.save(tmp_path / "saved")
        card = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[3].split("```")[0].replace("path/to/this/folder", str(tmp_path / "saved"))
        scope = {}
        exec(code, scope)  # noqa: S102
        np.testing.assert_allclose(scope["vectors"], model.encode(["a text"]), atol=1e-5)


def test_lower_casing_survives_both_ways(tmp_path):
    tiny.folder(tmp_path / "base")
    model = tiny.embedder(tmp_path / "base")
    model.save(tmp_path / "saved")
    config = tmp_path / "saved/sentence_bert_config.json"
    config.write_text('{"max_seq_length": 40, "do_lower_case": true}')
    lower, peer = load(str(tmp_path / "saved"), device="cpu"), SentenceTransformer(str(tmp_path / "saved"))
    assert_same(lower.encode(["QUICK fox", "a"]), peer.encode(["QUICK fox", "a"]))
    assert np.abs(lower.encode("QUICK fox") - model.encode("QUICK fox")).max() > 1e-2
    lower.save(tmp_path / "again")
    again = load(str(tmp_path / "again"), device="cpu")
    assert again.settings.lower_case
    np.testing.assert_array_equal(again.encode("QUICK fox"), lower.encode("quick fox"))


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = tiny.embedder(tmp_path / "base")
    model.save(tmp_path / "saved")
    before = {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module.Saved, "model_card", full)
    with pytest.raises(CheckpointError, match="no space left"):
        tiny.embedder(tmp_path / "other", dimension=8).save(tmp_path / "saved")
    assert {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other", "saved"]


def test_saving_in_training_keeps_truncation_afterwards(tmp_path):
    model = tiny.embedder(tmp_path / "base", max_length=6)
    before = model.encode(tiny.TEXTS)
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(model.encode(tiny.TEXTS), before)
    shutil.rmtree(tmp_path / "saved")


@pytest.mark.parametrize("activation", ["Tanh", "GELU", "PReLU", "Identity"])
def test_every_activation_goes_through_sentence_transformers(tmp_path, activation):
    model = tiny.embedder(tmp_path / "base")
    torch.manual_seed(2)
    model.projections.append(Projection(16, 16, activation=activation, residual=activation == "GELU"))
    model.save(tmp_path / "saved")
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_same(model.encode(tiny.TEXTS), peer.encode(tiny.TEXTS))


@pytest.mark.parametrize(("similarity", "normalize"), [("dot", False), ("euclidean", False), ("cosine", True)])
def test_what_sentence_transformers_says_of_scores_is_kept(tmp_path, similarity, normalize):
    """`similarity_fn_name` and `truncate_dim`: read, followed as sentence-transformers does, written back, exported."""
    tiny.embedder(tmp_path / "base", normalize=normalize).save(tmp_path / "saved")
    path = tmp_path / "saved" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"similarity_fn_name": similarity, "truncate_dim": 6}))
    model, peer = load(str(tmp_path / "saved"), device="cpu"), SentenceTransformer(str(tmp_path / "saved"))
    vectors, theirs = model.encode(tiny.TEXTS), peer.encode(tiny.TEXTS)
    assert vectors.shape == theirs.shape == (len(tiny.TEXTS), 6)
    assert model.encode(tiny.TEXTS, dim=16).shape[1] == model.dimension == 16
    np.testing.assert_allclose(model.similarity(theirs, theirs), peer.similarity(theirs, theirs), atol=1e-4)
    if not normalize:  # sentence-transformers does not normalise again
        np.testing.assert_allclose(vectors, theirs, atol=1e-5)
    model.save(tmp_path / "again")
    export_head(model, tmp_path / "exported", "dense")
    for folder in ("again", "exported"):
        found = json.loads((tmp_path / folder / path.name).read_text())
        assert (found["similarity_fn_name"], found["truncate_dim"]) == (similarity, 6)
