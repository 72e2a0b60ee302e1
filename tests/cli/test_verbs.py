"""`embedsmith evaluate | compare | geometry | report | push` as a user types them."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import DataError, EmbedsmithError, EvaluationError, ModelError
from embedsmith.evaluate import load_task
from embedsmith.report.model_card import Score, TrainingFacts, push
from tests.evaluate.examples import NamedEncoder
from tests.evaluate.test_load import data


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Tasks of every kind as files, and models that are hashes as wide as their name says."""
    named = lambda name: NamedEncoder(int(name.rsplit("-", 1)[1]))
    monkeypatch.setattr("embedsmith.models.load", lambda name, **_: named(name))
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", lambda name, _: named(name))
    root = data(tmp_path / "data")
    words = [f"text number {n}" for n in range(40)]
    write(root / "labels/topic-train.jsonl", ({"text": w, "label": "ab"[n % 2]} for n, w in enumerate(words[:20])))
    write(root / "labels/topic-test.jsonl", ({"text": w, "label": "ab"[n % 2]} for n, w in enumerate(words[20:])))
    pairs = ({"text1": a, "text2": b, "label": n % 2} for n, (a, b) in enumerate(pairwise(words)))
    write(root / "pairs/same.jsonl", pairs)
    write(root / "sts/twelve.jsonl", ({"text1": w, "text2": w[::-1], "score": n % 5} for n, w in enumerate(words)))
    write(root / "rank/order.jsonl", ({"query": w, "positive": [w + "!"], "negative": words[:3]} for w in words[5:9]))
    return root


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def kinds(folder, *names):
    return [load_task(name, data_dir=folder).kind for name in names]


def test_kinds_are_known_by_their_files_or_said(folder):
    assert kinds(folder, "topic", "same", "twelve", "order", "cranfield") == [
        "classification",
        "pair_classification",
        "sts",
        "reranking",
        "retrieval",
    ]
    assert kinds(folder, "clustering:topic", "long:cranfield", "cross:cranfield:cranfield") == [
        "clustering",
        "long_retrieval",
        "retrieval",
    ]
    with pytest.raises(EvaluationError, match="cross:QUERIES:DOCUMENTS"):
        load_task("cross:cranfield", data_dir=folder)


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{"text1": "a", "text2": "b", "label": 2}], "bad", "the label is 2"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 3}], "bad", "some labels are numbers"),
        ([{"text": "a", "label": None}], "bad", "the label is None"),
        ([{"text": "a", "label": "x"}], "classification:bad", "no file with training texts"),
        ([{"query": "q", "positive": [], "negative": ["n"]}], "bad", "no rows"),
        ([{"text1": "a", "text2": "b", "score": 0.5}], "pair_classification:bad", "0 or 1"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(folder, rows, name, message):
    write(folder / "labels" / "bad.jsonl", rows)
    with pytest.raises(DataError, match=f"(?s)bad.jsonl.*{message}"):
        load_task(name, data_dir=folder)


def test_candidates_in_a_folder_make_it_a_reranking_task(folder):
    plain = load_task("cranfield", data_dir=folder)
    rows = [{"query-id": query, "corpus-ids": list(plain.corpus)} for query in plain.queries]
    write(folder / "retrieval/cranfield/top_ranked.jsonl", rows)
    assert kinds(folder, "cranfield", "retrieval:cranfield") == ["reranking", "retrieval"]


def test_models_are_compared_and_the_table_written(folder, tmp_path):
    tasks = ("-t", "twelve", "-t", "same", "--data", folder)
    out, page = tmp_path / "c.json", tmp_path / "c.html"
    result = invoke("compare", "org/m-3", "org/m-30", *tasks, "--json", out, "--report", page)
    assert "org/m-30" in result.output
    plain = json.loads(out.read_text())
    assert plain["baseline"] == "org/m-3"
    assert {row["task"] for row in plain["differences"]["org/m-30"]} == {"twelve", "same"}
    assert "<h2>Scores</h2>" in page.read_text()


def test_tasks_may_follow_one_option_and_results_stand_for_models(folder, tmp_path):
    results = tmp_path / "old.json"
    invoke("evaluate", "org/m-3", "twelve", "same", "--data", folder, "--json", results, "--items")
    before = json.loads(results.read_text())
    out = tmp_path / "c.json"
    invoke("compare", results, "org/m-3", "--tasks", "twelve", "same", "--data", folder, "--json", out)
    rows = json.loads(out.read_text())["differences"]["org/m-3"]
    assert [row["difference"] for row in rows] == [0.0, 0.0]
    assert [task["task"] for task in before["tasks"]] == [row["task"] for row in rows]
    with pytest.raises(EvaluationError, match="no result for 'topic'"):
        invoke("compare", results, "org/m-3", "--tasks", "topic", "--data", folder)
    with pytest.raises(EvaluationError, match="two or more"):
        invoke("compare", "org/m-3", "--tasks", "twelve", "--data", folder)


def test_what_was_computed_is_kept(folder, tmp_path):
    arguments = ("evaluate", "org/m-3", "twelve", "cranfield", "--data", folder, "--keep", tmp_path / "kept")
    first = invoke(*arguments).output
    assert list((tmp_path / "kept" / "results").glob("*.json"))
    assert any((tmp_path / "kept" / "vectors").rglob("*"))
    assert invoke(*arguments).output == first, "the seconds too: nothing was scored again"


def test_limits_need_mteb(folder):
    with pytest.raises(EvaluationError, match="add --mteb"):
        invoke("evaluate", "org/m-3", "twelve", "--data", folder, "--limits", "3")


def test_geometry_of_one_and_of_two_models(folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"line {n}" for n in range(30)))
    out, page = tmp_path / "g.json", tmp_path / "g.html"
    result = invoke("geometry", "m-8", "-t", texts, "--against", "m-16", "--json", out, "--report", page)
    assert "both/cka" in result.output
    plain = json.loads(out.read_text())
    assert [len(model["variance"]) for model in plain["models"]] == [8, 16]
    assert 0 < plain["both"]["cka"] < 1
    assert "How alike" in page.read_text()
    assert "sentence/anisotropy" in invoke("geometry", "m-8", "-t", "twelve", "--data", folder, "--texts", 10).output
    with pytest.raises(DataError, match=r"missing\.txt: no such file"):
        invoke("geometry", "m-8", "-t", tmp_path / "missing.txt")


def test_report_writes_where_it_is_told(tmp_path):
    run = tmp_path / "run"
    write(run / "metrics.jsonl", [{"step": 1, "loss/a": 2.0}, {"step": 2, "loss/a": 1.0}])
    assert "report.html" in invoke("report", run).output
    assert "did not finish" in (run / "report.html").read_text()
    invoke("report", run, "--output", tmp_path / "r.html")
    assert (tmp_path / "r.html").is_file()
    with pytest.raises(EmbedsmithError):
        invoke("report", tmp_path / "nothing")


FACTS = TrainingFacts(
    {"pairs": {"task": "retrieval", "rows": 1200, "seen": {"rows": 600}}},
    (Score("sts", "cosine_spearman", 0.82034, 0.5), Score("new", "ndcg_at_10", math.nan)),
    "train:\n  steps: 3\n",
    {"torch": "2.13"},
)


def test_a_card_tells_how_the_model_was_made_once(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n\n# Model\n")
    FACTS.write_into(tmp_path)
    FACTS.write_into(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\ntags: []\n---\n\n# Model\n")
    for line in ("| sts | cosine_spearman | 50.00 | 82.03 |", "| new | ndcg_at_10 |  | undefined |", "steps: 3"):
        assert text.count(line) == 1, line
    assert "| pairs | retrieval | 1,200, of which 600 were seen |" in text
    with pytest.raises(ModelError, match="no README"):
        FACTS.write_into(tmp_path / "other")


def test_push_uploads_the_folder_private_unless_told(tmp_path, monkeypatch):
    done = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            done.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, folder_path, repo_id, commit_message):
            done.append((sorted(path.name for path in Path(folder_path).iterdir()), repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(ModelError, match="no model to push"):
        push(tmp_path, "me/model")
    (tmp_path / "config.json").write_text("{}")
    assert "https://hub/me/model" in invoke("push", tmp_path, "me/model").output
    invoke("push", tmp_path, "me/model", "--public")
    files = (["config.json"], "me/model")
    assert done == [("me/model", True), files, ("me/model", False), files]


def test_a_hub_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no route"):
        push(tmp_path, "me/model")
