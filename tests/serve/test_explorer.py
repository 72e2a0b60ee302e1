"""The page's files, and what it asks for: facts, the map, the run's report, marks that become training records."""

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from embedsmith.core.errors import CheckpointError, DataError, EvaluationError
from embedsmith.index import Document

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'embedsmith[serve]'")

from fastapi.testclient import TestClient

import embedsmith.serve.explorer as pages
from embedsmith.data.read import read_source
from embedsmith.data.source import Source
from embedsmith.serve import atlas
from embedsmith.serve.app import http_app
from embedsmith.serve.explorer import Explorer
from embedsmith.serve.feedback import FeedbackFile
from tests.serve.explored import HOSTILE, documents, run_folder, service

STATIC = Path(pages.__file__).parent / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = service(tmp_path_factory.mktemp("served"))
    yield made
    made.close()


@pytest.fixture
def client(served, tmp_path):
    explorer = Explorer(run_folder(tmp_path), tmp_path / "feedback.jsonl")
    return TestClient(http_app(served, explorer=explorer), raise_server_exceptions=False)


def test_every_file_comes_with_a_policy_that_forbids_all_but_this_server(client):
    for path in ("/", *(f"/explorer/static/{file.name}" for file in STATIC.iterdir() if file.name != "index.html")):
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/explorer/static/..%2fexplorer.py").status_code == 404
    assert client.get("/explorer/static/nothing.js").status_code == 404


def test_the_files_name_no_other_place_and_never_make_markup_of_a_text():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text), file.name
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "srcdoc"):
            assert way not in text, (file.name, way)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>", page), "the policy would forbid it"
    named = set(re.findall(r'(?:src|href)="explorer/static/([^"]+)"', page))
    for script in SCRIPTS:
        named |= {script.name} | set(re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8")))
    assert named == {file.name for file in STATIC.iterdir()} - {"index.html"}


def test_both_languages_have_every_word_that_the_page_uses():
    text = (STATIC / "words.js").read_text(encoding="utf-8")
    halves = re.split(r"\n  zh: \{", text)
    words = [dict(re.findall(r'^    (\w+): "(.*)",$', half, re.MULTILINE)) for half in halves]
    assert words[0].keys() == words[1].keys()
    for key, english in words[0].items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", words[1][key])), key
    used = set(
        re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', (STATIC / "index.html").read_text(encoding="utf-8"))
    )
    for script in SCRIPTS:
        used |= set(re.findall(r'\bt\("(\w+)"', script.read_text(encoding="utf-8")))
    assert used <= words[0].keys()
    scripts = "".join(script.read_text(encoding="utf-8") for script in SCRIPTS if script.name != "words.js")
    made_up = ("text_", "curve_", "theme_")  # of what they name
    idle = {key for key in words[0].keys() - used if f'"{key}"' not in scripts and not key.startswith(made_up)}
    assert idle == set(), "words that nothing says"
    assert {"ask", "map", "report", "theme_auto", "text_right", "curve_loss"} <= words[0].keys()


def luminance(colour):
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_stand_out_from_what_is_behind_them_in_light_and_dark():
    """WCAG 2.2: 4.5 for text, 3 for the parts of controls and of drawings."""
    blocks = re.findall(
        r"\{\s*color-scheme: (\w+);(.*?)\}", (STATIC / "style.css").read_text(encoding="utf-8"), re.DOTALL
    )
    assert [scheme for scheme, _ in blocks] == ["light", "dark", "dark"]
    assert blocks[1][1].split() == blocks[2][1].split(), "chosen and by the device it is the same dark"
    for scheme, block in blocks[:2]:
        found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block))
        wide = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for name, value in found.items()
        }
        rgb = {name: [int(value[at : at + 2], 16) for at in (1, 3, 5)] for name, value in wide.items()}
        for behind in ("bg", "card", "sunk"):
            for text in ("ink", "soft", "accent"):
                assert contrast(rgb[text], rgb[behind]) >= 4.5, (scheme, text, behind)
        for text in ("good", "bad"):
            assert contrast(rgb[text], rgb["card"]) >= 4.5, (scheme, text)
        assert contrast(rgb["on-accent"], rgb["accent"]) >= 4.5
        assert contrast(rgb["ink"], rgb["mark"]) >= 4.5
        drawn = ["edge", "dense", "sparse", "multivector", "other-head", *(f"kind-{n}" for n in range(9))]
        for name in drawn:
            assert contrast(rgb[name], rgb["card"]) >= 3, (scheme, name)


def test_what_the_page_is_told_of_the_server(client, served):
    about = client.get("/explorer/about").json()
    assert [model["name"] for model in about["models"]] == ["three", "one"]
    assert about["index"] == {
        "name": "three",
        "model": "three",
        "documents": 30,
        "heads": ["dense", "sparse", "multivector"],
        "weights": {"dense": 1.0, "sparse": 0.3, "multivector": 1.0},
    }
    assert (about["reranker"], about["feedback"], about["run"]) == (False, "feedback.jsonl", True)
    bare = TestClient(http_app(served)).get("/explorer/about").json()
    assert (bare["feedback"], bare["run"]) == (None, False)


def test_the_map_holds_every_document_with_its_neighbours(client, served):
    drawn = client.get("/explorer/map").json()
    assert drawn["total"] == 30
    assert sorted(drawn["ids"]) == sorted(document.id for document in documents())
    texts = dict(zip(drawn["ids"], drawn["texts"], strict=True))
    assert texts["d0"] == HOSTILE[0]
    assert texts["d5"] == f"{HOSTILE[5][:239]}…"
    assert max(map(abs, drawn["x"] + drawn["y"])) == 1
    assert drawn["fields"].keys() == {"kind", "year"}, "a name for each document is no colour"
    assert drawn["fields"]["year"]["kind"] == "numbers"
    reps = served.models["three"].represent([d.text for d in documents()], role="document")
    vector_ND = reps["dense"].vector_ND.numpy().astype(np.float64)
    unit = {d.id: v / np.linalg.norm(v) for d, v in zip(documents(), vector_ND, strict=True)}
    for place, name in enumerate(drawn["ids"]):
        others = sorted(float(unit[name] @ unit[other]) for other in unit if other != name)[::-1][:6]
        assert drawn["cosines"][place] == pytest.approx(others, abs=2e-4)
        near = [float(unit[name] @ unit[drawn["ids"][other]]) for other in drawn["neighbours"][place]]
        assert near == pytest.approx(others, abs=2e-4)
    other = client.get("/explorer/map", params={"model": "one"}).json()
    assert other["total"] == 28
    assert client.get("/explorer/map", params={"model": "three"}).json() == drawn != other
    maps, (name, index), others = atlas.Atlas(), *served.indexes.items()
    first = maps.map(name, index, "pca")
    maps.map(*others, "pca")
    assert maps.map(name, index, "pca") is first, "readers of two maps do not make each other wait"


def test_what_cannot_be_drawn_is_said(client, served):
    for query, said in (("method=tsne", "no map is drawn by 'tsne'"), ("model=five", "'five' has no index here")):
        answer = client.get(f"/explorer/map?{query}")
        assert answer.status_code in (400, 404)
        assert said in answer.json()["error"]["message"]
    assert "no run was given" in TestClient(http_app(served)).get("/explorer/report").json()["error"]["message"]


def test_pca_is_that_of_the_whole_matrix_and_the_same_every_time():
    vector_ND = np.random.default_rng(0).normal(size=(50, 7)) * [5, 3, 1, 1, 0.5, 0.2, 0.1]
    point_N2, share = atlas.pca(vector_ND)
    centred_ND = vector_ND - vector_ND.mean(0)
    u, s, _ = np.linalg.svd(centred_ND, full_matrices=False)
    for axis in (0, 1):
        assert abs(np.corrcoef(point_N2[:, axis], u[:, axis] * s[axis])[0, 1]) == pytest.approx(1)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    wide, high = (np.ptp(u[:, axis] * s[axis]) for axis in (0, 1))
    assert np.ptp(point_N2[:, 0]) / np.ptp(point_N2[:, 1]) == pytest.approx(wide / high)
    again_N2, _ = atlas.pca(vector_ND.copy())
    assert (again_N2 == point_N2).all()


@pytest.mark.slow
def test_umap_keeps_groups_together():
    pytest.importorskip("umap", reason="needs umap-learn, which is in no extra")
    draw = np.random.default_rng(0)
    group_N = np.repeat([0, 1, 2], 40)
    vector_ND = (np.eye(3, 16)[group_N] * 4 + draw.normal(size=(120, 16)) * 0.3).astype(np.float32)
    point_N2 = atlas.umap(vector_ND)
    assert point_N2.shape == (120, 2)
    assert np.abs(point_N2).max() == pytest.approx(1)
    far_NN = np.linalg.norm(point_N2[:, None] - point_N2[None], axis=-1) + np.eye(120) * 9
    assert (group_N[far_NN.argmin(axis=1)] == group_N).mean() > 0.95
    assert (atlas.umap(vector_ND) == point_N2).all()
    for few in (1, 3, 5):
        assert np.isfinite(atlas.umap(vector_ND[:few])).all()


@pytest.mark.parametrize("vectors", [np.zeros((0, 4)), np.ones((1, 4)), np.ones((5, 4)), np.arange(3.0)[:, None]])
def test_a_map_of_next_to_nothing(vectors):
    point_N2, share = atlas.pca(vectors)
    near_Nk, cosine_Nk = atlas.neighbours(vectors.astype(np.float32), 6)
    assert point_N2.shape == (len(vectors), 2)
    assert np.isfinite(point_N2).all()
    assert 0 <= share <= 1
    assert near_Nk.shape == cosine_Nk.shape == (len(vectors), max(len(vectors) - 1, 0))
    assert all(place not in row for place, row in enumerate(near_Nk.tolist()))


def test_fields_are_kinds_numbers_or_left_out():
    def row(n):
        shared = {"lang": "en" if n % 2 else "zh", "year": n, "flag": n < 3}
        return {**shared, "id": f"x{n}", "tags": ["a"], "one": "1"}

    rows = [row(n) for n in range(20)]
    found = atlas.fields_of([Document(str(n), "a", row if n else {}) for n, row in enumerate(rows)])
    kinds = {name: field["kind"] for name, field in found.items()}
    assert kinds == {"lang": "kinds", "year": "numbers", "flag": "kinds"}
    assert found["lang"]["values"][:3] == [None, "en", "zh"]


def test_the_report_says_which_queries_got_worse_and_why(client):
    facts = client.get("/explorer/report").json()
    assert (facts["name"], facts["finished"], facts["step"]) == ("a-run", True, 10)
    search = next(task for task in facts["tasks"] if task["task"] == "search")
    assert (search["items"], search["better"], search["worse"]) == (3, 1, 1)
    fell, rose = search["moved"]
    assert (fell["id"], fell["rank"], fell["right"], fell["wrong"]) == ("q1", [1, 4], [0.9, 0.4], [0.6, 0.6])
    assert fell["texts"] == {"query": HOSTILE[0], "right": HOSTILE[1], "wrong": HOSTILE[2]}
    assert (rose["id"], rose["rank"]) == ("q3", [None, 1])
    pair = next(task for task in facts["tasks"] if task["task"] == "alike")["moved"][0]
    assert (pair["id"], pair["people"], pair["similarity"]) == ("0", 0.0, [0.0, 0.7])
    assert [curve["name"] for curve in facts["curves"] if curve["series"]] == ["loss", "score"]


def test_the_report_is_read_anew_when_the_run_has_gone_on(served, tmp_path):
    run = run_folder(tmp_path)
    (run / "finished.json").unlink()
    client = TestClient(http_app(served, explorer=Explorer(run)))
    assert client.get("/explorer/report").json()["step"] == 10
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss/pairs": 1.0}\n')
    assert client.get("/explorer/report").json()["step"] == 11


def marks(client, query, votes, **more):
    body = {"query": query, "marks": [{"id": name, "vote": vote} for name, vote in votes.items()]}
    return client.post("/explorer/feedback", json=body, **more)


def test_marks_become_records_that_training_reads(client, tree, typed, tmp_path):
    path = tmp_path / "feedback.jsonl"
    first = marks(client, " the cat ", {"d0": 1, "d1": -1, "d7": 0}).json()
    assert first == {"saved": True, "records": 1, "file": path.name}
    assert marks(client, "the mat", {"d5": 1, "d8": 1}).json()["records"] == 2
    assert marks(client, "the dog", {"d4": -1}).json() == {"saved": False, "records": 2, "file": path.name}
    for query in ("a tree", "red", "blue"):
        marks(client, query, {"d9": 1, "d10": -1})
    records = read_source(Source(path=str(path))).records
    assert len(records) == 5
    first, second = records[0], records[1]
    assert (first.query, first.positives, first.negatives) == ("the cat", (HOSTILE[0],), (HOSTILE[1],))
    assert (second.positives, second.negatives) == ((HOSTILE[5], documents()[8].text), ())

    tree["data"] = [{"path": str(path), "batch_size": 4}]
    tree["train"] |= {"steps": 2, "checkpoint_every": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    _, shown, code = typed("train", tmp_path / "recipe.yaml")
    assert code == 0, shown
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 2
    assert all(np.isfinite(line["loss/feedback"]) for line in lines)


def test_the_last_mark_of_a_text_counts_and_a_question_without_an_answer_has_no_record(tmp_path):
    file = FeedbackFile(tmp_path / "marks.jsonl")
    file.mark("q", {"a": 1, "b": -1})
    file.mark("r", {"a": 1})
    file.mark("q", {"b": 1, "c": -1})
    assert json.loads(file.path.read_text().splitlines()[0]) == {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
    assert file.mark("q", {"a": 0, "b": -1}) == (False, 1)
    assert [json.loads(line)["query"] for line in file.path.read_text().splitlines()] == ["r"]


def test_marks_of_many_at_once_are_all_kept(tmp_path):
    file = FeedbackFile(tmp_path / "marks.jsonl")

    def work(number):
        for row in range(5):
            file.mark(f"question {row}", {f"text {number}": 1})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [sorted(row["pos"]) for row in rows] == [sorted(f"text {n}" for n in range(8))] * 5


def test_a_file_of_others_stays_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "marks.jsonl"
    for wrong in ('{"text": "a"}\n', "not json\n", '{"query": 1, "pos": []}\n', '{"query": "a", "pos": [1]}\n', "[]\n"):
        path.write_text(wrong)
        with pytest.raises(DataError, match="line 1: no record of marks"):
            FeedbackFile(path).mark("q", {"a": 1})
        assert path.read_text() == wrong
    path.write_text('{"query": "a", "pos": ["\u2028b"], "neg": [], "prompt": "mine"}\n\n', encoding="utf-8")
    FeedbackFile(path).mark("q", {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0])["prompt"] == "mine"
    monkeypatch.setattr("embedsmith.serve.feedback.LARGEST", 200)
    with pytest.raises(DataError, match="full"):
        FeedbackFile(path).mark("q", {"a" * 200: 1})
    assert "aaa" not in path.read_text(encoding="utf-8")


def test_marks_that_are_refused(client, served, tmp_path):
    path = tmp_path / "feedback.jsonl"
    wrong = [
        {"query": "q", "marks": []},
        {"query": " ", "marks": [{"id": "d1", "vote": 1}]},
        {"query": "q", "marks": [{"id": "d1", "vote": 2}]},
        {"query": "q", "marks": [{"id": "d1", "vote": True}]},
        {"query": "q", "marks": [{"id": "nowhere", "vote": 1}]},
        {"query": "q" * 4001, "marks": [{"id": "d1", "vote": 1}]},
        {"query": "q", "marks": [{"id": "d1", "vote": 1}] * 201},
        {"query": "q", "marks": [{"id": "d1", "vote": 1}], "text": "mine"},
    ]
    for body in wrong:
        answer = client.post("/explorer/feedback", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["message"]
    other = marks(client, "q", {"d1": 1}, headers={"Sec-Fetch-Site": "cross-site"})
    text = json.dumps({"query": "q", "marks": [{"id": "d1", "vote": 1}]})
    form = client.post("/explorer/feedback", content=text, headers={"Content-Type": "text/plain"})
    assert (other.status_code, form.status_code) == (400, 400)
    assert not path.exists()
    assert "takes no marks" in marks(TestClient(http_app(served)), "q", {"d1": 1}).json()["error"]["message"]


def test_what_the_page_cannot_read_or_write_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(EvaluationError, match="there is no such folder"):
        Explorer(run=tmp_path / "nowhere")
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(DataError, match="line 1: no record of marks"):
        Explorer(feedback=tmp_path / "mine.jsonl")
    with pytest.raises(CheckpointError, match="no file"):
        Explorer(feedback=tmp_path)


def test_the_verb_hands_on_the_run_and_the_file_of_marks(typed, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("embedsmith.api.serving.serve", lambda models, **settings: given.update(settings))
    assert typed("serve", "m", "--run", tmp_path, "--feedback", tmp_path / "f.jsonl")[2] == 0
    assert (given["run"], given["feedback"]) == (tmp_path, tmp_path / "f.jsonl")


def test_with_keys_the_page_is_open_and_what_it_asks_for_is_not(served, tmp_path):
    explorer = Explorer(None, tmp_path / "feedback.jsonl")
    client = TestClient(http_app(served, keys=["a-long-key"], explorer=explorer))
    assert client.get("/").status_code == client.get("/explorer/static/main.js").status_code == 200
    for path in ("/explorer/about", "/explorer/map", "/explorer/report"):
        assert client.get(path).status_code == 401
    assert marks(client, "q", {"d1": 1}).status_code == 401
    assert not (tmp_path / "feedback.jsonl").exists()
    assert marks(client, "q", {"d1": 1}, headers={"Authorization": "Bearer a-long-key"}).json()["saved"]
