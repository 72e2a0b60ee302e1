"""The demo: what is held out stays out, and the whole course on a tiny model and made-up texts."""

import json
import random
from io import StringIO

import pytest
from rich.console import Console

import embedsmith
from embedsmith.cli import demo
from embedsmith.cli.demo import Faq, Paper, held_out, pairs_by_tags, prepare, shared_tags
from embedsmith.core.errors import EmbedsmithError, MissingExtraError
from tests.tinybert import WORDS, tiny_bert

CHANCE = random.Random(0)
TAGS = ("search", "speech", "vision", "graphs")


def text(number: int) -> str:
    return f"{number} " + " ".join(CHANCE.sample(WORDS, 4))


QUESTIONS = [Faq(f"which {text(number)}", f"the {text(number)}") for number in range(60)]
PAPERS = [Paper(f"on {text(number)}", frozenset(CHANCE.sample(TAGS, 2))) for number in range(40)]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_nothing_measured_is_trained_on(tmp_path):
    files = prepare(tmp_path, QUESTIONS, PAPERS)
    trained = {row["query"] for row in rows(files.pairs)}
    asked = {row["text"] for row in rows(files.held_out_questions / "queries.jsonl")}
    assert trained
    assert asked
    assert trained | asked == {each.question for each in QUESTIONS}
    assert not trained & asked
    titles = [
        {row[side] for row in rows(path) for side in ("text1", "text2")}
        for path in (files.scored, files.held_out_scored)
    ]
    assert titles[0]
    assert titles[1]
    assert not titles[0] & titles[1]


def test_the_right_answer_is_judged_relevant(tmp_path):
    folder = prepare(tmp_path, QUESTIONS, PAPERS).held_out_questions
    answers = {row["_id"]: row["text"] for row in rows(folder / "corpus.jsonl")}
    asked = {row["_id"]: row["text"] for row in rows(folder / "queries.jsonl")}
    lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    judged = {asked[query]: answers[document] for query, document, _ in (line.split("\t") for line in lines)}
    assert judged == {each.question: each.answer for each in QUESTIONS if held_out(each.question)}
    assert len(answers) == len(QUESTIONS)


def test_pairs_are_scored_by_shared_tags_and_balanced():
    a, b, c = (Paper(name, frozenset(tags)) for name, tags in (("a", "xy"), ("b", "yz"), ("c", "w")))
    assert shared_tags(a.tags, b.tags) == pytest.approx(1 / 3)
    found = pairs_by_tags([a, b, c])
    assert found[0] == {"text1": "a", "text2": "b", "score": pytest.approx(1 / 3)}
    assert [row["score"] for row in found[1:]] == [0]


def test_the_whole_course(tmp_path, monkeypatch):
    embedsmith.load(str(tiny_bert(tmp_path / "bert")), pooling="mean").save(tmp_path / "encoder")
    monkeypatch.setattr(demo, "encoder_folder", lambda: tmp_path / "encoder")
    monkeypatch.setattr(demo, "read_faq", lambda: QUESTIONS)
    monkeypatch.setattr(demo, "read_papers", lambda: PAPERS)
    full = demo.recipe
    monkeypatch.setattr(demo, "recipe", lambda *args: _short(full(*args)))
    said: list[str] = []
    found = demo.demonstrate(tmp_path / "out", steps=2, question=QUESTIONS[0].question, say=said.append)
    assert [result.task for result in found.after] == ["faq-held-out", "titles-held-out"]
    assert found.before.main_scores() != found.after.main_scores()
    assert len(said) == 3
    page = (tmp_path / "out" / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{100 * found.after[0].main_score:.2f}" in page  # the run's own report has the scores too
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["after"]["tasks"][0]["main_score"] == found.after[0].main_score
    assert [answer["text"] for answer in report["answers"]] == [answer.text for answer in found.answers_after[:3]]
    assert found.answers_after[0].score >= found.answers_after[1].score
    shown = Console(width=200, file=StringIO())
    shown.print(found.table())
    rows = [line.split() for line in shown.file.getvalue().splitlines() if "held-out" in line and "never" not in line]
    for result, before, row in zip(found.after, found.before, rows[:1] + rows[-1:], strict=True):
        assert row[1] == result.task
        assert f"{100 * before.scores[row[3]]:.2f}" in row
        assert f"{100 * result.scores[row[3]]:.2f}" in row
    assert embedsmith.load(str(found.model)).dimension == 16


def _short(recipe):
    """The tiny encoder has 32 positions."""
    from dataclasses import replace

    return replace(
        recipe,
        model=replace(recipe.model, max_length=32),
        train=replace(recipe.train, learning_rate=1e-2, precision="fp32"),
    )


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"embedsmith\[demo\]"):
        demo.encoder_folder()
    with pytest.raises(EmbedsmithError, match="--no-deps cherche"):
        demo.read_papers()
