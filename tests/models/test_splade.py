"""SPLADE through the language-model head: equal to the path that holds [N, T, V], saved, trained, on every family."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import load
from embedsmith.models.heads import splade
from embedsmith.models.heads.splade import SPLADE_FILE, top_words
from tests.models import lm, tiny
from tests.tinybert import tiny_bert

TEXTS = ["the cat sat on the mat", "a dog", "", "the big old tree by the new red mat ran far"]
KINDS = ["bert", "xlm-roberta", "distilbert", "modernbert", "llama", "llama-tied"]


@pytest.fixture
def blocks(monkeypatch):
    """Many small blocks of the vocabulary and of the backward pass."""
    monkeypatch.setattr(splade, "_NUMBERS", 1)
    monkeypatch.setattr(splade, "_TERMS_AT_ONCE", 3)


def naive(state_NTH, weight_VH, bias_V, part_NT, terms):
    """[N, T, V] and a sort."""
    logit_NTV = state_NTH @ weight_VH.T + (0 if bias_V is None else bias_V)
    score_NV = logit_NTV.masked_fill(~part_NT[..., None], float("-inf")).amax(1)
    weight_NV = torch.log1p(torch.relu(score_NV))
    kept_NK = weight_NV.topk(min(terms, weight_NV.shape[1]), 1).indices
    return weight_NV * torch.zeros_like(weight_NV).scatter(1, kept_NK, 1.0)


def over_vocabulary(weight_NK, word_NK, size):
    return weight_NK.new_zeros(len(weight_NK), size).scatter_add(1, word_NK, weight_NK)


@pytest.mark.parametrize("terms", [1, 7, 200, 10**6])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_naive_path_forward_and_backward(blocks, terms, biased):
    torch.manual_seed(1)
    state_NTH = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(150, 6, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(150, dtype=torch.float64, requires_grad=True) if biased else None
    part_NT = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    pull_NV = torch.randn(3, 150, dtype=torch.float64)
    leaves = [leaf for leaf in (state_NTH, weight_VH, bias_V) if leaf is not None]
    expected_NV = naive(state_NTH, weight_VH, bias_V, part_NT, terms)
    expected = torch.autograd.grad((expected_NV * pull_NV).sum(), leaves)
    score_NK, word_NK = top_words(state_NTH, weight_VH, bias_V, part_NT, terms)
    assert word_NK.shape == (3, min(terms, 150))
    found_NV = over_vocabulary(torch.log1p(torch.relu(score_NK)), word_NK, 150)
    torch.testing.assert_close(found_NV, expected_NV, rtol=0, atol=1e-12)
    found = torch.autograd.grad((found_NV * pull_NV).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert float(expected[1].abs().sum()) > 0.1


class Largest(TorchDispatchMode):
    """The most numbers any operation gave."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.numel())
        return made


def test_the_scores_of_all_tokens_and_words_never_exist(monkeypatch):
    monkeypatch.setattr(splade, "_NUMBERS", 2**14)
    state_NTH = torch.randn(4, 32, 8, requires_grad=True)
    weight_VH = torch.randn(4000, 8, requires_grad=True)
    with Largest() as largest:
        score_NK, _ = top_words(state_NTH, weight_VH, None, torch.ones(4, 32, dtype=torch.bool), 16)
        score_NK.sum().backward()
    assert largest.count <= max(weight_VH.numel(), 2**14) < 4 * 32 * 4000 / 10


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_whole_language_model(tmp_path, kind):
    folder = lm.folder(tmp_path / "lm", kind)
    pooling = "last" if "llama" in kind else "mean"
    model = load(str(folder), pooling=pooling, heads=("sparse",), sparse="splade", sparse_terms=10**6, device="cpu")
    sparse = model.represent(TEXTS, role="document", outputs=("sparse",))["sparse"]
    size = model.backbone.config.vocab_size
    found_NV = over_vocabulary(sparse.weight_NT, sparse.coordinate_NT, size)
    whole = (AutoModelForCausalLM if "llama" in kind else AutoModelForMaskedLM).from_pretrained(folder).eval()
    for text, found_V in zip(TEXTS, found_NV, strict=True):
        ids = torch.from_numpy(model.tokenize([text]).id_S)[None]
        with torch.no_grad():
            expected_V = whole(input_ids=ids).logits[0].amax(0).relu().log1p()
        torch.testing.assert_close(found_V, expected_V, atol=1e-5, rtol=1e-5)
    assert (found_NV > 0).any()
    assert (found_NV == 0).any()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "llama-tied"])
def test_saved_and_loaded_again_it_is_the_same(tmp_path, kind):
    folder = lm.folder(tmp_path / "lm", kind)
    pooling = "last" if "llama" in kind else "mean"
    model = load(str(folder), pooling=pooling, heads=("sparse",), sparse="splade", sparse_terms=9, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / SPLADE_FILE).exists()
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.state_dict().keys() == model.state_dict().keys()
    old, new = (one.represent(TEXTS, role="query", outputs=("sparse",))["sparse"] for one in (model, again))
    assert old.weight_NT.shape == (4, 9)
    assert torch.equal(old.weight_NT, new.weight_NT)
    assert torch.equal(old.coordinate_NT, new.coordinate_NT)
    assert load(str(tmp_path / "saved"), sparse_terms=3, device="cpu").token_heads["sparse"].terms == 3
    assert load(str(tmp_path / "saved"), heads=("dense",), device="cpu").outputs == ("dense", "middle")


def test_tied_words_are_trained_once(tmp_path):
    """The words' table gets the gradient of both uses, and is one parameter for the optimizer."""
    model = load(str(lm.folder(tmp_path, "bert")), pooling="mean", heads=("sparse",), sparse="splade", device="cpu")
    assert not [name for name, _ in model.named_parameters() if name.endswith("weight_VH")]
    sparse = model(model.tokenize(TEXTS[:1]).pad(model.pad_id), ("sparse",))["sparse"]
    sparse.weight_NT.sum().backward()
    seen = set(model.tokenize(TEXTS[:1]).id_S.tolist())
    moved = set(model.backbone.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert moved > seen
    assert all(parameter.grad is not None for parameter in model.token_heads.parameters())


def test_a_model_without_a_language_head_starts_from_its_words(tmp_path, caplog):
    model = load(str(tiny_bert(tmp_path)), pooling="mean", heads=("sparse",), sparse="splade", device="cpu")
    assert "no language-model head" in caplog.text
    padded = model.tokenize(TEXTS).pad(model.pad_id)
    with torch.no_grad():
        sparse, states = (model(padded, (name,))[name] for name in ("sparse", "tokens"))
    logit_NTV = states.vector_NTD @ model.backbone.get_input_embeddings().weight.T
    expected_N = logit_NTV.masked_fill(~padded.mask_NT[..., None], -1.0).amax((1, 2)).log1p()
    torch.testing.assert_close(sparse.weight_NT.amax(1), expected_N, atol=1e-5, rtol=1e-5)


def test_impossible_settings(tmp_path):
    folder = str(lm.folder(tmp_path / "lm"))
    with pytest.raises(RecipeError, match="sparse_terms"):
        load(folder, pooling="mean", heads=("sparse",), sparse="splade", sparse_terms=0)
    with pytest.raises(ModelError, match="sparse_terms belongs to sparse=splade"):
        load(folder, pooling="mean", heads=("sparse",), new_heads=True, sparse_terms=5)
    model = load(folder, pooling="mean", heads=("sparse",), sparse="splade", device="cpu")
    model.save(tmp_path / "saved")
    whole = (tmp_path / "saved" / SPLADE_FILE).read_bytes()
    (tmp_path / "saved" / SPLADE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"splade_head(.|\n)*copy the file again"):
        load(str(tmp_path / "saved"), device="cpu")


def test_a_family_that_bends_its_scores_is_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": 120, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(**shape, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.5)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="more with its scores than a linear layer"):
        load(str(tmp_path), pooling="last", heads=("sparse",), sparse="splade", attn_implementation="eager")


@pytest.mark.parametrize("sparse", ["lexical", "splade"])
def test_texts_without_words_have_finite_scores_under_every_head(tmp_path, sparse):
    """Empty after special tokens, unknown to the tokenizer, far too long."""
    heads = ("sparse", "multivector")
    model = load(str(lm.folder(tmp_path)), pooling="cls", heads=heads, new_heads=True, sparse=sparse, device="cpu")
    strange = ["", "   ", "日本 語", "cat " * 10_000]
    queries, documents = (
        model.represent(strange, role=role, outputs=("dense", *heads)) for role in ("query", "document")
    )
    for head in ("dense", *heads):
        score_QK = queries[head].scores(documents[head])[0]
        assert score_QK.shape == (4, 4)
        assert score_QK.isfinite().all(), head
    if sparse == "lexical":
        assert (queries["sparse"].weight_NT[:3] == 0).all()
