"""What a training step dispatches, counted by torch's profiler: it depends on layers and chunks, and on no number of
texts."""

from collections import Counter
from dataclasses import replace

import pytest
from torch.profiler import ProfilerActivity, profile

from embedsmith.core.recipe import parse
from embedsmith.models.varlen import VARLEN
from embedsmith.train import Recipe, loop
from embedsmith.train.build import make_accelerator
from embedsmith.train.step import Memory

WHOLE = Memory(10**6)


@pytest.fixture
def step(tree):
    """Builds a run whose second step is profiled: how often each operator was dispatched, and the step's output."""

    def run(memory=WHOLE, rows=8, **model):
        how = {"packing": True, "attn_implementation": VARLEN}
        tree["data"] = [tree["data"][0] | {"batch_size": rows}]
        recipe = parse(Recipe, tree | {"model": tree["model"] | how | model})
        made = loop.build(recipe, make_accelerator(recipe))
        made.memory, made.deferred = replace(memory, packed=True), True
        loop.update(made, made.feed.draw(0))
        draw = made.feed.draw(1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            output, _, _ = loop.update(made, draw)
        counts = {e.key.removeprefix("aten::"): e.count for e in profiler.key_averages() if e.key.startswith("aten::")}
        return Counter(counts), output, len(made.memory.plan(draw[0].length_N))

    return run


def test_a_step_of_one_chunk_dispatches_what_its_layers_need(step):
    """Products are counted by hand: six of a layer, each once forward and twice backward, and the scores."""
    one, output, chunks = step(layers=1)
    two, _, _ = step(layers=2)
    many, _, _ = step(layers=1, rows=24)
    assert (chunks, output.replayed_chunks) == (1, 0)
    assert output.tokens == output.padded_tokens, "no padding is computed"
    updates = [one[name] for name in ("_foreach_norm", "_foreach_mul_", "_fused_adamw_")]
    assert updates == [1, 1, 2], "one norm, one product to clip, and one update a group of weights"
    assert two["addmm"] - one["addmm"] == 6
    assert two["mm"] - one["mm"] == 12
    assert two["scaled_dot_product_attention"] - one["scaled_dot_product_attention"] == 1
    assert all(many[name] == one[name] for name in ("addmm", "mm", "native_layer_norm", "embedding", "_fused_adamw_"))
    assert two.total() - one.total() <= 1000, "all that is dispatched, views and copies among it"
    assert max(one.total(), many.total()) <= 2400


def test_every_chunk_pays_for_all_of_it_again_and_a_replayed_one_twice(step):
    whole, _, _ = step()
    kept, _, chunks = step(memory=Memory(60))
    replayed, output, _ = step(memory=Memory(60, 1))
    assert chunks > 2
    assert output.replayed_chunks == chunks - 1
    for name in ("embedding", "native_layer_norm"):
        assert kept[name] == chunks * whole[name]
        assert replayed[name] == kept[name] + (chunks - 1) * whole[name]
    assert (kept["_fused_adamw_"], whole["_fused_adamw_"]) == (2, 2), "once a group of weights"
