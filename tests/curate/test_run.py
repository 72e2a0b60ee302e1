"""Whole curations: inputs of every kind, reports, stops and restarts, the command line, recipes of the repository."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from embedsmith.api.curating import run_curate, step_of, tree_of
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.recipe import load_recipe
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import generators
from embedsmith.curate import (
    CurateRecipe,
    EvaluationText,
    Input,
    InputRecords,
    Ledger,
    Length,
    SyntheticQueries,
    Tools,
    apply,
    curate,
)
from embedsmith.curate import run as run_module
from embedsmith.curate.keeper import Answer
from embedsmith.curate.run import _Curation
from embedsmith.curate.structure import PageSection
from embedsmith.data import Source, read_source
from tests.claims import watch_claims

SHARED = Path(__file__).parents[3] / "shared" / "data"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("curate*.yaml"))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(corpus):
    return [(record.query, *record.positives) for record in corpus]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"title": "T", "body": "B"}, [("T", "B")]),
        ({"Title": "T", "abstract": "A", "text": "B"}, [("T", "A"), ("T", "B")]),
        ({"question": "Q", "answers": ["A", "B"]}, [("Q", "A", "B")]),
        ({"question": "Q", "answers": {"text": ["A"], "answer_start": [1]}}, [("Q", "A")]),
        ({"instruction": "I", "input": "X", "output": "O"}, [("I\nX", "O")]),
        ({"instruction": "I", "input": "", "output": "O"}, [("I", "O")]),
        ({"prompt": "P", "chosen": "C", "rejected": "R"}, [("P", "C")]),
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                          {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]},
            [("U", "A")],
        ),
        ({"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}, [("U", "A")]),
        ({"translation": {"en": "dog", "zh": "狗"}}, [("dog", "狗"), ("狗", "dog")]),
        ({"summary": "S", "article": "A"}, [("S", "A")]),
        ({"标题": "T", "title": "标题", "content": "正文"}, [("标题", "正文")]),
    ],
)  # fmt: skip
def test_pairs_of_rows(tmp_path, row, pairs):
    corpus = InputRecords(Input(path=write(tmp_path / "rows.jsonl", [row])))
    assert corpus.kind == "rows"
    assert texts(corpus) == pairs
    assert all(record.source.startswith("rows/") for record in corpus)


def test_rejected_answers_are_negatives(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "P", "chosen": "C", "rejected": "R"}])
    assert next(iter(InputRecords(Input(path=path)))).negatives == ("R",)


def test_chosen_structures_only(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"title": "T", "abstract": "A", "text": "B"}, {"other": 1}])
    corpus = InputRecords(Input(path=path, kind="rows", pairs=("title_abstract",)))
    assert texts(corpus) == [("T", "A")]
    assert corpus.ledger.left["no structure found"].count == 1


def test_markdown(tmp_path):
    (tmp_path / "page.md").write_text(
        "---\ntitle: The title\n---\n\nAn *opening* with `code`\nand [a link](http://x).\n\n## One\n\nText one.\n\n"
        "### Deep\n\n- first\n- second\n\n```\ncode stays\n```\n\n"
        "## 什么是二？\n\n第二节。\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        encoding="utf-8",
    )
    found = {
        record.source.rsplit("/", 1)[1] + ": " + record.query: record.positives[0]
        for record in InputRecords(Input(path=str(tmp_path)))
    }
    assert found["heading_section: The title: One"] == "Text one."
    assert found["heading_section: The title: One: Deep"] == "first\n\nsecond\n\ncode stays"
    assert found["question_answer: 什么是二？"] == "第二节。\n\na | b\n\n1 | 2"
    assert found["title_body: The title"].startswith("An opening with code and a link.\n\nText one.")
    assert len(found) == 4


def test_a_section_has_no_gap_where_a_part_is_empty():
    assert PageSection(("T",), 1, ["one", " ", "", "two\n"]).text == "one\n\ntwo"


def test_the_first_of_several_files_says_what_they_are_and_lines_of_text_lose_their_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("  one \n\ntwo\n", encoding="utf-8")
    write(tmp_path / "b.jsonl", [{"text": " three ", "id": "x"}])
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    corpus = InputRecords(Input(path=paths))
    assert corpus.kind == "documents"
    assert texts(corpus) == [("", "one"), ("", "two"), ("", " three ")]
    assert InputRecords(Input(path=(write(tmp_path / "c.jsonl", [{"title": "T", "body": "B"}]), *paths))).kind == "rows"


def test_what_is_curated_is_claimed_first(tmp_path, monkeypatch):
    path, out = (
        write(tmp_path / "rows.jsonl", [{"query": "a whole query", "pos": ["an answer to it"]}]),
        tmp_path / "out.jsonl",
    )
    claims = watch_claims(monkeypatch, run_module, out, "_check_output")
    curate(CurateRecipe(input=Input(path=path), output=str(out), steps=(Length(),)))
    assert claims == [True]


def test_html(tmp_path):
    (tmp_path / "page.html").write_text(
        "<html><head><title>Site - T</title><meta name='description' content='An abstract.'><script>x()</script></head>"
        "<body><nav>Home | About</nav><main><h1>T</h1><p>Intro <b>bold</b>.</p><h2>Part</h2><div><p>One.</p>"
        "<ul><li>a</li><li>b</li></ul></div><div>这是<b>粗体</b>字<br>新行</div><table><tr><td>1</td><td>2</td></tr></table>"
        "<dl><dt>Why?</dt><dd>Because.</dd></dl></main><footer>© all rights</footer></body></html>",
        encoding="utf-8",
    )
    found = {
        record.source.rsplit("/", 1)[1] + ": " + record.query: record.positives[0]
        for record in InputRecords(Input(path=str(tmp_path)))
    }
    assert found["title_abstract: T"] == "An abstract."
    assert found["heading_section: T: Part"] == "One.\n\na\n\nb\n\n这是粗体字 新行\n\n1 | 2\n\nWhy?\n\nBecause."
    assert found["question_answer: Why?"] == "Because."
    assert "Home" not in found["title_body: T"]
    assert "rights" not in found["title_body: T"]
    assert found["title_body: T"].startswith("Intro bold.")


def test_records_are_read_as_training_reads_them(tmp_path):
    """Named classes, scores of another range, BEIR folders: the same records, without holding them."""
    labels = [{"text": f"t{place}", "label": name} for place, name in enumerate(["b", "a", "c", "a"])]
    scores = [{"text1": "a", "text2": "b", "score": 4.0}, {"text1": "c", "text2": "d", "score": 0.5}]
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write(beir / "corpus.jsonl", [{"_id": "1", "title": "T", "text": "one"}, {"_id": "2", "title": "", "text": "two"}])
    write(beir / "queries.jsonl", [{"_id": "q", "text": "which"}])
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t2\n")
    paths = [write(tmp_path / "labels.jsonl", labels), write(tmp_path / "sts.jsonl", scores), str(beir)]
    for path in paths:
        corpus = InputRecords(Input(path=path))
        assert corpus.kind == "records"
        assert list(corpus) == list(corpus) == list(read_source(Source(path=path)).records)
    assert InputRecords(Input(path=paths[0])).labels == ("a", "b", "c")


def test_parallel_folders(tmp_path):
    for language, query, document in (("en", "which dog", "a dog"), ("zh", "哪只狗", "一只狗")):
        folder = tmp_path / language
        (folder / "qrels").mkdir(parents=True)
        write(folder / "corpus.jsonl", [{"_id": "d", "title": "", "text": document}])
        write(folder / "queries.jsonl", [{"_id": "q", "text": query}])
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    both = Input(path=[str(tmp_path / "en"), str(tmp_path / "zh")], kind="parallel")
    assert texts(InputRecords(both)) == [("which dog", "一只狗"), ("哪只狗", "a dog")]
    with pytest.raises(DataError, match="two folders or more"):
        list(InputRecords(Input(path=str(tmp_path / "en"), kind="parallel")))


def test_faulty_rows_stop_or_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"query": "what is it", "pos": ["an answer to it"]})
    path.write_bytes(
        f"{good}\nnot json\n{json.dumps({'query': '', 'pos': ['x']})}\n".encode() + b"\xff\xfe\n" + good.encode()
    )
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON") as error:
        list(InputRecords(Input(path=str(path))))
    assert "input.on_error=skip" in str(error.value)
    report = curate(CurateRecipe(Input(path=str(path), on_error="skip"), str(tmp_path / "out.jsonl"), ()))
    assert report.records == 2
    assert sum(entry["count"] for entry in report.steps[0].left.values()) == 3


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        curate(CurateRecipe(Input(path=str(tmp_path / "no.jsonl")), str(tmp_path / "out.jsonl"), ()))
    with pytest.raises(DataError, match="no file to read"):
        curate(CurateRecipe(Input(path=str(tmp_path / "*.md")), str(tmp_path / "out.jsonl"), ()))
    with pytest.raises(DataError, match="no records in it"):
        curate(CurateRecipe(Input(path=write(tmp_path / "empty.jsonl", [])), str(tmp_path / "out.jsonl"), (Length(),)))
    path = write(tmp_path / "same.jsonl", [{"query": "a b", "pos": ["c"]}])
    with pytest.raises(RecipeError, match="also the input"):
        curate(CurateRecipe(Input(path=path), path, ()))
    with pytest.raises(DataError, match="nothing is left: length: positive: shorter than 4 units 1"):
        curate(CurateRecipe(Input(path=path), str(tmp_path / "out.jsonl"), (Length(),)))


ROWS = [
    {"query": f"question number {place}", "pos": ["a text that is long enough" if place % 3 else "no"]}
    for place in range(30)
]


def recipe_of(tmp_path, *steps, rows=ROWS):
    path = tmp_path / "in.jsonl"
    if not path.exists():
        write(path, rows)
    return CurateRecipe(Input(path=str(path)), str(tmp_path / "out.jsonl.gz"), steps)


def test_report_and_output(tmp_path):
    report = curate(recipe_of(tmp_path, Length()))
    assert (report.steps[1].taken, report.steps[1].given, report.records) == (30, 20, 20)
    saved = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    left = saved["steps"][1]["left"]["positive: shorter than 4 units"]
    assert left["count"] == 10
    assert len(left["examples"]) == 5
    assert left["examples"][0]["positives"] == ["no"]
    assert len(read_source(Source(path=str(tmp_path / "out.jsonl.gz"))).records) == 20
    assert not (tmp_path / "out.jsonl.gz.work" / "stages").exists()


def test_a_stopped_run_continues_with_the_step_under_way(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, Length(), Length(document_min=5), Length(document_min=6))
    made = []
    make = _Curation._pass

    def stops(self, step, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(step)
        return make(self, step, *rest)

    monkeypatch.setattr(_Curation, "_pass", stops)
    with pytest.raises(KeyboardInterrupt):
        curate(recipe)
    assert not (tmp_path / "out.jsonl.gz").exists()
    monkeypatch.setattr(_Curation, "_pass", lambda self, step, *rest: (made.append(step), make(self, step, *rest))[1])
    resumed = curate(recipe)
    assert made == list(recipe.steps)
    fresh_folder = tmp_path / "fresh"
    fresh_folder.mkdir()
    fresh = curate(recipe_of(fresh_folder, *recipe.steps))
    assert [step.left for step in resumed.steps] == [step.left for step in fresh.steps]
    assert (tmp_path / "out.jsonl.gz").read_bytes() == (fresh_folder / "out.jsonl.gz").read_bytes()


def test_a_finished_run_is_not_repeated_unless_something_changed(tmp_path, monkeypatch):
    first = curate(recipe_of(tmp_path, Length()))
    made = []
    make = _Curation._pass
    monkeypatch.setattr(_Curation, "_pass", lambda self, *rest: (made.append(1), make(self, *rest))[1])
    assert curate(recipe_of(tmp_path, Length())).as_dict() == json.loads(json.dumps(first.as_dict()))
    assert made == []
    curate(recipe_of(tmp_path, Length(document_min=5)))
    assert len(made) == 1
    write(tmp_path / "in.jsonl", ROWS[:10])
    assert curate(recipe_of(tmp_path, Length(document_min=5))).steps[0].given == 10
    curate(recipe_of(tmp_path, Length(document_min=5)), overwrite=True)
    assert len(made) == 3


def test_arguments():
    assert step_of("length query_min=3 document_max=null") == {"type": "length", "query_min": 3, "document_max": None}
    tree = tree_of("in.jsonl", ["out.jsonl", "input.limit=3"], ["trivial"])
    assert tree == {"input": {"path": "in.jsonl", "limit": 3}, "output": "out.jsonl", "steps": [{"type": "trivial"}]}
    with pytest.raises(RecipeError, match="where should the result go"):
        tree_of("in.jsonl", [], ["trivial"])


def test_decontaminate_by_the_names_of_tasks(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"query": "a man plays the flute", "pos": ["yes he does"]}, *ROWS])
    task = write(tmp_path / "sts.jsonl", [{"text1": "A man plays the flute.", "text2": "b", "score": 1.0}] * 2)
    report = run_curate(path, [str(tmp_path / "out.jsonl")], [f"decontaminate tasks=[{task}]"])
    assert report.steps[1].left[f"query: the same as in {task}, a query"]["count"] == 1
    assert report.records == 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_curation_recipe_of_the_repository_runs(path, tmp_path, monkeypatch):
    """On small files; a model, an endpoint or an evaluation set it names is replaced by one that is at hand."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = ["fox", "river", "bank", "dog", "tree", "house", "stone", "bird", "cloud", "road", "light", "water"]
    rows = [{"query": f"what about the {a} and the {b}", "pos": [f"The {a} was seen by the {b} in the old town."]}
            for a in words for b in words if a != b]  # fmt: skip
    article = "\n".join(f"The {a} was seen by the {b} in the old town. " * 8 for a in words for b in words)
    documents = [{"text": article}, {"text": f"{article} again"}]
    makes_queries = any("generator" in step for step in tree["steps"])
    changes = [f"input.path={write(tmp_path / 'in.jsonl', documents if makes_queries else rows)}", "input.limit=100"]
    for place, step in enumerate(tree["steps"]):
        changes += [f"steps.{place}.generator=echo_for_tests"] if "generator" in step else []
        changes += [f"steps.{place}.tasks=[here]"] if "tasks" in step else []
    tools = Tools(
        encoder=lambda name: (_Ones(), name), evaluation=lambda names: [EvaluationText("x y z", "t", "query")]
    )
    recipe = load_recipe(path, CurateRecipe, [*changes, f"output={tmp_path / 'out.jsonl'}", "work=null"])
    assert curate(recipe, tools).records > 0


class _Ones:
    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        return {"dense": Dense(torch.ones(len(texts), 3))}


@generators.register("echo_for_tests")
@dataclass(frozen=True)
class _Echo:
    """Asks about the first word."""

    window = 4

    def identity(self):
        return "echo"

    def answers(self, prompts, accept, spent):
        for place, prompt in enumerate(prompts):
            yield place, Answer(f"What is {prompt.split()[-1]}?")


def test_documents_get_queries(tmp_path):
    (tmp_path / "texts.txt").write_text("all about foxes\n\n关于狗的一切\n", encoding="utf-8")
    corpus = InputRecords(Input(path=str(tmp_path / "texts.txt")))
    assert texts(corpus) == [("", "all about foxes"), ("", "关于狗的一切")]
    kept, _ = apply(SyntheticQueries(_Echo()), corpus)
    assert [record.query for record in kept] == ["What is foxes?", "What is 关于狗的一切?"]
    with_title = write(tmp_path / "corpus.jsonl", [{"_id": "1", "title": "", "text": "all about cats"}])
    assert InputRecords(Input(path=with_title), wants_documents=True).kind == "documents"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_texts_mostly_stay():
    """Rules made for noise take next to nothing of clean English and Chinese."""
    from embedsmith.curate import Boilerplate, Language, Links, Symbols

    for name in ("pairs/debian-en-train.jsonl.gz", "pairs/drcd-zh-train.jsonl.gz", "pairs/nli-zh-hard.jsonl.gz"):
        corpus = InputRecords(Input(path=str(SHARED / name), limit=2000))
        for step in (Length(), Symbols(), Links(), Language(), Boilerplate()):
            ledger = Ledger()
            kept = sum(1 for _ in step(corpus, ledger, Tools()))
            assert kept >= 0.99 * corpus.ledger.given, (name, step, ledger.left)
