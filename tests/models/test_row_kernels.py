"""Which kernel computes the attention of a row: flash attention where it is installed, flex attention where no flash
kernel can; each proven on the model itself, here on a CPU by stand-ins that keep the packages' promises."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from embedsmith.core.errors import ModelError
from embedsmith.models import packing, row_kernels
from embedsmith.models.flex_rows import text_blocks
from embedsmith.models.row_kernels import ROW_KERNELS, Sight, attend_apart
from tests.models.test_varlen import (
    LOCAL,
    WINDOW,
    assert_same,
    by_loop,
    embed,
    folders,  # noqa: F401  (a fixture)
    row_of,
    vectors_and_gradient,
)

NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}


@pytest.fixture
def a_card(monkeypatch):
    """Rows are tried as on a card, whose kind can be set; torch's own kernels are not there."""
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    monkeypatch.setattr(row_kernels, "flash_lacks", lambda backbone: None)
    kind = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: kind["capability"])
    row_kernels._function_of.cache_clear()
    yield kind
    row_kernels._function_of.cache_clear()


@pytest.fixture
def flex(monkeypatch):
    """Flex attention without its compiler, which on a CPU has no backward pass: what it would be compiled from has."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *given: None)
    monkeypatch.setitem(ROW_KERNELS, "flex", replace(ROW_KERNELS["flex"], lacks=lambda backbone: None))


ROWS = [(1,), (5, 300), (128, 128, 128), (1, 127, 129, 255, 1), (40, 3, 700, 2, 2, 90), (3,) * 100, (513, 128)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [None, 1, 127, 128, 400])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(causal, reach):
    for lengths in ROWS:
        text_S = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        found = text_blocks(text_S, causal, reach)
        wanted = create_block_mask(found.mask_mod, None, None, len(text_S), len(text_S), device="cpu")
        for name in ("kv", "full_kv", "q", "full_q"):
            count, other = (getattr(mask, f"{name}_num_blocks") for mask in (found, wanted))
            torch.testing.assert_close(count, other, msg=f"{name} of {lengths}")
            order, others = (getattr(mask, f"{name}_indices") for mask in (found, wanted))
            for row, length in enumerate(count.flatten().tolist()):
                assert order[0, 0, row, :length].tolist() == others[0, 0, row, :length].tolist()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [None, 2])
def test_flex_attention_equals_texts_apart(flex, causal, reach):
    """Heads in groups, and the gradient."""
    torch.manual_seed(0)
    row, sight = row_of(4, 1, 9, 3), Sight(causal, reach, 0.3)
    given = [torch.randn(17, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    made = []
    for compute in (attend_apart, ROW_KERNELS["flex"].compute):
        out_SXD = compute(*given, row, sight)
        made.append([out_SXD, *torch.autograd.grad((out_SXD * torch.arange(8.0)).sum(), given)])
    for expected, found in zip(*made, strict=True):
        torch.testing.assert_close(found, expected)
    assert list(row.blocks) == [(causal, reach)], "kept for the layers that follow"


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("bert", NO_DROPOUT, {}),
        ("modernbert", LOCAL, {}),
        ("qwen3", {"num_key_value_heads": 1}, {"attention": "causal", "padding_side": "left", "pooling": "last"}),
        ("mistral", {"sliding_window": 6}, {"attention": "bidirectional"}),
        ("gemma3_text", WINDOW, {"attention": "native"}),
    ],
)
def test_where_no_flash_kernel_can_flex_attention_does_and_the_line_says_why(
    folders,  # noqa: F811
    monkeypatch,
    flex,
    caplog,
    family,
    changes,
    options,
):
    caplog.set_level("INFO", "embedsmith")
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    path = folders(family, **changes)
    model = embed(path, **options)
    why = "through flex attention, proven on this model; not through torch's varlen attention: there is no GPU"
    assert str(model.packs) == f"on ({why})"
    assert [r.message for r in caplog.records if "packing" in r.message] == [f"packing: on, {why}"]
    assert model.packs.kernel == "flex"
    assert_same(*map(vectors_and_gradient, (embed(path, **options, packing=False), model)))


def test_flex_attention_drops_nothing_so_a_model_that_does_is_padded_there(folders, monkeypatch, flex):  # noqa: F811
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    model = embed(folders("bert"))
    assert model.packs.why.startswith("attention alone is padded, proven on this model")
    assert "flex attention: it drops no share of attention, as this model does while it trains" in model.packs.why
    row, sight = row_of(2, 3), Sight(True, None, 1.0, dropout=0.5)
    assert not ROW_KERNELS["flex"].takes(torch.bfloat16, sight.dropout)
    assert ROW_KERNELS["flex"].takes(torch.float32, 0.0)
    assert not ROW_KERNELS["torch"].takes(torch.float32, 0.0)
    assert row.blocks == {}


def package(monkeypatch, name, function):
    """Install a package of flash attention for a test."""
    made = ModuleType(name)
    made.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, name, made)


def as_in_flash_2(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    """What flash attention 2.8 promises: 16 bits, int32 bounds, heads in groups."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q >= int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
    calls.append("flash_attn")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return by_loop(query, key, value, cu_seqlens_q, causal, window_size, softmax_scale)


def as_in_flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    out = as_in_flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size
    )
    calls[-1] = "flash_attn_interface"
    return out, None


def without_sight(*given, causal=False, window_size=None, **more):
    return as_in_flash_2(*given, **more)


def without_a_card(*given, **more):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


calls: list[str] = []


@pytest.mark.parametrize(
    ("installed", "capability", "changes", "kernel", "why"),
    [
        ({"flash_attn_interface": as_in_flash_3, "flash_attn": as_in_flash_2}, (9, 0), {}, "flash3", None),
        ({"flash_attn_interface": as_in_flash_3, "flash_attn": as_in_flash_2}, (8, 0), {}, "flash2", "made for other"),
        ({"flash_attn": as_in_flash_2}, (9, 0), {}, "flash2", None),
        (
            {"flash_attn_interface": as_in_flash_3, "flash_attn": as_in_flash_2},
            *((9, 0), {"attention_dropout": 0.1}, "flash2", "flash attention 3: it drops no share of attention"),
        ),
        ({"flash_attn": without_sight}, (9, 0), {}, None, "flash attention 2: a text's states depend on what else"),
        (
            {"flash_attn": without_a_card},
            (9, 0),
            {},
            None,
            "flash attention 2: its code fails on a row (FlashAttention",
        ),
    ],
)
def test_flash_attention_that_is_installed_is_used_where_it_fits(
    folders,  # noqa: F811
    a_card,
    monkeypatch,
    installed,
    capability,
    changes,
    kernel,
    why,
):
    """By itself, the newest first; one that is wrong on this model is left, and it is said."""
    a_card["capability"] = capability
    for name, function in installed.items():
        package(monkeypatch, name, function)
    path = folders("qwen3", num_key_value_heads=1, **changes)
    model = embed(path, attention="causal")
    assert model.packs.kernel == kernel
    assert why is None or why in model.packs.why
    plain = embed(path, attention="causal", packing=False)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = (vectors_and_gradient(one)[-1].double() for one in (plain, model))
    assert torch.cosine_similarity(wanted, found, dim=0) >= 0.9999
    expected = {"flash3": ["flash_attn_interface"] * 2, "flash2": ["flash_attn"] * 2, None: []}[kernel]
    assert calls == expected, "one call a layer, and none in fp32"
    assert_same(*map(vectors_and_gradient, (plain, model)))
    assert calls == expected


def test_flash_attention_that_cannot_be_imported_is_said(folders, a_card, monkeypatch):  # noqa: F811
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c104cuda\nand more") if name == "flash_attn" else ModuleNotFoundError

    monkeypatch.setattr(row_kernels, "import_module", broken)
    model = embed(folders("qwen3"), attention="causal")
    assert "flash attention 2: flash_attn cannot be imported (undefined symbol: _ZN3c104cuda)" in model.packs.why
    assert "flash attention 3" not in model.packs.why, "that a package is not installed is no news"


def test_dropout_reaches_flash_attention_2_alone(a_card, monkeypatch):
    told = []
    package(monkeypatch, "flash_attn", lambda query, *given, **more: told.append(more) or query)
    package(monkeypatch, "flash_attn_interface", lambda query, *given, **more: told.append(more) or (query, None))
    rows, row = [torch.zeros(5, 1, 8)] * 3, row_of(2, 3)
    ROW_KERNELS["flash2"].compute(*rows, row, Sight(False, 4, 0.5, dropout=0.1))
    ROW_KERNELS["flash3"].compute(*rows, row, Sight(True, None, 0.5))
    assert told == [
        {"softmax_scale": 0.5, "causal": False, "window_size": (4, 4), "dropout_p": 0.1},
        {"softmax_scale": 0.5, "causal": True, "window_size": (-1, 0)},
    ]


def test_heads_that_are_too_wide_for_flash_go_through_flex(folders, monkeypatch, flex):  # noqa: F811
    """What a card says of heads of 512 numbers."""
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    lacks = lambda backbone: "heads of 512 numbers are wider than 256"
    monkeypatch.setitem(ROW_KERNELS, "torch", replace(ROW_KERNELS["torch"], lacks=lacks))
    model = embed(folders("qwen3", head_dim=512), attention="causal")
    assert model.packs.why.endswith("not through torch's varlen attention: heads of 512 numbers are wider than 256")
    assert model.packs.kernel == "flex"


def test_flex_attention_that_is_wrong_is_left_too(folders, monkeypatch, flex, caplog):  # noqa: F811
    """And where attention apart is wrong as well, padding is computed."""
    monkeypatch.setattr(packing, "_is_fast", lambda backbone: True)
    wrong = lambda query, key, value, row, sight: 0 * query
    monkeypatch.setitem(ROW_KERNELS, "flex", replace(ROW_KERNELS["flex"], compute=wrong))
    model = embed(folders("qwen3"), attention="causal")
    assert "flex attention: a text's states depend on what else is in its row" in model.packs.why
    monkeypatch.setattr("embedsmith.models.varlen.attend_apart", wrong)
    model = embed(folders("qwen3"), attention="causal")
    assert not model.packing
    assert "packing: off, padding is computed: Qwen3Model cannot be packed" in caplog.text
    with pytest.raises(ModelError, match="cannot be packed"):
        embed(folders("qwen3"), attention="causal", packing=True, attn_implementation="embedsmith_varlen")


def test_cards_without_bf16_are_tried_in_fp16(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert row_kernels.half_of(torch.device("cuda")) is dtype
    assert row_kernels.half_of(torch.device("cpu")) is torch.bfloat16
