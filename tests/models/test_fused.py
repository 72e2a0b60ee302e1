"""Liger's kernels by a stand-in that is installed for a test: they need a GPU and triton."""

import logging
import sys
from types import MethodType, ModuleType

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from embedsmith.models.fused import fuse_kernels
from tests.models.families import tiny


@pytest.fixture
def liger(monkeypatch):
    """What liger does to a family: norms of the instance, classes of the module, and its rotation. `factor` makes the
    norms wrong, `fail` raises."""
    told = {"factor": 1.0, "fail": None, "calls": []}

    def apply(model, **options):
        told["calls"].append(options)
        modeling_qwen3.Qwen3RMSNorm = "LigerRMSNorm"
        modeling_qwen3.apply_rotary_pos_emb = lambda *given, **named: pytest.fail("a rotation for GPUs on a CPU")
        norm = model.norm
        plain = type(norm).forward
        norm.__dict__["forward"] = MethodType(lambda self, state: plain(self, state) * told["factor"], norm)
        if told["fail"]:
            raise told["fail"]

    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": apply}
    patches._apply_liger_kernel_to_instance = apply
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    for name in ("Qwen3RMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))  # put back afterwards
    return told


IDS = torch.arange(8, 16)[None]


def test_kernels_that_agree_stay_in_the_model_and_nowhere_else(liger, caplog):
    norm_class, rotation = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.apply_rotary_pos_emb
    model = tiny("qwen3")
    before = model(IDS).last_hidden_state
    with caplog.at_level(logging.INFO, "embedsmith"):
        assert fuse_kernels(model) == "on (liger-kernel, proven on this model)"
    assert liger["calls"] == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert "forward" in model.norm.__dict__
    assert modeling_qwen3.Qwen3RMSNorm is norm_class
    assert modeling_qwen3.apply_rotary_pos_emb is not rotation  # liger's where tensors are on a GPU
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert [r.message for r in caplog.records] == ["fused kernels: on, liger-kernel, proven on this model"]
    again = modeling_qwen3.apply_rotary_pos_emb
    fuse_kernels(tiny("qwen3"))
    assert modeling_qwen3.apply_rotary_pos_emb is again


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"factor": 1.5}, "its states or gradients differ"),
        ({"factor": float("nan")}, "its states or gradients differ"),
        ({"fail": RuntimeError("0 active drivers\n([])")}, "0 active drivers"),
    ],
)
def test_kernels_that_do_not_are_taken_out_and_it_is_said(liger, caplog, told, reason):
    liger |= told
    norm_class, rotation = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.apply_rotary_pos_emb
    model = tiny("qwen3")
    before = model(IDS).last_hidden_state
    assert fuse_kernels(model) == f"off ({reason})"
    assert [r.message for r in caplog.records] == [
        f"fused kernels: off, liger-kernel does not fit Qwen3Model: {reason}"
    ]
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert (modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.apply_rotary_pos_emb) == (norm_class, rotation)


def test_a_family_that_liger_does_not_know_is_left_alone(liger, caplog):
    assert fuse_kernels(tiny("mistral")) == "off (liger-kernel does not know MistralModel)"
    assert not liger["calls"]
    assert not caplog.records


def test_without_liger_nothing_happens(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    assert fuse_kernels(tiny("qwen3")) == "off (liger-kernel is not installed)"
    assert not caplog.records
