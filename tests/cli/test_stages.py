"""Stages of one recipe: in order, restartable, and Conan's two recipes from pairs to a model."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.cli import stages as verbs_module
from embedsmith.cli.stages import PipelineRecipe, check_stages, run
from embedsmith.core.errors import CheckpointError, EvaluationError, RecipeError
from embedsmith.core.recipe import load_recipe, parse
from embedsmith.models import load
from tests.tinybert import WORDS, tiny_bert

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Verbs that write what they were given, and a list of their calls; a stage named in `broken` fails."""
    seen = []
    seen_broken = []

    def pretend(tree, where):
        seen.append((where, tree))
        if where in seen_broken:
            raise RecipeError("broken", where=where)
        Path(tree["output"]).parent.mkdir(parents=True, exist_ok=True)
        Path(tree["output"]).write_text(json.dumps(tree))
        return Path(tree["output"])

    for verb, kind in verbs_module.VERBS.items():
        monkeypatch.setitem(verbs_module.VERBS, verb, verbs_module.StageKind(pretend, kind.suffix))
    seen_broken_holder = type("Calls", (), {"list": seen, "broken": seen_broken})
    return seen_broken_holder


def tree(folder):
    return {
        "output": str(folder),
        "stages": [
            {"name": "clean", "verb": "curate", "recipe": {"input": {"path": "raw.jsonl"}}},
            {"name": "hard", "verb": "mine", "recipe": {"data": {"path": "${clean}"}}, "set": ["select.negatives=3"]},
            {"name": "model", "verb": "train", "recipe": {"data": [{"path": "${hard}"}], "note": "in ${output}"}},
        ],
    }


def test_stages_run_in_order_and_hand_on_what_they_made(calls, tmp_path):
    made = run(parse(PipelineRecipe, tree(tmp_path / "p")))
    assert made == {
        name: tmp_path / "p" / file
        for name, file in (("clean", "clean.jsonl"), ("hard", "hard.jsonl"), ("model", "model"))
    }
    assert [where for where, _ in calls.list] == ["stage clean", "stage hard", "stage model"]
    assert calls.list[1][1]["data"]["path"] == str(made["clean"])
    assert calls.list[1][1]["select"] == {"negatives": 3}
    assert calls.list[2][1]["note"] == f"in {tmp_path / 'p'}"


def test_a_stage_takes_a_shipped_recipe_by_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # that recipe writes beside its reader
    stages = [{"name": "hard", "verb": "mine", "recipe": "mine", "set": ["data.path=raw.jsonl"]}]
    run(parse(PipelineRecipe, {"output": str(tmp_path / "p"), "stages": stages}))
    assert calls.list[0][1]["data"]["path"] == "raw.jsonl"
    assert calls.list[0][1]["searchers"]
    stages[0]["recipe"] = "nine"
    with pytest.raises(RecipeError, match="no recipe of this name ships"):
        run(parse(PipelineRecipe, {"output": str(tmp_path / "q"), "stages": stages}))


def test_a_stopped_pipeline_goes_on_with_the_stage_that_failed(calls, tmp_path):
    calls.broken.append("stage hard")
    with pytest.raises(RecipeError, match="broken"):
        run(parse(PipelineRecipe, tree(tmp_path / "p")))
    calls.broken.clear()
    calls.list.clear()
    left = [tmp_path / "p" / name for name in (".pipeline.json.abcd1234.tmp", "a folder/.x.abcd1234.tmp")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run(parse(PipelineRecipe, tree(tmp_path / "p")))
    assert [path.exists() for path in left] == [False, True]  # only what is left of the journal
    assert [where for where, _ in calls.list] == ["stage hard", "stage model"]
    calls.list.clear()
    run(parse(PipelineRecipe, tree(tmp_path / "p")))
    assert calls.list == []


def test_a_changed_stage_and_those_behind_it_run_again(calls, tmp_path):
    run(parse(PipelineRecipe, tree(tmp_path / "p")))
    calls.list.clear()
    changed = tree(tmp_path / "p")
    changed["stages"][1]["set"] = ["select.negatives=4"]
    run(parse(PipelineRecipe, changed))
    assert [where for where, _ in calls.list] == ["stage hard", "stage model"]


def test_what_is_wrong_is_said_before_anything_runs(calls, tmp_path):
    wrong = tree(tmp_path / "p")
    wrong["stages"][2]["recipe"]["data"][0]["path"] = "${hrad}"
    with pytest.raises(RecipeError, match=r"\$\{hrad\} is no earlier stage \(did you mean 'hard'"):
        run(parse(PipelineRecipe, wrong))
    assert calls.list == []
    for change, words in (({"name": "clean"}, "two stages are called 'clean'"), ({"verb": "bake"}, "bake")):
        wrong = tree(tmp_path / "p")
        wrong["stages"][1] |= change
        with pytest.raises(RecipeError, match=words):
            parse(PipelineRecipe, wrong)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pipeline.json").write_text("half")
    with pytest.raises(CheckpointError, match=r"not valid JSON(.|\n)*delete this journal of stages"):
        run(parse(PipelineRecipe, tree(tmp_path / "p")))


def seeded(folder, **changes):
    train = {
        "name": "joint",
        "verb": "train",
        "recipe": {"train": {"steps": 3}, "output": "elsewhere"},
        "seeds": [0, 7],
    }
    parents = [{"path": "${joint}", "weight": 2}, {"path": "other"}]
    merged = {"name": "merged", "verb": "merge", "recipe": {"parents": parents, "base": "${output}/b"}}
    return {"output": str(folder), "stages": [train | changes, merged]}


def test_a_training_of_several_seeds_is_a_stage_for_each_and_a_parent_for_each(calls, tmp_path):
    made = run(parse(PipelineRecipe, seeded(tmp_path / "p")))
    assert {name: path.name for name, path in made.items()} == {n: n for n in ("joint-0", "joint-7", "merged")}
    assert [tree["train"] for _, tree in calls.list[:2]] == [{"steps": 3, "seed": 0}, {"steps": 3, "seed": 7}]
    ones = [{"path": str(made[name]), "weight": 2} for name in ("joint-0", "joint-7")]
    assert calls.list[2][1]["parents"] == [*ones, {"path": "other"}]
    calls.list.clear()
    run(parse(PipelineRecipe, seeded(tmp_path / "p", seeds=[0, 8])))
    assert [where for where, _ in calls.list] == ["stage joint-8", "stage merged"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verb": "mine"}, r"seeds of a stage mine(.|\n)*expected: a stage train"),
        ({"seeds": [1, 1]}, r"one of \[1, 1\] comes twice"),
        ({"seeds": [-1]}, r"seeds\.0"),
        ({"name": "merged"}, "two stages are called 'merged'"),
    ],
)
def test_seeds_that_mean_nothing_are_refused(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        parse(PipelineRecipe, seeded(tmp_path / "p", **changes))


def test_a_place_for_one_model_takes_no_group_of_them(calls, tmp_path):
    wrong = seeded(tmp_path / "p")
    wrong["stages"][1]["recipe"]["base"] = "${joint}"
    with pytest.raises(RecipeError, match=r"stands for 2 models, and here(.|\n)*name one of them, \$\{joint-0\}"):
        run(parse(PipelineRecipe, wrong))
    assert calls.list == []


def test_a_probe_of_an_evaluate_stage_that_a_training_reads_is_refused_before_it(calls, tmp_path):
    write(tmp_path / "pairs.jsonl", [{"query": f"q{n}", "pos": [f"a{n}"]} for n in range(9)])
    write(tmp_path / "known.jsonl", [{"text1": "q3", "text2": "other", "score": 0.5}])
    write(tmp_path / "new.jsonl", [{"text1": "x", "text2": "y", "score": 0.5}])
    train = {"model": {"path": "m"}, "data": [{"path": str(tmp_path / "pairs.jsonl")}]}
    scores = {"model": "${model}", "tasks": [str(tmp_path / f"{name}.jsonl") for name in ("known", "new")]}

    def pipeline(probes):
        last = {"name": "scores", "verb": "evaluate", "recipe": scores | {"probes": probes}}
        stages = [{"name": "model", "verb": "train", "recipe": train}, last]
        return parse(PipelineRecipe, {"output": str(tmp_path / "p"), "stages": stages})

    with pytest.raises(RecipeError, match="the probe known is trained on: 1 of 2 texts"):
        run(pipeline(scores["tasks"][:1]))
    assert calls.list == []
    with pytest.raises(RecipeError, match="'nwe' is not one of the stage's tasks"):
        run(pipeline(["nwe"]))
    run(pipeline([]))
    assert [where for where, _ in calls.list] == ["stage model", "stage scores"]
    calls.list.clear()
    run(pipeline(scores["tasks"][1:]))
    assert [where for where, _ in calls.list] == ["stage scores"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    pairs = [{"query": f"{a} {b}", "pos": [f"the {a} {b} {a}"]} for a in WORDS[2:8] for b in WORDS[8:12]]
    scored = [{"text1": f"{w} cat", "text2": f"{WORDS[-i]} dog", "score": i / 16} for i, w in enumerate(WORDS)]
    return write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "scored.jsonl", scored)


def test_a_mistake_in_the_last_stage_is_said_before_the_first_runs(tmp_path, files):
    first = {"name": "clean", "verb": "curate", "recipe": {"input": {"path": str(files[0])}, "steps": []}}
    right = {"model": "${clean}", "tasks": [str(files[1]), "${clean}"]}
    for change, error, words in (
        ({"modle": "x"}, RecipeError, r"stage scores: modle: unknown key \(did you mean 'model'"),
        ({"tasks": ["nowhere"]}, EvaluationError, r"(?s)scores: no task is called 'nowhere'.*stages\.1\.recipe\.tasks"),
    ):
        stages = [first, {"name": "scores", "verb": "evaluate", "recipe": right | change}]
        with pytest.raises(error, match=words):
            run(parse(PipelineRecipe, {"output": str(tmp_path / "p"), "stages": stages}))
    assert not (tmp_path / "p").exists()


def test_conans_recipes_go_from_pairs_to_a_model(tmp_path, files):
    bert, scorer = tiny_bert(tmp_path / "bert"), tmp_path / "scorer"
    load(str(bert), pooling="mean").save(scorer)
    weak, supervised = tmp_path / "weak", tmp_path / "supervised"
    quick = ["train.steps=3", "train.epochs=null", "train.log_with=[]", "model.max_length=16"]
    made = run(
        load_recipe(
            RECIPES / "conan-weak.yaml",
            PipelineRecipe,
            [
                f"output={weak}",
                f"stages.0.recipe.input.path={files[0]}",
                "stages.0.recipe.steps.4={type: trivial}",  # of no language, these words, and all alike
                "stages.0.recipe.steps.7={type: trivial}",
                f"stages.0.recipe.steps.8.model={scorer}",
                "stages.0.recipe.steps.8.threshold=0.0",
                f"stages.1.recipe.model.path={bert}",
                "stages.1.recipe.data.0.batch_size=8",
                *(f"stages.1.recipe.{change}" for change in quick),
            ],
        )
    )
    mining = [f"stages.{n}.recipe.{key}" for n in (0, 1) for key in (f"data.path={files[0]}", "candidates=23")]
    command = [
        "run",
        str(RECIPES / "conan-supervised.yaml"),
        f"output={supervised}",
        *mining,
        "stages.0.recipe.select.negatives=14",
        *(f"stages.{n}.recipe.searchers.0.model={made['weak']}" for n in (0, 1)),
        f"stages.1.recipe.teacher.model={scorer}",
        f"stages.2.recipe.model.path={made['weak']}",
        "stages.2.recipe.model.dimension=1024",
        "stages.2.recipe.data.0.batch_size=8",
        "stages.2.recipe.data.1.batch_size=8",
        *(f"stages.2.recipe.{change}" for change in quick),
    ]
    own = [f"stages.2.recipe.data.1.{key}" for key in (f"path={files[1]}", "columns=null", "score_range=null")]
    for more, similarity in (([], "pairs"), (own, "scored")):
        result = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert (supervised / "supervised" / "model" / "model.safetensors").exists()
        metrics = [json.loads(line) for line in (supervised / "supervised" / "metrics.jsonl").read_text().splitlines()]
        assert any("negatives_hardness/mine" in line for line in metrics)
        assert metrics[-1][f"loss/{similarity}"] > 0
        shutil.rmtree(supervised / "supervised")


def test_the_place_of_a_stage_is_counted_as_in_the_recipe():
    """Not as they run: a stage with three seeds is one."""
    trained = {"model": {"path": "m"}, "data": [{"path": "pairs.jsonl", "task": "retrieval", "batch_size": 4}]}
    stages = [
        {"name": "run", "verb": "train", "seeds": [0, 1, 2], "recipe": trained},
        {"name": "scores", "verb": "evaluate", "recipe": {"model": "${run-0}", "tasks": ["nothing-there.jsonl"]}},
    ]
    with pytest.raises(EvaluationError, match=r"stages\.1\.recipe\.tasks="):
        check_stages(parse(PipelineRecipe, {"output": "runs/p", "stages": stages}))
