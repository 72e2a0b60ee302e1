"""Queries by language models: against a server on this machine that is busy, broken or slow when told to be."""

import json
import multiprocessing
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from embedsmith.core.errors import RecipeError
from embedsmith.curate import (
    CurateRecipe,
    Endpoint,
    Input,
    LongDocuments,
    SyntheticQueries,
    Tools,
    TranslateQueries,
    apply,
    curate,
)
from embedsmith.curate.ask import lines_of
from embedsmith.curate.generators import EndpointError
from embedsmith.curate.keeper import Purse
from embedsmith.curate.synthesize import paragraphs
from embedsmith.data import Record


class FakeServer:
    """Answers a prompt with `says(prompt, how often it was asked)`: a text, or (status, headers, body)."""

    def __init__(self):
        self.asked = Counter()
        self.requests = []
        self.times = []
        self.says = lambda prompt, time: "What is this passage about?"
        self.delay = 0.0
        self.lock = threading.Lock()

    def answer(self, body, headers):
        prompt = body["messages"][-1]["content"]
        with self.lock:
            self.asked[prompt] += 1
            self.requests.append((body, headers))
            self.times.append(time.monotonic())
            count = self.asked[prompt]
        time.sleep(self.delay)
        said = self.says(prompt, count)
        if not isinstance(said, str):
            return said
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return 200, {}, json.dumps({"choices": [choice], "usage": usage})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, said = fake.answer(body, self.headers)
            said = said.encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
            except OSError:
                pass  # the client was killed

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    yield fake
    httpd.shutdown()
    httpd.server_close()


def endpoint(server, **more):
    return Endpoint(server.url, "fake", **{"backoff": 0.01, "parallel": 2, "retries": 3, **more})


def passages(count):
    return [Record("", (f"Passage number {place} tells of foxes and rivers.",)) for place in range(count)]


def reasons(ledger):
    return {reason: departure.count for reason, departure in ledger.left.items()}


def test_queries_for_passages(server, monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "secret")
    server.says = lambda prompt, time: 'Here are two questions:\n1. What do foxes do?\n2) "Where are rivers?"\n3. More?'
    step = SyntheticQueries(endpoint(server, key_env="FAKE_KEY", extra={"seed": 1}, system="Be brief."), count=2)
    kept, ledger = apply(step, [*passages(3), passages(1)[0]])
    assert [record.query for record in kept] == ["What do foxes do?", "Where are rivers?"] * 3
    assert [record.positives for record in kept[::2]] == [record.positives for record in passages(3)]
    body, headers = server.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body["seed"] == 1
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert ledger.lost["passage seen before"].count == 1
    assert ledger.notes["asked"]["requests"] == 3
    assert ledger.notes["asked"]["tokens_in"] == 300


def test_chinese_passages_are_asked_for_in_chinese(server):
    server.says = lambda prompt, time: "这段文字说了什么？"
    kept, _ = apply(SyntheticQueries(endpoint(server)), [Record("", ("敏捷的棕色狐狸跳过了懒惰的狗。",))])
    assert kept[0].query == "这段文字说了什么？"
    assert "请写出1个不同的问题" in next(iter(server.asked))


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        (200, {}, "<html>not JSON</html>"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"error": "overloaded"}'),
        (200, {}, "[]"),
    ],
)
def test_trouble_passes(server, trouble):
    server.says = lambda prompt, time: trouble if time <= 2 else "What is it about?"
    kept, ledger = apply(SyntheticQueries(endpoint(server)), passages(3))
    assert len(kept) == 3
    assert set(server.asked.values()) == {3}
    assert ledger.notes["asked"]["requests"] == 9


def test_retry_after_is_obeyed(server):
    server.says = lambda prompt, time: (429, {"Retry-After": "0.4"}, "") if time == 1 else "What is it about?"
    apply(SyntheticQueries(endpoint(server, parallel=1)), passages(1))
    assert server.times[1] - server.times[0] >= 0.4


def test_a_silent_server_stops_the_run_and_keeps_the_answers(server, tmp_path):
    server.says = lambda prompt, time: (500, {}, "down") if "number 5" in prompt else "What is it about?"
    step = SyntheticQueries(endpoint(server, parallel=1))
    with pytest.raises(EndpointError, match=r"no answer after 4 tries; the last: 500"):
        apply(step, passages(8), Tools(folder=tmp_path))
    before = server.asked.copy()
    server.says = lambda prompt, time: "What is it about?"
    kept, _ = apply(step, passages(8), Tools(folder=tmp_path))
    assert len(kept) == 8
    again = server.asked - before
    assert [prompt for prompt in again if any(f"number {place} " in prompt for place in range(5))] == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_setup_is_said_at_once(server, status):
    server.says = lambda prompt, time: (status, {}, "no such model")
    with pytest.raises(EndpointError, match=f"{status}.*no such model"):
        apply(SyntheticQueries(endpoint(server, parallel=1)), passages(3))
    assert sum(server.asked.values()) == 1


def test_a_refused_prompt_leaves_alone(server):
    server.says = lambda prompt, time: (400, {}, "too long") if "number 1" in prompt else "What is it about?"
    kept, ledger = apply(SyntheticQueries(endpoint(server)), passages(3))
    assert len(kept) == 2
    assert reasons(ledger) == {"the endpoint refused it (400)": 1}


def test_useless_answers_are_asked_for_again_and_then_given_up(server):
    server.says = lambda prompt, time: "..." if "number 1" in prompt or time == 1 else "What is it about?"
    kept, ledger = apply(SyntheticQueries(endpoint(server)), passages(3))
    assert len(kept) == 2
    assert reasons(ledger) == {"no usable answer": 1}
    assert sorted(server.asked.values()) == [2, 2, 3]


def test_a_filtered_answer_does_not_stop_the_run(server):
    body = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]})
    server.says = lambda prompt, time: (200, {}, body) if "number 1" in prompt else "What is it about?"
    kept, ledger = apply(SyntheticQueries(endpoint(server)), passages(3))
    assert (len(kept), reasons(ledger)) == (2, {"no usable answer": 1})


def test_limits(server, tmp_path):
    tools = Tools(folder=tmp_path)
    kept, ledger = apply(SyntheticQueries(endpoint(server, max_requests=4)), passages(10), tools)
    assert (len(kept), sum(server.asked.values())) == (4, 4)
    assert reasons(ledger) == {"the budget is used up": 6}
    kept, _ = apply(SyntheticQueries(endpoint(server, max_requests=6)), passages(10), tools)
    assert (len(kept), sum(server.asked.values())) == (6, 6)


def test_cost_never_exceeds_its_limit(server):
    priced = endpoint(server, parallel=1, max_cost=0.0099, price_in=1.0, price_out=10.0, max_tokens=50)
    kept, ledger = apply(SyntheticQueries(priced), passages(100))
    spent = ledger.notes["asked"]["cost"]
    assert 0.008 < spent <= 0.0099
    assert spent == pytest.approx(len(kept) * (100 * 1 + 10 * 10) / 1e6)
    with pytest.raises(RecipeError, match="max_cost needs price_in"):
        endpoint(server, max_cost=1.0)


def test_rate(server):
    apply(SyntheticQueries(endpoint(server, parallel=4, requests_per_minute=1200)), passages(6))
    assert min(later - earlier for earlier, later in zip(server.times, server.times[1:])) > 0.02
    assert server.times[-1] - server.times[0] > 0.2


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("FAKE_KEY", raising=False)
    with pytest.raises(EndpointError, match="FAKE_KEY is not set"):
        apply(SyntheticQueries(endpoint(server, key_env="FAKE_KEY")), passages(1))
    assert not server.asked


def test_long_documents(server):
    server.says = lambda prompt, time: "What happened in chapter seven of the book?"
    article = "\n\n".join(f"Chapter {place}. " + "Words that tell a story go here. " * 12 for place in range(20))
    step = LongDocuments(endpoint(server), per_article=2)
    kept, ledger = apply(step, [Record("", (article,)), Record("", ("a short one",))])
    assert [record.positives for record in kept] == [(article,)] * 2
    assert reasons(ledger) == {"article shorter than 1000 units": 1}
    assert len(server.asked) == 2
    for prompt in server.asked:
        assert prompt.count("Chapter") == 1
    assert server.asked.keys() == (apply(step, [Record("", (article,))]), server.asked)[1].keys()  # the same paragraphs


def test_paragraphs_are_cut_between_sentences():
    text = "第一句话在这里。" * 30 + "\n\nA short one.\n" + "One more sentence. " * 40
    parts = paragraphs(text, 50)
    assert "".join(parts).replace(" ", "") == "".join(text.split())
    assert all(part[-1] in "。." for part in parts)


def test_translations(server):
    server.says = lambda prompt, time: "狐狸做什么？" if "into Chinese" in prompt else "Was machen Füchse?"
    rows = [Record(f"what do {place} foxes do", ("an answer",)) for place in range(40)]
    kept, ledger = apply(TranslateQueries(endpoint(server), {"German": 3, "zh": 1}), rows)
    assert kept[::2] == rows
    made = ledger.notes["translated"]
    assert made["German"] + made["zh"] == 40
    assert made["German"] > made["zh"] > 2
    server.says = lambda prompt, time: "What do foxes do?"
    kept, ledger = apply(TranslateQueries(endpoint(server, temperature=0), {"zh": 1}, keep_originals=False), rows)
    assert kept == []
    assert ledger.lost["translation: not in zh"].count == 40


def test_lines_of_an_answer():
    said = "<think>hm\nhm</think>Sure:\n1. One?\n- “Two?”\n\n**Three?**\n问题4：四？\nQ: One?\n2001 was what year?"
    assert lines_of(said) == ["One?", "Two?", "Three?", "四？", "2001 was what year?"]


def test_nothing_is_asked_far_ahead_of_what_was_kept(server):
    """Answers that came while a slow disk kept another would be asked for again after a kill."""
    taken = 0
    prompts = [f"Number {place}?" for place in range(12)]
    for _ in endpoint(server, parallel=3).answers(prompts, lines_of, Purse()):
        time.sleep(0.02)
        assert sum(server.asked.values()) <= taken + 3
        taken += 1
    assert taken == 12


def test_killed_in_the_middle_and_resumed(server, tmp_path):
    """kill -9 while answers come in; the second run asks only for what was not answered."""
    server.delay = 0.05
    source = tmp_path / "passages.jsonl"
    texts = [record.positives[0] for record in passages(60)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    generator = endpoint(server, parallel=3)
    recipe = CurateRecipe(Input(path=str(source)), str(tmp_path / "made.jsonl"), (SyntheticQueries(generator),))
    running = multiprocessing.get_context("fork").Process(target=curate, args=(recipe,))
    running.start()
    while sum(server.asked.values()) < 20 and running.is_alive():
        time.sleep(0.01)
    running.kill()
    running.join()
    time.sleep(0.2)
    assert 20 <= sum(server.asked.values()) < 60
    assert not (tmp_path / "made.jsonl").exists()
    curate(recipe)
    assert len(server.asked) == 60
    assert sum(server.asked.values()) <= 60 + 4  # those under way when it was killed
    rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["positives"] for row in rows] == [[text] for text in texts]
    report = json.loads((tmp_path / "made.report.json").read_text(encoding="utf-8"))
    assert report["records"] == 60
    assert report["steps"][1]["notes"]["asked"]["requests"] == 60
