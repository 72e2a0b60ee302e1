"""From texts to vectors: independent of the batch, of the padding side and of what ran before."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.errors import ModelError
from embedsmith.models import encode as encode_module
from tests.models import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.embedder(tmp_path_factory.mktemp("bert"))


KINDS = [(kind, pooling) for kind in ("bert", "roberta", "llama") for pooling in tiny.POOLINGS]


@pytest.mark.parametrize(("kind", "pooling"), [pair for pair in KINDS if pair != ("llama", "cls")])  # sees itself only
def test_vectors_do_not_depend_on_the_batch_or_the_padding_side(tmp_path, kind, pooling):
    model = tiny.embedder(tmp_path, kind, pooling=pooling)
    alone = np.stack([model.encode(text) for text in tiny.TEXTS])
    assert np.abs(alone[0] - alone[1]).max() > 1e-2, "the model must tell texts apart"
    for budget in (1, 40, 10**6):
        np.testing.assert_allclose(model.encode(tiny.TEXTS, token_budget=budget), alone, atol=1e-5)
    model.padding_left = True
    np.testing.assert_allclose(model.encode(tiny.TEXTS, token_budget=10**6), alone, atol=1e-5)


def test_blocks_keep_the_order_and_per_text_instructions(model, monkeypatch):
    instruction = [f"{'fox ' * n}" for n in range(len(tiny.TEXTS))]
    whole = model.encode(tiny.TEXTS, instruction=instruction)
    monkeypatch.setattr(encode_module, "BLOCK", 3)
    np.testing.assert_allclose(model.encode(tiny.TEXTS, instruction=instruction), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_chunks_side_by_side_give_what_one_after_another_gives(model, monkeypatch, dtype):
    texts = [f"{text} {'fox ' * n}" for n in range(6) for text in tiny.TEXTS]
    ask = {"role": "query", "outputs": ("dense", "middle"), "token_budget": 30, "dtype": dtype}
    monkeypatch.setattr(encode_module, "derive_workers", lambda device, chunks: 1)
    plain = model.represent(texts, **ask)
    monkeypatch.setattr(encode_module, "derive_workers", lambda device, chunks: 3)
    spread = model.represent(texts, **ask)
    for head in ("dense", "middle"):
        torch.testing.assert_close(spread[head].vector_ND, plain[head].vector_ND, atol=1e-5, rtol=0)
    assert not torch.is_inference_mode_enabled()


def test_threads_made_later_have_all_cores_again(model, monkeypatch):
    monkeypatch.setattr(encode_module, "derive_workers", lambda device, chunks: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.encode(tiny.TEXTS, token_budget=10)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_few_chunks_get_all_cores_each():
    cores = torch.get_num_threads()
    cpu = torch.device("cpu")
    assert encode_module.derive_workers(cpu, 2 * cores - 1) == 1
    assert encode_module.derive_workers(cpu, 2 * cores) == cores
    assert encode_module.derive_workers(torch.device("cuda"), 1000) == 1


def test_forward_by_hand(model):
    """Mean of the last states over real tokens, and of the middle ones: three layers, so hidden_states[2]."""
    padded = model.tokenize(tiny.TEXTS, "query").pad(model.pad_id)
    with torch.no_grad():
        reps = model(padded, ("dense", "middle"))
        states = model.backbone(padded.id_NT, padded.mask_NT.long(), output_hidden_states=True).hidden_states
    mask_NT1 = padded.mask_NT[..., None]
    for head, layer in (("dense", 3), ("middle", 2)):
        expected_ND = F.normalize((states[layer] * mask_NT1).sum(1) / mask_NT1.sum(1), dim=-1)
        torch.testing.assert_close(reps[head].vector_ND, expected_ND, atol=1e-6, rtol=0)
    assert list(model(padded, ("dense",))) == ["dense"]


def test_an_unknown_output_lists_those_there_are(model):
    with pytest.raises(ModelError, match=r"no output 'sparse'(.|\n)*dense, middle"):
        model.represent(["a"], role="query", outputs=("sparse",))


def test_represent_restores_training_mode_and_returns_tensors_a_loss_may_use(model):
    model.train()
    try:
        vector_ND = model.represent(tiny.TEXTS, role="query")["dense"].vector_ND
        assert model.training
        assert model.backbone.training
    finally:
        model.eval()
    assert not vector_ND.is_inference()
    assert not vector_ND.requires_grad
    weight = torch.ones(16, requires_grad=True)
    (vector_ND * weight).sum().backward()  # an inference tensor cannot be saved for this
    np.testing.assert_allclose(vector_ND, model.encode(tiny.TEXTS), atol=1e-6)  # dropout was off


def test_shapes_of_encode(model):
    assert model.encode("one text").shape == (16,)
    assert model.encode(["one text"]).shape == (1, 16)
    assert model.encode([]).shape == (0, 16)
    assert model.encode(["one text"]).dtype == np.float32


def test_dim_truncates_and_normalises_again(model):
    whole, short = model.encode(tiny.TEXTS), model.encode(tiny.TEXTS, dim=4)
    expected = whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    with pytest.raises(ModelError, match="dim=17"):
        model.encode(tiny.TEXTS, dim=17)


def test_bf16_is_close_and_fp32_afterwards_is_unchanged(model):
    exact = model.encode(tiny.TEXTS)
    rough = model.encode(tiny.TEXTS, dtype="bfloat16")
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1
    np.testing.assert_array_equal(model.encode(tiny.TEXTS), exact)


def test_prompts_reach_the_vectors(tmp_path):
    model = tiny.embedder(tmp_path, prompts={"query": "query: ", "sts-document": "fox "})
    plain = tiny.embedder(tmp_path / "plain")
    np.testing.assert_allclose(model.encode("dog", role="query"), plain.encode("query: dog"), atol=1e-6)
    np.testing.assert_allclose(model.encode("dog", task="sts"), plain.encode("fox dog"), atol=1e-6)
    np.testing.assert_allclose(model.encode("dog"), plain.encode("dog"), atol=1e-6)


def test_normalize_false_gives_the_raw_mean(tmp_path):
    raw, unit = tiny.embedder(tmp_path, normalize=False), tiny.embedder(tmp_path)
    vectors = raw.encode(tiny.TEXTS)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(vectors / lengths, unit.encode(tiny.TEXTS), atol=1e-6)


def test_dimension_adds_an_orthogonal_head_that_trains(tmp_path):
    model = tiny.embedder(tmp_path, dimension=8)
    assert model.dimension == 8
    weight_DH = model.projections[0].linear.weight
    torch.testing.assert_close(weight_DH @ weight_DH.T, torch.eye(8), atol=1e-5, rtol=0)
    model(model.tokenize(tiny.TEXTS).pad(model.pad_id))["dense"].vector_ND.sum().backward()
    assert weight_DH.grad.abs().sum() > 0
    assert tiny.embedder(tmp_path, dimension=16).projections.__len__() == 0


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path):
    gradients = []
    for flag in (False, True):
        model = tiny.embedder(tmp_path, gradient_checkpointing=flag).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.backbone.config.attention_probs_dropout_prob = 0.0
        padded = model.tokenize(tiny.TEXTS).pad(model.pad_id)
        model(padded)["dense"].vector_ND[:, 0].sum().backward()
        gradients.append(model.backbone.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=0)
    assert model.backbone.is_gradient_checkpointing
