"""The thread between callers and a model: order, turns, a bounded queue, failures, and who may share a batch."""

import itertools
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from embedsmith.serve import batching
from embedsmith.serve.batching import Batcher, BusyError, RetiredError
from embedsmith.serve.model import Model
from tests.models.tiny import TEXTS, embedder


@dataclass
class Items:
    """Rows that are the items themselves."""

    values: list

    def rows(self, index):
        return Items([self.values[row] for row in index])

    @classmethod
    def join(cls, parts):
        return cls([value for part in parts for value in part.values])


class Slow:
    """Gives items back; waits at the first batch until it is let go. Fails at the item 'bad'."""

    def __init__(self):
        self.batches, self.started, self.go = [], threading.Event(), threading.Event()

    def __call__(self, items, kind):
        self.batches.append((list(items), kind))
        self.started.set()
        assert self.go.wait(10)
        if "bad" in items:
            raise ValueError("bad item")
        return Items(list(items))


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.go.set()


def submit(batcher, *values, kind=None, cost=1):
    return batcher.submit(values, [cost] * len(values), kind)


def test_callers_share_batches_and_each_gets_its_own_rows_in_order(slow):
    batcher = Batcher(slow, "test", 100)
    first = submit(batcher, "first")
    assert slow.started.wait(10)
    callers = [submit(batcher, *(f"{caller}-{n}" for n in range(caller + 1))) for caller in range(5)]
    other = submit(batcher, "other", kind="sparse")
    assert batcher.waiting == 16
    slow.go.set()
    assert first.result(10).values == ["first"]
    for caller, future in enumerate(callers):
        assert future.result(10).values == [f"{caller}-{n}" for n in range(caller + 1)]
    assert other.result(10).values == ["other"]
    assert [sorted(items) for items, _ in slow.batches] == [
        ["first"],
        sorted(f"{caller}-{n}" for caller in range(5) for n in range(caller + 1)),
        ["other"],
    ]
    assert batcher.waiting == batcher._waiting_tokens == 0


def test_a_long_list_does_not_hold_up_a_short_one(slow, monkeypatch):
    monkeypatch.setattr(batching, "_MOST", 512)
    batcher = Batcher(slow, "test", 10_000)
    submit(batcher, "first")
    assert slow.started.wait(10)
    submit(batcher, *range(100), cost=100)
    short = submit(batcher, "short", cost=100)
    slow.go.set()
    assert short.result(10).values == ["short"]
    assert slow.batches[1][0] == [0, "short", 1, 2, 3, 4]


@pytest.mark.parametrize(("callers", "together"), [(12, 10), (32, 20), (100, 40)])
def test_in_a_crowd_a_batch_is_larger(slow, monkeypatch, callers, together):
    ticks = itertools.count()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10_000))
    batcher = Batcher(slow, "test", 10_000)
    submit(batcher, "first")  # a token a tick: 1,000 of them in a tenth of a second
    assert slow.started.wait(10)
    futures = [submit(batcher, caller, cost=100) for caller in range(callers)]
    slow.go.set()
    assert [future.result(10).values for future in futures] == [[caller] for caller in range(callers)]
    assert len(slow.batches[1][0]) == together


def test_the_queue_is_bounded_and_says_when_to_come_again(slow):
    batcher = Batcher(slow, "test", 4)
    submit(batcher, "first")
    assert slow.started.wait(10)
    assert batcher.waiting == 0
    long = submit(batcher, *range(6))  # more than may wait, and nobody waits
    batcher._tokens_a_second = 2.0
    with pytest.raises(BusyError, match="6 texts are waiting") as busy:
        submit(batcher, "late")
    assert busy.value.seconds == 3
    slow.go.set()
    assert long.result(10).values == list(range(6))
    assert submit(batcher, "now").result(10).values == ["now"]


def test_the_failure_of_one_is_no_others(slow):
    batcher = Batcher(slow, "test", 100)
    submit(batcher, "first")
    assert slow.started.wait(10)
    good, bad = submit(batcher, "a", "b"), submit(batcher, "c", "bad")
    slow.go.set()
    assert good.result(10).values == ["a", "b"]
    with pytest.raises(ValueError, match="bad item"):
        bad.result(10)
    assert submit(batcher, "on").result(10).values == ["on"]
    assert batcher.waiting == 0


def test_what_nobody_waits_for_is_not_computed(slow):
    batcher = Batcher(slow, "test", 100)
    submit(batcher, "first")
    assert slow.started.wait(10)
    gone, kept = submit(batcher, "gone"), submit(batcher, "kept")
    assert gone.cancel()
    slow.go.set()
    assert kept.result(10).values == ["kept"]
    assert [items for items, _ in slow.batches] == [["first"], ["kept"]]
    assert batcher.waiting == 0


def test_closing_computes_what_was_taken_and_takes_no_more(slow):
    batcher = Batcher(slow, "test", 100)
    futures = [submit(batcher, n) for n in range(3)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._closed:
        time.sleep(0.01)
    with pytest.raises(RetiredError):
        submit(batcher, "late")
    slow.go.set()
    closing.join(10)
    assert [future.result(0).values for future in futures] == [[0], [1], [2]]


@pytest.mark.parametrize(("kind", "pooling", "padding"), [("bert", "mean", "right"), ("llama", "last", "left")])
def test_a_vector_does_not_depend_on_who_shares_its_batch(kind, pooling, padding, tmp_path):
    heads = ("dense", "sparse", "multivector")
    model = embedder(tmp_path, kind, pooling=pooling, padding_side=padding, heads=heads)
    batches = []
    served = Model("m", model, 1000, on_batch=lambda texts, tokens, seconds: batches.append(texts))
    texts = [text for text in TEXTS if text]
    alone = [served.submit([text], "document", heads, alone=True).result(10).reps for text in texts]
    assert batches == [1] * len(texts)
    with batching._COMPUTING:
        blocked = served.submit(["blocks the thread"], "document", heads)
        while served.batcher.waiting:
            time.sleep(0.001)
        futures = [served.submit([text], "document", heads) for text in reversed(texts)]
    together = [future.result(10).reps for future in reversed(futures)]
    assert blocked.result(10)
    assert batches[-1] == len(texts)
    for text, one, shared in zip(texts, alone, together, strict=True):
        assert np.abs(one["dense"].vector_ND.numpy() - model.encode([text])).max() < 1e-6
        for head in heads:
            score = shared[head].paired(one[head]) if head != "dense" else one[head].vector_ND - shared[head].vector_ND
            expected = one[head].paired(one[head]) if head != "dense" else np.zeros(1)
            assert np.abs(np.asarray(score) - np.asarray(expected)).max() < 1e-6
    served.batcher.close()
