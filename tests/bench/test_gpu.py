"""The bench of GPUs, rehearsed on a CPU: every part gives its figures; what fails or is late leaves what it had."""

import json
import re

import pytest
import torch
from bench import gpu, gpu_parts
from bench.common import write_json

from tests.bench import slow_parts

FIGURES = {
    "gradients": ["causal, grouped queries (Qwen3), float32"],
    "search": ["own_over_torch", "same_documents"],
    "minilm": ["embedsmith_4", "embedsmith_8"],
    "bert": ["embedsmith"],
    "decoder": ["full", "lora", "lora_over_full"],
    "m3": ["dense", "three_heads", "three_heads_over_dense"],
    "caching": ["batch_4", "batch_16", "time_a_text_ratio"],
    "encode": ["minilm", "bert"],
}


@pytest.fixture
def alone(monkeypatch):
    """Without peers, whose trainer takes seconds to start."""
    monkeypatch.setattr(gpu_parts, "installed", lambda package: False)


@pytest.mark.parametrize("part", gpu.LIMITS)
def test_every_part_gives_its_figures(part, alone, tmp_path):
    found = gpu.measured([part], None, True, tmp_path / "gpu.json")
    assert "error" not in found[part], found[part]
    assert set(FIGURES[part]) <= set(found[part])
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    if part == "search":
        assert found[part]["same_documents"] > 0.99
    if part == "minilm":
        assert found[part]["embedsmith_4"]["waits_a_step"] is None, "there is no card"
        assert found[part]["embedsmith_4"]["kernel"] == "none: padded"
    if part == "gradients":
        assert found[part]["bidirectional (BERT), bfloat16, flex"] == "not here: there is no GPU"
        assert found[part]["causal, grouped queries (Qwen3), float32"]["cosine"] > 1 - 1e-5
    assert f"| {part} |" in gpu.table(found) or part in ("minilm", "bert", "encode"), "those have figures beside peers"


def test_the_parts_and_their_limits_agree():
    assert set(gpu.LIMITS) == set(gpu_parts.PARTS) == set(FIGURES)
    assert sum(gpu.LIMITS.values()) <= 300, "five minutes"


@pytest.mark.parametrize(
    ("work", "limit", "error"), [(slow_parts.slow, 1, "stopped after 1 s"), (slow_parts.broken, 60, "ended with 3")]
)
def test_a_part_that_is_late_or_dies_leaves_what_it_had(work, limit, error, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ways_to_start", lambda: gpu.multiprocessing.get_context("forkserver"))
    write_json(tmp_path / "figures.json", {"first": 1})
    made = gpu.limited("m3", limit, {"folder": str(tmp_path), "model": None, "tiny": True}, work=work)
    assert (made["first"], made["error"]) == (1, error)


@pytest.mark.parametrize(("card_works", "way"), [(True, "forkserver"), (False, "spawn")])
def test_where_a_forked_process_cannot_use_the_card_parts_start_from_nothing(card_works, way, monkeypatch):
    server = gpu.multiprocessing.context.ForkServerContext  # one for all tests of this process: it stays as it is
    monkeypatch.setattr(server, "set_forkserver_preload", lambda context, modules: None)
    monkeypatch.setattr(gpu, "touch_card", slow_parts.nothing if card_works else slow_parts.no_card)
    assert gpu.ways_to_start.__wrapped__().get_start_method() == way


def test_a_part_that_raises_leaves_what_it_had(tmp_path):
    def run(bench):
        bench.record("first", 1)
        raise RuntimeError("no kernel\nand more")

    made = gpu.child("m3", str(tmp_path), None, True, run=run)
    assert (made["first"], made["error"]) == (1, "RuntimeError: no kernel")


def test_a_profile_names_kinds_of_costs(alone, capsys):
    gpu.profile("search", None, True)
    assert "copies and casts" in capsys.readouterr().out
    gpu_parts.profiled("a product", lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    assert re.search(r"a product:.*\n.* 2  matrix products +aten::mm", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_bf16", "matrix products"),
        ("flash_fwd_kernel", "attention"),
        ("vectorized_elementwise_kernel", "element by element"),
        ("Memcpy DtoH", "copies and casts"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("unheard of", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert gpu_parts.kind_of(kernel) == kind


def test_a_figure_is_held_against_its_target():
    found = {"decoder": {"full": {"mfu": 0.4, "peak_GiB": 30.0}}, "gradients": {"causal": {"error": "none"}}}
    found["gradients"]["causal, bfloat16"] = {"cosine": 0.99995}
    lines = gpu.table(found).splitlines()[2:]
    assert lines == [
        "| decoder | full.mfu | >= 0.5 | 0.4 (not reached) |",
        "| decoder | full.peak_GiB | <= 40 | 30.0 |",
        '| gradients | causal | cosine >= 1 - 1e-05 | {"error": "none"} (not reached) |',
        '| gradients | causal, bfloat16 | cosine >= 1 - 0.0001 | {"cosine": 0.99995} |',
    ]
