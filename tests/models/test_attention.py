"""The attention switch on many families, judged by what tokens see and not by what flags say."""

import pytest
import torch

from embedsmith.core.errors import ModelError
from embedsmith.models import attention as attention_module
from embedsmith.models.attention import Attention, SoftMask, prepare_config, switch_attention
from tests.models.families import FAMILIES, NO_SDPA, tiny

CASES = [
    (f, i) for f in FAMILIES for i in ("sdpa", "eager") if f != "qwen3_next" and not (i == "sdpa" and f in NO_SDPA)
]


def states(backbone, attention, id_NT, mask_NT):
    mask = attention.mask(mask_NT, backbone.config._attn_implementation, backbone.dtype)
    with torch.no_grad():
        return backbone(input_ids=id_NT, attention_mask=mask, use_cache=False).last_hidden_state


def texts():
    id_NT = torch.randint(8, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    mask_NT = torch.ones(2, 9, dtype=torch.bool)
    mask_NT[1, 6:] = False
    return id_NT, mask_NT


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_bidirectional_attention_of_every_family(family, implementation):
    """An early state depends on the last token, alone and in a padded batch; both give the same states."""
    backbone = tiny(family, implementation, "bidirectional")
    achieved = switch_attention(backbone, "bidirectional")
    id_NT, mask_NT = texts()
    together = states(backbone, achieved, id_NT, mask_NT)
    changed_NT = id_NT.clone()
    changed_NT[0, 8], changed_NT[1, 5] = 7, 7
    changed = states(backbone, achieved, changed_NT, mask_NT)
    assert ((together - changed).abs()[:, 0].amax(-1) > 1e-6).all()
    alone = states(backbone, achieved, id_NT[1:, :6], mask_NT[1:, :6])
    torch.testing.assert_close(together[1:, :6], alone, rtol=0, atol=1e-4)
    changed_alone = states(backbone, achieved, changed_NT[1:, :6], mask_NT[1:, :6])
    assert (alone - changed_alone).abs()[:, 0].max() > 1e-6


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_causal_attention_needs_no_mask(family, implementation):
    """What the speed of causal batches rests on: real tokens give the same states without any mask."""
    backbone = tiny(family, implementation, "causal")
    achieved = switch_attention(backbone, "causal")
    id_NT, mask_NT = texts()
    assert achieved.causal
    assert achieved.mask(mask_NT, implementation, torch.float32) is None
    with torch.no_grad():
        masked = backbone(input_ids=id_NT, attention_mask=mask_NT.long(), use_cache=False).last_hidden_state
    torch.testing.assert_close(states(backbone, achieved, id_NT, mask_NT)[mask_NT], masked[mask_NT], rtol=0, atol=1e-5)


def test_native_is_measured_not_changed():
    assert switch_attention(tiny("qwen3"), "native") == Attention("native", "native", causal=True)
    backbone = tiny("qwen3", mode="bidirectional")
    assert switch_attention(backbone, "native") == Attention("native", "native", causal=False)


def test_how_each_family_gets_there():
    how = {
        name: switch_attention(tiny(name, mode="bidirectional"), "bidirectional").how for name in ("qwen3", "stablelm")
    }
    assert how == {"qwen3": "config", "stablelm": "modules"}
    assert switch_attention(tiny("llama4_text", mode="bidirectional"), "bidirectional").how == "mask4d"


def test_flags_on_modules_alone_are_caught():
    """The popular recipe, which is bidirectional until a row is padded: the self-test does not believe it."""
    backbone = tiny("qwen3")
    for module in backbone.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False
    found = attention_module.probe(backbone, attention_module._call(backbone, Attention("bidirectional", "config")))
    assert not found.bidirectional
    assert not found.causal


def test_a_family_with_recurrent_layers_names_them():
    backbone = tiny("qwen3_next", mode="bidirectional")
    with pytest.raises(ModelError, match=r"the layers 0 stay causal \(linear_attention\)") as caught:
        switch_attention(backbone, "bidirectional")
    assert "partial_attention=true" in str(caught.value)
    assert switch_attention(backbone, "bidirectional", allow_partial=True).causal_layers == (0,)


def test_an_encoder_has_no_causal_form():
    from tests.models.tiny import backbone

    with pytest.raises(ModelError, match="cannot be made causal"):
        switch_attention(backbone("bert"), "causal")


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(attention_module.transformers, "__version__", "5.1.0")
    with pytest.raises(ModelError, match="would ignore it silently"):
        prepare_config(None, "bidirectional")


def test_kernels_without_masks_are_refused():
    with pytest.raises(ModelError, match="takes no mask"):
        Attention(how="mask4d").mask(torch.ones(1, 2, dtype=torch.bool), "flash_attention_2", torch.float32)


FRACTIONS = (0, 0.1, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("axis", "ranks", "means"),
    [
        ("row", [16, 15, 12, 8, 4, 1], [0, 0.433, 0.742, 0.940, 0.994, 1]),
        ("col", [16, 16, 13, 9, 5, 1], [0, 0.168, 0.407, 0.722, 0.922, 1]),
    ],
)
def test_softmask_goes_from_causal_to_all_ones(axis, ranks, means):
    soft, mask_NT = SoftMask(axis=axis), torch.ones(1, 16, dtype=torch.bool)
    upper = torch.ones(16, 16).triu(1).bool()
    found = [soft.weight(mask_NT, soft.alpha(fraction))[0] for fraction in FRACTIONS]
    assert [int(torch.linalg.matrix_rank(m.double())) for m in found] == ranks
    assert [round(float(m[upper].mean()), 3) for m in found] == pytest.approx(means, abs=1e-3)
    assert torch.equal(found[0], torch.ones(16, 16).tril())


def test_softmask_schedules():
    assert [SoftMask(schedule=s).alpha(0.5) for s in ("linear", "accelerating", "decelerating")] == [0.5, 0.25, 0.75]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
def test_softmask_at_its_ends_is_causal_and_bidirectional(implementation, left):
    id_NT, mask_NT = texts()
    if left:
        mask_NT = mask_NT.flip(1)
    place_NT = (mask_NT.cumsum(1) - 1).clamp_min(0)
    soft = SoftMask()
    for mode, alpha in (("causal", 0.0), ("bidirectional", 1.0)):
        backbone = tiny("qwen3", implementation, mode)
        switch_attention(backbone, mode)
        with torch.no_grad():
            plain = backbone(input_ids=id_NT, attention_mask=mask_NT.long(), position_ids=place_NT).last_hidden_state
            bias = soft.bias(mask_NT, alpha, torch.float32)
            made = backbone(input_ids=id_NT, attention_mask=bias, position_ids=place_NT).last_hidden_state
        torch.testing.assert_close(made[mask_NT], plain[mask_NT], rtol=0, atol=1e-5)
