"""Where every verb writes: what is not its own is refused and stays, one process at a time, and twice is once."""

import fcntl
import json
import os

import pytest
import yaml
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import CheckpointError, EmbedsmithError
from embedsmith.core.recipe import load_recipe
from embedsmith.models import load
from embedsmith.train import Recipe, train
from tests.ranks import on_ranks

FOLDERS = ("train", "merge", "convert", "export", "tokenize", "run", "split", "sweep")
FILES = ("curate", "mine", "evaluate", "compare", "geometry", "report")


@pytest.fixture(scope="session")
def model(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("models") / "embedder"
    load(str(bert), pooling="mean").save(folder)
    return folder


@pytest.fixture
def commands(model, files, tmp_path, monkeypatch):
    """The arguments of every verb, for an output."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    pairs, scored = (str(files / f"{name}.jsonl") for name in ("pairs", "scored"))
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "merge.json").write_text(json.dumps({"method": "average"}))
    train = {
        "model": {"path": str(model)},
        "data": [{"path": pairs, "batch_size": 8}],
        "train": {"steps": 1, "precision": "fp32", "log_with": []},
    }
    merge = {"parents": [str(model)], "method": "average", "cache": None}
    mine = {"data": {"path": pairs}, "searchers": [{"type": "bm25"}], "candidates": 10, "select": {"negatives": 1}}
    stages = [{"name": "made", "verb": "merge", "recipe": merge}]

    def recipe(tree, *more):
        path = tmp_path / "recipe.yaml"
        return lambda out: (path.write_text(yaml.safe_dump(tree | {"output": str(out)})), [str(path), *more])[1]

    return {
        "train": recipe(train),
        "merge": recipe(merge),
        "run": recipe({"stages": stages}),
        "sweep": recipe(
            train
            | {"train": train["train"] | {"learning_rate": {"log": [1e-5, 1e-3]}}}
            | {"evaluate": {"tasks": [scored]}, "sweep": {"trials": 1}}
        ),
        "mine": recipe(mine),
        "convert": lambda out: [str(model), str(out)],
        "export": lambda out: [str(model), str(out)],
        "tokenize": lambda out: [pairs, "--model", str(model), "--out", str(out)],
        "split": lambda out: [pairs, str(out)],
        "curate": lambda out: [pairs, str(out), "--step", "length"],
        "evaluate": lambda out: [str(model), scored, "--json", str(out)],
        "compare": lambda out: [str(model), f"{model}/.", "--tasks", scored, "--json", str(out)],
        "geometry": lambda out: [str(model), "--task", scored, "--report", str(out)],
        "report": lambda out: [str(merged), "--output", str(out)],
    }


def call(verb, arguments, *more):
    return CliRunner().invoke(app, [verb, *arguments, *more])


def seen(folder):
    files = sorted(path for path in folder.rglob("*") if path.name != "recipe.yaml" and "cache" not in path.parts)
    return {path: (path.lstat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


def output_of(verb, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    return folder / ("made" if verb in FOLDERS else "made.jsonl" if verb in ("curate", "mine") else "made.json")


def refused(result, *words):
    assert isinstance(result.exception, EmbedsmithError), (result.exception, result.output)
    for word in words:
        assert word in str(result.exception)


@pytest.mark.parametrize("what", ["file", "link", "folder"])
@pytest.mark.parametrize("verb", [*FOLDERS, *FILES])
def test_what_others_wrote_is_refused_and_stays(commands, tmp_path, verb, what):
    out, mine = output_of(verb, tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    if what == "file":
        out.write_text("years of work")
    elif what == "folder":
        mine.rename(out)
    else:
        out.symlink_to(mine / "thesis.tex" if verb in FILES else mine)
    if verb == "run" and what != "file":
        pytest.skip("a pipeline adds a journal to a folder, and replaces nothing there")
    before = seen(tmp_path)
    for more in (
        [[], ["--overwrite"]]
        if verb in ("train", "sweep", "merge", "convert", "export", "split", "curate", "mine")
        else [[]]
    ):
        refused(call(verb, commands[verb](out), *more), str(out))
        assert seen(tmp_path) == before
        assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


@pytest.mark.parametrize("verb", [*FOLDERS, *FILES])
def test_the_same_command_twice_is_done_once_and_a_second_writer_is_turned_away(commands, tmp_path, verb):
    out = output_of(verb, tmp_path)
    lock = out.with_name(f".{out.name}.embedsmith.lock")
    if verb != "report":  # it reads what a run may be writing
        with lock.open("w+") as held:
            held.write(json.dumps({"verb": "train", "pid": 17, "host": "ada", "since": "noon"}))
            held.flush()
            fcntl.flock(held, fcntl.LOCK_EX)
            refused(call(verb, commands[verb](out)), str(out), "train, process 17 on ada since noon")
        assert not out.exists()
    first = call(verb, commands[verb](out))
    assert first.exit_code == 0, first.output + repr(first.exception)
    assert not lock.exists()
    before = {path: content for path, (_, content) in seen(out.parent).items()}
    assert before
    again = call(verb, commands[verb](out))
    assert again.exit_code == 0, again.output + repr(again.exception)
    after = {path: content for path, (_, content) in seen(out.parent).items()}
    if verb == "evaluate":  # how long it took
        assert after.keys() == before.keys()
    else:
        assert after == before


@pytest.mark.parametrize("verb", ["train", "merge", "convert", "export"])
def test_overwriting_replaces_a_result_and_names_the_stranger_in_it(commands, tmp_path, verb):
    out = output_of(verb, tmp_path)
    assert call(verb, commands[verb](out)).exit_code == 0
    (out / "notes.md").write_text("mine")
    before = seen(out)
    refused(call(verb, commands[verb](out), "--overwrite"), str(out), "notes.md")
    assert seen(out) == before
    (out / "notes.md").unlink()
    assert call(verb, commands[verb](out), "--overwrite").exit_code == 0
    assert all(path.lstat().st_mtime_ns != before[path][0] for path in seen(out))


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_another_model_is_replaced_only_where_that_is_asked_for(commands, tmp_path, verb):
    out = output_of(verb, tmp_path)
    assert call(verb, commands[verb](out)).exit_code == 0
    (out / "config_sentence_transformers.json").write_text("{}")
    refused(call(verb, commands[verb](out)), str(out), "--overwrite")
    assert call(verb, commands[verb](out), "--overwrite").exit_code == 0
    assert (out / "config_sentence_transformers.json").read_text() != "{}"


@pytest.mark.parametrize("verb", ["curate", "mine"])
def test_records_that_were_changed_by_hand_are_kept(commands, tmp_path, verb):
    out = output_of(verb, tmp_path)
    assert call(verb, commands[verb](out)).exit_code == 0
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"query": "mine", "pos": ["mine"]}\n')
    refused(call(verb, commands[verb](out)), str(out), "changed", "--overwrite")
    assert call(verb, commands[verb](out), "--overwrite").exit_code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("verb", ["train", "run", "mine", "curate"])
def test_temporary_files_of_others_are_not_swept(commands, tmp_path, verb):
    """A folder to work in may be anybody's: what looks like a left-over there is not known to be ours."""
    works_apart = verb in ("mine", "curate")
    output = output_of(verb, tmp_path) if works_apart else tmp_path / "place"
    place = output.with_name(f"{output.name}.work") if works_apart else output
    theirs = [place / ".git" / ".index.abcd1234.tmp", place / ".notes.abcd1234.tmp"]
    theirs[0].parent.mkdir(parents=True)
    for path in theirs:
        path.touch()
    assert call(verb, commands[verb](output)).exit_code == 0
    assert all(path.exists() for path in theirs)


def test_verbs_of_one_process_refuse_a_launcher(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in {*FOLDERS, *FILES} - {"train", "tokenize", "mine", "evaluate", "run"}:
        refused(call(verb, commands[verb](tmp_path / "out")), f"{verb} works in one process")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_its_journal_goes_on(commands, tmp_path):
    out = output_of("run", tmp_path)
    assert call("run", commands["run"](out)).exit_code == 0
    weights = out / "made" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (out / "pipeline.json").unlink()
    again = call("run", commands["run"](out))
    assert again.exit_code == 0, again.exception
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize("verb", ["train", "merge"])
def test_a_dry_run_looks_at_the_output_and_writes_nothing(commands, tmp_path, verb):
    out = output_of(verb, tmp_path)
    assert call(verb, commands[verb](out), "--dry-run").exit_code == 0
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(call(verb, commands[verb](out), "--dry-run"), str(out))
    with (tmp_path / "out" / ".free.embedsmith.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(call(verb, commands[verb](out.with_name("free")), "--dry-run"), "in use by another process")
    refused(call(verb, commands[verb](out / "thesis.tex" / "below"), "--dry-run"), "cannot write here")


def test_a_dry_run_reads_the_tasks(commands, tmp_path):
    out = output_of("train", tmp_path)
    arguments = [*commands["train"](out), "evaluate.tasks=[no-such-task]"]
    for more in (["--dry-run"], []):
        refused(call("train", arguments, *more), "no-such-task")
    assert not out.exists()


def test_the_modes_of_saved_files_follow_the_umask(model, tmp_path):
    before = os.umask(0o022)
    try:
        load(str(model)).save(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()} == {0o644}


def refusal(arguments):
    """What `train` says, on each of several ranks."""
    try:
        train(load_recipe(arguments[0], Recipe))
    except CheckpointError as error:
        return str(error)
    return ""


def test_all_ranks_learn_that_another_process_writes(commands, tmp_path):
    out = output_of("train", tmp_path)
    with out.with_name(f".{out.name}.embedsmith.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = on_ranks(2, refusal, tmp_path, commands["train"](out))
    assert all("in use by another process" in one for one in said)
    assert not out.exists()
