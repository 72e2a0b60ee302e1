"""The report of a run that finished, of one that did not, of a comparison: in words, and in a browser."""

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from embedsmith.core.errors import EvaluationError
from embedsmith.core.recipe import load_recipe
from embedsmith.evaluate import TaskResult, evaluate
from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.model_geometry import Geometry, Sample
from embedsmith.merge import MergeRecipe, merge
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.recipe import ParentSpec
from embedsmith.models import load
from embedsmith.report import comparison_page, folder_page, geometry_page, write_report
from embedsmith.report.comparison import words_about
from embedsmith.report.merge_steps import merge_steps
from embedsmith.report.page import Section, chart, page
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import ConstantEncoder
from tests.tinybert import tiny_bert

pytest.importorskip("plotly", reason="needs plotly: pip install 'embedsmith[report]'")

TASKS = ("sts", "pairs", "clusters", "search")


def results(encoder):
    return evaluate(encoder, [small_tasks()[name] for name in TASKS])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a finished run leaves."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    (folder / "evaluation").mkdir(parents=True)
    sample = Sample.of(small_tasks()["search"], 40)
    for name, encoder in (("before", NamedEncoder(3)), ("after", NamedEncoder(32))):
        results(encoder).save(folder / "evaluation" / f"{name}.json", items=True)
        seen = Geometry.of(encoder, sample).as_dict()
        (folder / "evaluation" / f"geometry-{name}.json").write_text(json.dumps(seen))
    lines = [
        {
            "step": step,
            "loss/pairs": 4.0 - step / 10,
            "loss/scored": 2.0,
            "dense/pairs": 1.0,
            "sparse/pairs": 2.0,
            "score/search": step / 20,
            "negatives_hardness/pairs": 0.5,
            "geometry/sentence/anisotropy": 0.1,
            "learning_rate": 1e-4,
            "gradient_norm": float("nan") if step == 3 else 1.0,
            "tokens_per_second": 1000.0,
            "padding_share": 0.2,
        }
        for step in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text("model:\n  path: a <model>\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "9.9.9"}))
    seen = {"sources": {"pairs": {"task": "retrieval", "rows": 1234, "seen": {"rows": 1200, "steps": 10}}}}
    (folder / "manifest.json").write_text(json.dumps(seen))
    (folder / "finished.json").write_text(json.dumps({"steps": 10, "best_step": 8, "best_score": 0.5}))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A real merge of two tiny models, scored like the parent it is compared with."""
    folder = tmp_path_factory.mktemp("merges")
    for seed, name in enumerate(("base", "one", "two")):
        load(str(tiny_bert(folder / f"plain-{name}", seed=seed)), pooling="mean", device="cpu").save(folder / name)
    parents = tuple(ParentSpec(str(folder / name), weight=weight) for name, weight in (("one", 1.0), ("two", 3.0)))
    settings = {"base": str(folder / "base"), "output": str(folder / "both"), "unrelated": True, "cache": None}
    made = merge(MergeRecipe(parents=parents, method=Average(), **settings)).path
    (made / "evaluation").mkdir()
    for when, encoder in (("before", NamedEncoder(3)), ("after", NamedEncoder(32))):
        results(encoder).save(made / "evaluation" / f"{when}.json", items=True)
    return made


def test_the_report_of_a_merge_says_what_went_in(merged):
    text = folder_page(merged)
    for word in (
        "Merge: both",
        "<b>one</b>",
        "<b>two</b>",
        "from the base",
        "Coefficients",
        "0.25",
        "0.75",
        "restore_norm",
    ):
        assert word in text, word
    assert "<h2>Scores</h2>" in text


def test_the_report_of_a_merge_says_what_to_try(merged, tmp_path):
    shown = folder_page(merged)
    assert "What to try next" in shown
    commands = [html.unescape(text) for text in re.findall(r'class="command"><code>(.*?)</code>', shown)]
    for words in map(shlex.split, commands):
        assert words[:3] == ["embedsmith", "merge", f"{merged}/recipe.yaml"]
        changed = load_recipe(words[2], MergeRecipe, words[3:])
        assert changed.output.startswith(f"{merged}-")
    assert len(commands) == 2  # less far, another method; the weights differ already
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text("evaluate: {tasks: [asked]}")
    models = [{"id": "base", "distance": "-", "path": "b"}]
    models += [
        {"id": name, "distance": way, "path": str(run / "model")} for name, way in (("one", "1%"), ("two", "4%"))
    ]
    recipe = {"method": {"type": "ties", "scale": 0.3}, "parents": [{}, {}]}
    steps = merge_steps("made", recipe, models, None)
    assert [shlex.split(step.command)[-2:] for step in steps] == [
        ["--tasks", "asked"],
        ["parents.0.weight=2", "output=made-weighed"],
        ["method=slerp", "output=made-slerp"],
    ]
    assert merge_steps("made", {"method": "ties"}, models, None) == []


@pytest.mark.parametrize(
    "strange", [{"models": "two", "coefficients": [1]}, {"models": [{}], "coefficients": {"a": {}}}]
)
def test_a_merge_file_of_another_shape_is_shown_as_it_is(tmp_path, strange):
    (tmp_path / "merge.json").write_text(json.dumps({"method": "x", **strange}))
    assert "coefficients" in folder_page(tmp_path)


EVERYTHING = ("Scores", "Training", "Negatives", "Padding and speed", "Geometry", "Similarities", "Worst and best")


def test_the_report_of_a_run_has_everything_and_loads_nothing(run):
    text = folder_page(run)
    for title in (*EVERYTHING, "Geometry while training", "Data", "Recipe", "Environment"):
        assert f"<h2>{title}</h2>" in text, title
    for word in ("finished after 10 steps", "went from 3.9 to 3", "step 8", "1,234", "9.9.9", "a &lt;model&gt;"):
        assert word in text, word
    plain = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r'(src|href)="(?!#|data:)', plain), "nothing is fetched from elsewhere"
    assert text.count("plotly.js v") == 1


def test_what_training_changed_is_said_with_its_confidence():
    made = Comparison.of([("before", results(NamedEncoder(3))), ("after", results(NamedEncoder(3)))])
    assert all("stayed" in sentence and "chance" in sentence for sentence in words_about(made, named=False))
    better = TaskResult("t", "sts", "m", {"m": 0.9})
    words = words_about(Comparison.of([("a", _one(TaskResult("t", "sts", "m", {"m": 0.5}))), ("b", _one(better))]))
    assert words == [
        "<b>t</b>: rose from 50.00 to 90.00 (+40.00) with b; how sure this is cannot be told without the single items."
    ]


def _one(result):
    from embedsmith.evaluate import Results

    return Results((result,))


def test_a_crashed_run_shows_what_there_is(run, tmp_path):
    crashed = tmp_path / "crashed"
    shutil.copytree(run, crashed)
    (crashed / "finished.json").unlink()
    (crashed / "evaluation" / "after.json").write_text('{"tasks": [{"ta')
    (crashed / "evaluation" / "geometry-after.json").write_text("{")
    (crashed / "manifest.json").write_text("[1]")
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss/pairs": 1.')
    text = write_report(crashed).read_text()
    for word in ("did not finish", "up to step 10", "1 line(s) of metrics.jsonl", "after.json could not be read"):
        assert word in text, word
    for title in ("Scores", "Training", "Geometry"):
        assert f"<h2>{title}</h2>" in text


@pytest.mark.parametrize("keep", ["metrics.jsonl", "recipe.yaml", "finished.json", "merge.json"])
def test_any_single_file_is_enough(run, tmp_path, keep):
    (run / "merge.json").write_text(json.dumps({"method": "fisher", "weights": {"a": 0.5}}))
    (tmp_path / "one").mkdir()
    shutil.copy(run / keep, tmp_path / "one" / keep)
    (run / "merge.json").unlink()
    text = folder_page(tmp_path / "one")
    assert ("Merge: one" if keep == "merge.json" else "Training run: one") in text


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(EvaluationError, match="no such folder"):
        write_report(tmp_path / "missing")


def test_texts_cannot_break_out_of_the_page(tmp_path):
    bad = "</script><script>alert(1)</script>"
    text = page(bad, bad, [], [Section("a", bad, chart([{"x": [1], "name": bad}], title=bad))])
    assert "<script>alert" not in text


def test_scores_that_do_not_exist_are_told():
    made = Comparison.of([("before", results(ConstantEncoder())), ("after", results(NamedEncoder()))])
    text = comparison_page(made)
    assert "undefined" in text
    assert "does not exist" in text


def browser():
    """Chromium of playwright, or the system's; skips where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    return sync, path


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark"), (768, "light")])
@pytest.mark.parametrize("kind", ["run", "merge", "comparison", "geometry"])
def test_the_page_in_a_browser_without_a_network(run, merged, tmp_path, kind, width, scheme):
    sync, path = browser()
    file = tmp_path / "report.html"
    file.write_text(_text(kind, merged if kind == "merge" else run))
    with sync.sync_playwright() as play:
        try:
            chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except sync.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        view, problems = context.new_page(), []
        view.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on(
            "request",
            lambda asked: problems.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
        )
        view.goto(file.as_uri())
        view.wait_for_function("document.querySelectorAll('.chart .main-svg').length > 0")
        drawn = view.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
        fits = view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        boxes = "[...document.querySelectorAll('.wide, nav div, pre')]"
        scrolls = view.evaluate(f"{boxes}.some(box => box.scrollWidth > box.clientWidth)")
        background = view.evaluate("getComputedStyle(document.body).backgroundColor")
        titles = view.locator("h2").all_inner_texts()
        chromium.close()
    assert problems == []
    assert drawn
    assert fits, "nothing is wider than the screen"
    assert not scrolls or width > 600, "on a phone nothing scrolls sideways inside the page either"
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")
    assert {"run": "Geometry", "merge": "Merge", "comparison": "Scores", "geometry": "Geometry"}[kind] in titles


def _text(kind, run):
    if kind in ("run", "merge"):
        return folder_page(run)
    if kind == "comparison":
        return comparison_page(Comparison.of([("a", results(NamedEncoder(3))), ("b", results(NamedEncoder(32)))]))
    seen = Geometry.of(NamedEncoder(), Sample.of(small_tasks()["search"], 40)).as_dict()
    return geometry_page([seen, seen], ["a", "b"], {"cka": 1.0})
