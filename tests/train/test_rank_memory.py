"""What a rank is said to hold is what it holds, to the byte."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, BertConfig

from embedsmith.core.recipe import parse
from embedsmith.train import Recipe
from embedsmith.train.build import make_accelerator
from embedsmith.train.loop import build, update
from embedsmith.train.rank_memory import (
    WeightFacts,
    bytes_of_a_token,
    in_bytes,
    kept_for_backward,
    rank_memory,
    weight_facts,
)
from tests.ranks import on_ranks


def local(tensor):
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.numel() * part.element_size()


def held(tree, shard, ranks):
    """(weights, gradients, optimizer) of this rank after the gradients of a step, as they are and as they are said."""
    tree["train"] |= {"shard": shard, "log_with": []}
    recipe = parse(Recipe, tree)
    run = build(recipe, make_accelerator(recipe))
    facts = weight_facts(run.model, run.extras)
    update(run, run.feed.draw(0))  # the optimizer has a state, and the gradients are still there
    weights = [p for part in (run.model, run.extras) for p in part.parameters()]
    states = run.engine.optimizer.state.values()
    found = (
        sum(map(local, weights)),
        sum(local(p.grad) for p in weights if p.grad is not None),
        sum(local(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq")),
    )
    said = rank_memory(facts, shard=shard, ranks=ranks, optimizer="adamw", half=False)
    return found, (said.weights, said.gradients, said.optimizer), said.gathered


def test_whole_copies_hold_what_is_said(tree):
    found, said, gathered = held(tree, False, 1)
    assert (found, gathered) == (said, 0)


def test_the_first_of_two_shards_holds_what_is_said(tree, tmp_path):
    tree["data"] = tree["data"][:1]
    (found, said, gathered), _ = on_ranks(2, held, tmp_path, tree, True, 2)
    assert found == said
    assert 0 < gathered < 2 * sum(found)


def fact(*shape, trained=True, layer=None, spread=True, table=False):
    return WeightFacts(shape, 4, trained, layer, spread, table)


def test_shards_by_hand():
    facts = [fact(5, 4, table=True), fact(6, 4, layer=0), fact(3, 4, layer=1, trained=False), fact(2, 2, spread=False)]
    two = rank_memory(facts, shard=True, ranks=2, optimizer="adamw", half=True, activations=7)
    assert two.weights == 4 * (3 * 4 + 3 * 4 + 2 * 4 + 4)  # the first axis is cut, and rounded up
    assert two.gradients == 4 * (3 * 4 + 3 * 4 + 4)
    assert two.optimizer == 8 * (3 * 4 + 3 * 4 + 4)
    assert two.gathered == 4 * (2 * 20 + 2 * 24 + 24)  # what is outside of layers with its gradient, layers, a gradient
    assert two.casts == 2 * (24 + 12 + 4)  # a table is looked up
    assert rank_memory(facts, shard=True, ranks=2, optimizer="adamw", half=True, replayed_layers=True).casts == 2 * 28
    assert two.total == two.weights + two.gradients + two.optimizer + two.gathered + two.casts + 7
    zero = rank_memory(facts, shard="zero2", ranks=4, optimizer="adamw", half=False)
    whole = 20 + 24 + 12 + 4
    assert (zero.weights, zero.gradients, zero.optimizer) == (4 * whole, 4 * 48 + 4 * 12, 12 * 12)
    assert rank_memory(facts, shard=False, ranks=4, optimizer="adamw8bit", half=False).optimizer == 2 * 48


def test_what_a_forward_pass_keeps():
    linear, x = nn.Linear(8, 4), torch.ones(3, 8)
    assert kept_for_backward(lambda: torch.relu(linear(x)), linear.parameters()) == 4 * (3 * 8 + 3 * 4)


def test_two_layers_tell_of_eight():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32, vocab_size=30,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = AutoModel.from_config(config).train()

    def forward(rows):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=torch.ones(rows, 8, dtype=torch.long), attention_mask=torch.ones(rows, 8))

    one, two = (kept_for_backward(lambda rows=rows: forward(rows), model.parameters()) for rows in (1, 2))
    assert bytes_of_a_token(AutoModel, config, 8, False) == pytest.approx((two - one) / 8, rel=0.01)
    assert bytes_of_a_token(AutoModel, config, 8, True) < 0.3 * bytes_of_a_token(AutoModel, config, 8, False)


def test_bytes_for_people():
    assert [in_bytes(n) for n in (0, 999, 999.6, 1.5e9, 2e18)] == ["0 B", "999 B", "1 kB", "1.5 GB", "2,000 PB"]
