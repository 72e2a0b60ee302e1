"""The pipeline of windows: the next one is ready in time, memory that does not suffice is met with smaller chunks, and
however it ends no thread is left."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest
import torch

from embedsmith.core.ahead import one_ahead
from embedsmith.core.device import cpu_multiplies_bf16
from embedsmith.core.errors import DataError, ModelError
from embedsmith.core.reps import Dense
from embedsmith.core.tokens import TokenBatch, chunk_rows
from embedsmith.models import encode as module
from embedsmith.models.encode import WindowEncoder, chunks_of
from tests.models import tiny

TEXTS = [f"{text} {'fox ' * n}" for n in range(6) for text in tiny.TEXTS]


@pytest.fixture
def model(tmp_path):
    return tiny.embedder(tmp_path)


@pytest.fixture
def ahead(monkeypatch):
    """As beside a GPU: the next window is made in a thread."""
    monkeypatch.setattr(module, "works_ahead", lambda device: True)


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_next_window_is_made_while_one_is_used_and_no_more():
    made = [threading.Event() for _ in range(4)]

    def windows():
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in one_ahead(windows()):
        assert number == 3 or made[number + 1].wait(10), "the next is made without being asked for"
        assert not any(event.is_set() for event in made[number + 2 :]), "one ahead, not all"
    assert not ahead_threads()


def test_an_error_of_a_window_comes_in_its_place_and_the_thread_has_ended():
    def windows():
        yield 1
        raise DataError("broken")

    seen = []
    with pytest.raises(DataError, match="broken"):
        for number in one_ahead(windows()):
            seen.append(number)
    assert seen == [1]
    assert not ahead_threads()


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_vectors_are_those_of_a_plain_loop_bit_for_bit(model, monkeypatch, in_a_thread):
    monkeypatch.setattr(module, "works_ahead", lambda device: in_a_thread)
    monkeypatch.setattr(module, "BLOCK", 10)
    monkeypatch.setattr(module, "derive_workers", lambda device, chunks: 1)
    expected = np.zeros((len(TEXTS), 16), np.float32)
    for start in range(0, len(TEXTS), 10):
        tokens = model.tokenize(TEXTS[start : start + 10])
        for rows in chunk_rows(tokens.length_N, 1024, least_tokens=128):
            with torch.inference_mode():
                made = model(tokens.pad(model.pad_id, rows=rows))["dense"].vector_ND
            expected[start + rows] = made.numpy()
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    windows = [TEXTS[:20], TEXTS[20:30], TEXTS[30:]]  # the first is more than may be computed together
    parts = list(model.encode_windows(iter(windows)))
    assert [len(part) for part in parts] == [20, 10, 12]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


class SmallCard:
    """A model's forward pass on a card that holds so many padded tokens."""

    def __init__(self, model, room):
        self.forward, self.room, self.sizes = model.forward, room, []

    def __call__(self, padded, outputs=("dense",)):
        self.sizes.append(padded.id_NT.numel())
        if padded.id_NT.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(padded, outputs)


@pytest.mark.parametrize("workers", [1, 3])
def test_out_of_memory_halves_the_chunks_says_so_and_keeps_the_size(model, monkeypatch, caplog, workers):
    monkeypatch.setattr(module, "derive_workers", lambda device, chunks: workers)
    plain = model.encode(TEXTS)
    card = SmallCard(model, room=200)
    monkeypatch.setattr(model, "forward", card)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(model.encode(TEXTS), plain, atol=1e-6)
    assert max(card.sizes) > 200
    assert "out of memory at a chunk of" in caplog.text
    card.sizes.clear()
    np.testing.assert_allclose(model.encode(TEXTS), plain, atol=1e-6)
    assert max(card.sizes) <= 200, "the next call knows what fits"
    assert not model.training


def test_one_text_that_does_not_fit_is_named_by_its_length(model, monkeypatch):
    monkeypatch.setattr(model, "forward", SmallCard(model, room=20))
    with pytest.raises(ModelError, match=r"one text of \d\d tokens does not fit the memory of cpu\n.*max_length"):
        model.encode(TEXTS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_while_a_window_is_computed_ends_the_thread(model, ahead, monkeypatch, error):
    monkeypatch.setattr(module, "BLOCK", 5)
    calls, forward = count(), model.forward

    def failing(padded, outputs):
        if next(calls) == 2:
            assert ahead_threads()
            raise error
        return forward(padded, outputs)

    monkeypatch.setattr(model, "forward", failing)
    model.train()
    with pytest.raises(error):
        model.encode(TEXTS)
    assert not ahead_threads()
    assert model.training, "training goes on as it was"


def test_a_text_of_a_later_window_that_cannot_be_tokenised(model, ahead, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 5)
    with pytest.raises(DataError, match="broken Unicode"):
        model.encode([*TEXTS[:12], "\ud800"])
    assert not ahead_threads()


def test_on_a_card_a_window_is_launched_before_the_one_before_is_waited_for(monkeypatch):
    """With a card that is played: what is read is what its event says has arrived."""
    events = []

    class Event:
        def __init__(self):
            self.number = len([kind for kind, _ in events if kind == "launched"])

        def record(self, stream):
            events.append(("launched", self.number))

        def synchronize(self):
            events.append(("waited", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    engine = WindowEncoder(
        lambda tokens, rows: {"dense": Dense(torch.from_numpy(tokens.id_S[rows, None]).float())},
        torch.device("cuda"),
        chunk_tokens=2,
    )
    windows = [TokenBatch.from_rows([[3 * w], [3 * w + 1], [3 * w + 2]], [0] * 3, False) for w in range(3)]
    made = [reps["dense"].vector_ND[:, 0].tolist() for reps in engine.run(iter(windows))]
    assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    order = [("launched", 0), ("launched", 1), ("waited", 0), ("launched", 2), ("waited", 1), ("waited", 2)]
    assert events == order


def test_a_cpu_computes_with_all_cores_and_a_gpu_leaves_them_free():
    assert [module.works_ahead(torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [False, True, True]


def test_chunks_by_real_tokens_where_no_padding_is_computed():
    length_N, cuda = np.array([2, 9, 2, 2, 2, 1]), torch.device("cuda")
    assert [chunk.tolist() for chunk in chunks_of(length_N, 18, cuda, packing=True)] == [[1, 0, 2, 3, 4, 5]]
    assert [chunk.tolist() for chunk in chunks_of(length_N, 18, cuda, packing=False)] == [[1, 0], [2, 3, 4, 5]]


def test_on_a_cpu_short_texts_are_not_padded_to_a_long_one():
    length_N = np.array([10, 250, 12, 9, 240])
    chunks = {kind: chunks_of(length_N, 2048, torch.device(kind), False) for kind in ("cpu", "cuda")}
    assert [chunk.tolist() for chunk in chunks["cpu"]] == [[1, 4], [2, 0, 3]]
    assert len(chunks["cuda"]) == 1


def test_threads_of_chunks_stay_and_have_ended_what_they_do_when_one_fails():
    chunks = [np.array([n]) for n in range(8)]
    seen = [each for _ in range(3) for each in module._spread(lambda rows: threading.get_ident(), chunks, 2)]
    assert len(set(seen)) <= 2
    running, started = [], threading.Barrier(2)

    def compute(rows):
        if rows[0] < 2:
            started.wait(10)
        if rows[0] == 0:
            raise ZeroDivisionError
        running.append(int(rows[0]))
        time.sleep(0.05)
        running.remove(int(rows[0]))

    with pytest.raises(ZeroDivisionError):
        list(module._spread(compute, chunks, 2))
    assert running == []


def test_a_thread_of_chunks_has_one_core_however_late_its_first_chunk_comes():
    before, both = torch.get_num_threads(), threading.Barrier(2)

    def look():
        both.wait(10)
        return torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        pool = module._pool_of.__wrapped__(2, 0)
        assert torch.get_num_threads() == 2
        pool.submit(torch.get_num_threads).result()  # one works, the other does not yet
        torch.set_num_threads(3)
        assert [each.result() for each in (pool.submit(look), pool.submit(look))] == [1, 1]
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3
        pool.shutdown()
    finally:
        torch.set_num_threads(before)


def test_where_the_system_gives_no_more_threads_nothing_waits_for_ever(monkeypatch):
    start, left = threading.Thread.start, count()

    def refused(thread):
        if next(left) == 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    before, threads = set(threading.enumerate()), torch.get_num_threads()
    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        module._pool_of.__wrapped__(2, 0)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert torch.get_num_threads() == threads


def test_auto_says_what_it_chose(model, caplog):
    module._say_once.cache_clear()
    chosen = "bfloat16" if cpu_multiplies_bf16() else "float32"
    with caplog.at_level(logging.INFO):
        made = model.encode(TEXTS, dtype="auto")
    assert caplog.messages == [f"dtype=auto: computes in {chosen} on cpu"]
    np.testing.assert_array_equal(made, model.encode(TEXTS, dtype=chosen))


@pytest.mark.parametrize(("capable", "warnings"), [(False, 1), (True, 0), (None, 0)])
def test_bf16_on_a_processor_without_its_arithmetic_is_warned_of_once(model, monkeypatch, caplog, capable, warnings):
    module._warn_once.cache_clear()
    monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda: capable)
    for _ in range(2):
        model.encode(TEXTS[:3], dtype="bfloat16")
    assert len(caplog.messages) == warnings
    assert all("no arithmetic in bfloat16" in message for message in caplog.messages)


@pytest.mark.parametrize("capable", [True, False])
def test_bf16_on_a_card_without_its_arithmetic_is_warned_of_and_auto_takes_fp16(monkeypatch, caplog, capable):
    module._warn_once.cache_clear()
    module._say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "old card")
    card = torch.device("cuda:0")
    assert [module.settled_dtype("bfloat16", card) for _ in range(2)] == ["bfloat16"] * 2
    warned = "old card has no arithmetic in bfloat16, which is slower there than float16; give dtype=auto, or float16"
    assert caplog.messages == [warned] * (not capable)
    assert module.settled_dtype("auto", card) == ("bfloat16" if capable else "float16")
