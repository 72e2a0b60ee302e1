"""Texts in one row under `embedsmith_varlen`: its reference on the CPU, what chooses it, who reads packed states."""

import inspect
import logging
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModel, T5Config, T5EncoderModel

from embedsmith.core.errors import ModelError
from embedsmith.core.shelf import poolings
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models import load, packing, row_kernels, varlen
from embedsmith.models.pooling import pooled
from embedsmith.models.row_kernels import ROW_KERNELS, RowKernel, Sight, TextRow
from embedsmith.models.varlen import VARLEN
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer

SHAPE = dict(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=66,
    initializer_range=0.3,
)
AFTER_PADDING = {"pad_token_id": 1}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3, "pad_token_id": 0}
LOCAL |= dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0)
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


def encoder(family, **changes):
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIG_MAPPING[family](**{**SHAPE, **changes})).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("varlen")

    def folder(family, **changes):
        place = root / f"{family}-{zlib.crc32(repr(changes).encode())}"
        if not place.exists():
            if family == "t5":
                made = T5EncoderModel(T5Config(vocab_size=280, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
            elif family in ("bert", "xlm-roberta", "modernbert", "distilbert", "mpnet"):
                made = encoder(family, **changes)
            else:
                made = tiny(family, vocab_size=280, **changes)
            made.save_pretrained(place)
            byte_tokenizer().save_pretrained(place)
        return str(place)

    return folder


def embed(path, **options):
    return load(path, device="cpu", **{"max_length": 40, "pooling": "mean", **options})


def both(path, **options):
    plain = embed(path, **options, packing=False)
    row = embed(path, **options, packing=True, attn_implementation=VARLEN)
    assert row.packing
    return plain, row


def vectors_and_gradient(model, outputs=("dense", "middle")):
    padded = model.tokenize([text for text in TEXTS if text]).pad(model.pad_id, left=model.padding_left)
    assert not padded.mask_NT.all()
    model.zero_grad()
    reps = model(padded, outputs)
    tensors = [tensor for rep in reps.values() for tensor in rep.tensors() if tensor.is_floating_point()]
    sum((tensor * torch.linspace(-1, 1, tensor.shape[-1])).sum() for tensor in tensors).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return *(tensor.detach() for tensor in tensors), gradient


def assert_same(plain, row):
    for expected, found in zip(plain, row, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert torch.cosine_similarity(plain[-1].double(), row[-1].double(), dim=0) >= 0.9999


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("bert", {}, {}),
        ("xlm-roberta", AFTER_PADDING, {}),
        ("modernbert", LOCAL, {}),
        ("distilbert", {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2}, {}),
        ("llama", {"num_key_value_heads": 1}, {"attention": "native"}),
        ("qwen3", {"num_key_value_heads": 1}, {"attention": "causal", "padding_side": "left", "pooling": "last"}),
        ("qwen3", {"num_key_value_heads": 1}, {"attention": "bidirectional"}),
        ("mistral", {"sliding_window": 6}, {"attention": "causal"}),
        ("mistral", {"sliding_window": 6}, {"attention": "bidirectional"}),
        ("gemma3_text", WINDOW, {"attention": "native"}),
        ("gemma3_text", WINDOW | {"use_bidirectional_attention": True}, {"attention": "native"}),
        ("llama4_text", {}, {"attention": "bidirectional"}),
        ("deepseek_v3", {}, {"attention": "causal"}),
    ],
)
def test_a_row_equals_the_padded_chunk(folders, family, changes, options):
    """Positions, windows, heads in groups, wider keys than values: vectors and gradients to the rounding of fp32."""
    assert_same(*map(vectors_and_gradient, both(folders(family, **changes), **options)))


@pytest.mark.parametrize("attention", ["native", "causal", "bidirectional"])
def test_in_bf16_too(folders, attention):
    models = both(folders("qwen3", num_key_value_heads=1), attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        plain, row = (vectors_and_gradient(model)[-1].double() for model in models)
    assert torch.cosine_similarity(plain, row, dim=0) >= 0.9999


def test_layers_that_are_computed_again(folders):
    models = both(folders("qwen3"), attention="causal", gradient_checkpointing=True)
    assert_same(*(vectors_and_gradient(model.train()) for model in models))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mpnet", AFTER_PADDING, "a text's states depend on what else is in its row"),
        ("t5", {}, "it takes no positions"),
        ("qwen3_next", {}, ".*row"),
    ],
)
def test_families_that_mix_texts_are_refused(folders, family, changes, reason):
    with pytest.raises(ModelError, match=f"cannot be packed: {reason}") as caught:
        embed(folders(family, **changes), packing=True, attn_implementation=VARLEN)
    assert "set model.packing=false" in str(caught.value)


def test_a_window_that_is_lost_is_noticed(folders, monkeypatch):
    """The self-test takes texts longer than the window."""
    monkeypatch.setattr(varlen, "_causal_and_reach", lambda module, is_causal, window: (True, None))
    with pytest.raises(ModelError, match="MistralModel cannot be packed"):
        embed(folders("mistral", sliding_window=6), packing=True, attention="causal", attn_implementation=VARLEN)


def test_what_a_family_adds_to_its_scores_is_refused(folders, monkeypatch):
    monkeypatch.setattr(varlen, "_FAMILY_TERMS", ("scaling_of_its_own",))
    module = SimpleNamespace(is_causal=True)
    with pytest.raises(ValueError, match="attention with scaling_of_its_own cannot be packed"):
        rows = [torch.zeros(1, 1, 2, 8)] * 3
        place_S = end_P = torch.tensor([0, 2], dtype=torch.int32)
        varlen.attend(module, *rows, None, cu_seq_lens_q=end_P, row_place_S=place_S, scaling_of_its_own=1.0)


def test_a_gradient_that_is_wrong_is_noticed(folders, monkeypatch):
    right = varlen.attend_apart
    monkeypatch.setattr(varlen, "attend_apart", lambda query, *rest: right(query.detach(), *rest))
    with pytest.raises(ModelError, match="cannot be packed"):
        embed(folders("bert"), packing=True, attn_implementation=VARLEN)


@pytest.mark.parametrize("asked", ["auto", True])
def test_on_a_gpu_rows_are_chosen_and_the_choice_is_said(folders, monkeypatch, caplog, asked):
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    with caplog.at_level(logging.INFO, "embedsmith"):
        model = embed(folders("bert"), packing=asked)
    assert model.packing
    assert model.backbone.config._attn_implementation == VARLEN
    assert str(model.packs) == (
        "on (attention alone is padded, proven on this model; not through torch's varlen attention, flex attention: "
        "there is no GPU)"
    )
    assert [r.message for r in caplog.records if "packing" in r.message] == [f"packing: on, {model.packs.why}"]
    np.testing.assert_allclose(model.encode(TEXTS), embed(folders("bert")).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "options", "why"),
    [
        ("mpnet", AFTER_PADDING, {}, "MPNetModel takes no attention but its own"),
        ("qwen3", {}, {"attention": "softmask"}, "packing under attention=softmask"),
        ("bert", {}, {"attn_implementation": "sdpa"}, "model.attn_implementation=sdpa was asked for"),
    ],
)
def test_where_it_cannot_padding_is_computed_and_the_reason_said(
    folders, monkeypatch, caplog, family, changes, options, why
):
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    model = embed(folders(family, **changes), **options)
    assert not model.packing
    assert why in str(model.packs)
    assert model.backbone.config._attn_implementation == ("eager" if family == "mpnet" else "sdpa")
    warned = [r.message for r in caplog.records if "packing: off" in r.message]
    assert len(warned) == (0 if "attn_implementation" in options else 1)


def test_a_family_of_its_own_attention_still_gets_a_mask(folders, monkeypatch):
    """`true` goes on to mean what it did, where torch's kernels cannot be put in."""
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    model = embed(folders("stablelm"), attention="causal", packing=True)
    assert model.packing
    assert model.backbone.config._attn_implementation == "sdpa"


def test_on_a_cpu_nothing_is_packed(folders):
    model = embed(folders("bert"))
    assert not model.packing
    assert str(model.packs) == "off (it pays on GPUs alone)"


def backbone_on(device, head, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    text = SimpleNamespace(head_dim=head, hidden_size=64, num_attention_heads=2)
    config = SimpleNamespace(get_text_config=lambda: text)
    return SimpleNamespace(device=torch.device(device), config=config)


@pytest.mark.parametrize(
    ("device", "head", "capability", "why"),
    [
        ("cuda", 128, (9, 0), None),
        ("cuda", None, (8, 0), None),
        ("cuda", 512, (9, 0), "heads of 512 numbers are wider than 256"),
        ("cuda", 64, (7, 5), "the GPU is older than Ampere"),
        ("cpu", 64, (9, 0), "there is no GPU"),
    ],
)
def test_heads_and_cards_that_no_kernel_takes(monkeypatch, device, head, capability, why):
    assert row_kernels.flash_lacks(backbone_on(device, head, capability, monkeypatch)) == why


def row_of(*lengths):
    end_P = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    places = [text * longest + token for text, length in enumerate(lengths) for token in range(length)]
    return TextRow(end_P, longest, torch.tensor(places), {})


def as_in_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return by_loop(query, key, value, cu_seq_q, is_causal, (-1, -1), query.shape[-1] ** -0.5)


def as_in_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return by_loop(query, key, value, cu_seq_q, window_size == (-1, 0), window_size, scale)


def as_in_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return by_loop(query, key, value, cu_seq_q, window_size == (-1, 0), window_size, scale)


def by_loop(query, key, value, end_P, is_causal, window, scale):
    """Flash attention's promise text by text: head sizes that are multiples of 8, as many heads of each kind, and a
    window of (left, right) tokens, -1 for no bound."""
    assert query.shape[-1] % 8 == 0
    assert query.shape == key.shape == value.shape
    rows = []
    for start, end in zip(end_P[:-1].tolist(), end_P[1:].tolist()):
        q, k, v = (one[start:end].transpose(0, 1) for one in (query, key, value))
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        left, right = (1000 if bound < 0 else bound for bound in window)
        sees = (ahead >= -left) & (ahead <= (0 if is_causal else right))
        rows.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale))
    return torch.cat([row.transpose(0, 1) for row in rows])


@pytest.mark.parametrize("kernel", [as_in_torch_2_10, as_in_torch_2_11, as_in_torch_2_13, None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [None, 2])
def test_every_torch_is_called_as_it_wants(monkeypatch, kernel, causal, reach):
    """Heads of 6 numbers (values: 4) in two groups; what a version lacks goes to the operator below it."""
    operator = []

    def below(query, key, value, end_P, end_K, longest, _, dropout, is_causal, debug, scale, **window):
        operator.append(dropout)
        window = (window["window_size_left"], window["window_size_right"])
        return (by_loop(query, key, value, end_P, is_causal, window, scale),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", below)
    known = frozenset() if kernel is None else frozenset(inspect.signature(kernel).parameters)
    monkeypatch.setattr(row_kernels, "_varlen_attn", kernel)
    monkeypatch.setattr(row_kernels, "_KNOWN", known)
    query, key, value = torch.randn(9, 4, 6), torch.randn(9, 2, 6), torch.randn(9, 2, 4)
    row, sight = row_of(4, 5), Sight(causal, reach, 0.3)
    expected = row_kernels.attend_apart(query, key, value, row, sight)
    found = ROW_KERNELS["torch"].compute(query, key, value, row, sight)
    torch.testing.assert_close(found, expected)
    assert operator == [0.0] * (kernel is None or (kernel is as_in_torch_2_10 and reach is not None))
    ROW_KERNELS["torch"].compute(query, key, value, row, replace(sight, dropout=0.1))
    assert operator[-1] == 0.1


class Shapes(TorchDispatchMode):
    """The shapes of all that operators give."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(one.shape) for one in (made if isinstance(made, tuple | list) else [made]) if hasattr(one, "shape")
        }
        return made


@pytest.mark.parametrize(
    ("pooling", "outputs"),
    [
        ("mean", ("dense", "middle", "sparse", "multivector")),
        ("cls", ("dense", "middle")),
        ("last", ("dense",)),
        ("weighted_mean", ("dense", "middle")),
        ("max", ("dense", "middle")),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_states_are_read_without_a_padded_copy(folders, pooling, outputs, side):
    torch.manual_seed(0)
    heads = {"heads": ["dense", *outputs[2:]], "multivector_dim": 8, "new_heads": True} if len(outputs) > 2 else {}
    plain, row = both(folders("xlm-roberta", pad_token_id=0), pooling=pooling, padding_side=side, **heads)
    row.load_state_dict(plain.state_dict())
    assert_same(vectors_and_gradient(plain, outputs), vectors_and_gradient(row, outputs))
    padded = row.tokenize([text for text in TEXTS if text]).pad(row.pad_id, left=side == "left")
    rows_NTH = (*padded.mask_NT.shape, 16)
    with Shapes() as shapes:
        row(padded, outputs)
    assert (1, int(padded.mask_NT.sum()), 16) in shapes.seen
    assert rows_NTH not in shapes.seen
    with Shapes() as shapes:
        row(padded, ("tokens",))
    assert rows_NTH in shapes.seen


@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "weighted_mean", "max"])
def test_poolings_of_a_row_equal_those_of_its_rows(pooling):
    """Any tokens may take part, and a text may have none."""
    torch.manual_seed(0)
    mask_NT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    padded = PaddedTokens(mask_NT.long(), mask_NT, mask_NT, mask_NT[:, 0])
    pool_NT = mask_NT & torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    found = []
    for form in (lambda state_SH: state_SH, padded.spread):
        state_SH = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        vector_ND = pooled(poolings.get(pooling), form(state_SH), pool_NT, padded)
        (vector_ND * torch.arange(12.0).view(4, 3)).sum().backward()
        found.append((vector_ND.detach(), state_SH.grad))
    for of_row, of_rows in zip(*found, strict=True):
        torch.testing.assert_close(of_row, of_rows)


def heads_of(*lengths):
    row = row_of(*lengths)
    given = {"cu_seq_lens_q": row.end_P, "max_length_q": row.longest, "row_place_S": row.place_S}
    torch.manual_seed(0)
    return [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)], given


def test_under_a_mask_of_everything_a_token_sees_its_text_whatever_the_module_says():
    rows, given = heads_of(3, 5)
    causal, open_ = (SimpleNamespace(is_causal=flag) for flag in (True, False))
    expected, _ = varlen.attend(open_, *rows, None, **given)
    found, _ = varlen.attend(causal, *rows, None, sliding_window=1, sees_all=True, **given)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(varlen.attend(causal, *rows, None, **given)[0], expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_kernels_get_the_numbers_of_autocast(monkeypatch, autocast):
    """Rotations make fp32 of queries and keys: kernels take 16 bits. In fp32 no kernel is called."""
    dtypes = []

    def kernel(query, key, value, *_rest):
        dtypes.extend((query.dtype, key.dtype, value.dtype))
        return query

    kernels = {"any": RowKernel("a kernel", kernel, lambda backbone: None)}
    monkeypatch.setattr(varlen, "ROW_KERNELS", kernels)
    rows, given = heads_of(3, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        varlen.attend(SimpleNamespace(is_causal=True), *rows, None, row_kernel="any", **given)
    assert dtypes == [torch.bfloat16] * 3 * autocast


@pytest.mark.parametrize("options", [{"pooling": "attention"}, {"pooling": "latent", "pooler": {"latents": 4}}])
def test_other_poolings_get_a_padded_copy(folders, tmp_path, options):
    torch.manual_seed(0)
    embed(folders("bert"), **options).save(tmp_path / "saved")
    assert_same(*map(vectors_and_gradient, both(str(tmp_path / "saved"), pooling=None)))


def test_many_cls(tmp_path):
    from tests.tinybert import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(len(tiny_tokenizer()), initializer_range=0.3)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plain, row = both(str(tmp_path), pooling="cls", mcls=3, max_length=24)
    np.testing.assert_allclose(row.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)


def test_a_batch_that_is_not_packed_is_computed_as_under_sdpa(folders):
    options = {"attention": "causal", "packing": False}
    expected = embed(folders("mistral", sliding_window=6), **options)
    found = embed(folders("mistral", sliding_window=6), **options, attn_implementation=VARLEN)
    assert (found.encode(TEXTS) == expected.encode(TEXTS)).all()


@pytest.fixture
def eager(monkeypatch):
    """Graphs without their kernels, counted."""
    graphs, real = [], torch.compile

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **how: real(call, **how, backend=backend))
    torch._dynamo.reset()
    return graphs


def test_one_graph_serves_rows_of_all_sizes(folders, eager, monkeypatch):
    path = folders("qwen3", num_hidden_layers=1)
    options = {"attention": "causal", "packing": True, "attn_implementation": VARLEN}
    plain, model = embed(path, attention="causal"), embed(path, **options, compile=True)
    sizes = []

    def noted(*given):
        row = packing.packed(*given)
        sizes.append(row["input_ids"].shape[1])
        return row

    monkeypatch.setattr("embedsmith.models.embedder.packed", noted)
    for count in (2, 3, 5, 9, 14):
        texts = ["the old tree ran"[: 3 + (5 * place) % 13] for place in range(count)]
        vectors = [one(one.tokenize(texts).pad(one.pad_id))["dense"].vector_ND for one in (plain, model)]
        torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-5)
        for vector in vectors:
            vector.sum().backward()
    assert len(eager) == 1
    assert all(size % packing.BUCKET == 0 for size in sizes)
    assert len(set(sizes)) > 1


def test_a_model_that_cannot_be_compiled_runs_without(folders, monkeypatch, caplog):
    real = torch.compile

    def backend(_graph, _inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda call, **how: real(call, **how, backend=backend))
    torch._dynamo.reset()
    path = folders("bert", num_hidden_layers=1)
    model = embed(path, compile=True)
    np.testing.assert_allclose(model.encode(TEXTS), embed(path).encode(TEXTS), atol=1e-6)
    said = [r.message for r in caplog.records if r.message.startswith("compile: off, BertModel cannot be compiled")]
    assert len(said) == 1
    assert "no such instruction" in said[0]
