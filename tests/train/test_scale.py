"""Sources on disk and streams in training, and bad input as a user meets it: on the command line."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedsmith.cli import main
from embedsmith.data import cache as storecache
from embedsmith.train import loop
from tests.core.test_files import tiny_disk
from tests.ranks import on_ranks
from tests.tinybert import WORDS, tiny_bert
from tests.train.test_loop import assert_equal_weights, metrics, run, weights

RECIPE = Path(__file__).parents[2] / "recipes" / "tokenize.yaml"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    """Three Parquet files of 40 rows, in row groups of 10."""
    chance = random.Random(0)
    text = lambda: " ".join(chance.sample(WORDS, chance.randint(2, 9)))
    (tmp_path / "shards").mkdir()
    for number in range(3):
        rows = [{"query": text(), "pos": [text()], "neg": [text()]} for _ in range(40)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / f"{number}.parquet", row_group_size=10)
    return tmp_path / "shards"


def streamed(tree, shards):
    return tree | {"data": [{"path": str(shards), "streaming": True, "buffer": 30, "batch_size": 8}]}


def test_training_from_disk_equals_training_from_memory(tree, tmp_path, monkeypatch):
    tree["train"] |= {"steps": 4, "log_with": []}
    run(tree)
    monkeypatch.setattr(storecache, "MEMORY_BYTES", 0)
    run(tree, output=str(tmp_path / "disk"))
    assert list((tmp_path / "cache" / "embedsmith" / "records").glob("*/records.arrow"))
    assert_equal_weights(weights(tree["output"]), weights(tmp_path / "disk"))


def test_a_stream_that_is_stopped_goes_on_with_the_same_batches(tree, shards, tmp_path, monkeypatch):
    """Again and again: 15 steps are an epoch, so the last two stops are around its end."""
    tree = streamed(tree, shards) | {"train": tree["train"] | {"steps": 17, "log_with": []}}
    run(tree, output=str(tmp_path / "whole"))
    update, stops = loop.update, [3, 14, 15]

    def dying(run_, parts):
        if run_.state.step in stops:
            stops.remove(run_.state.step)
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            run(tree)
    run(tree)
    assert_equal_weights(weights(tree["output"]), weights(tmp_path / "whole"))


def losses_of(tree):
    run(tree)
    return [line["loss/shards"] for line in metrics(tree["output"])]


@pytest.mark.dist
def test_two_ranks_of_a_stream_train_as_one(tree, shards, tmp_path):
    still = str(tiny_bert(tmp_path / "still", dropout=0.0))  # ranks draw dropout of their own
    model = tree["model"] | {"path": still}
    tree = streamed(tree, shards) | {"model": model, "train": tree["train"] | {"steps": 4, "log_with": []}}
    alone = losses_of(tree | {"output": str(tmp_path / "alone")})
    together = on_ranks(2, losses_of, tmp_path, tree)[0]
    assert together == pytest.approx(alone, abs=1e-5)


def command(capsys, monkeypatch, *arguments):
    """What the command prints to stderr, and its exit code."""
    monkeypatch.setattr("sys.argv", ["embedsmith", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return capsys.readouterr().err, caught.value.code


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *arguments: command(capsys, monkeypatch, *arguments)


def recipe_of(tree, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"train": tree["train"] | {"log_with": [], "steps": 4}}))
    return path


def with_fault(path, rows, at, fault):
    """A file of good rows with one that is not."""
    lines = [json.dumps({"query": f"q {n}", "pos": [f"p {n}"]}).encode() for n in range(rows)]
    lines[at] = fault
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("kept", ["memory", "disk"])
@pytest.mark.parametrize("fault", [b'{"query": "half a', '{"query": "q", "pos": ["é"]}'.encode("latin-1"), b"[]"])
def test_a_corrupt_row_in_the_middle_is_named_or_skipped_and_counted(tree, tmp_path, cli, caplog, fault, kept):
    path = with_fault(tmp_path / "big.jsonl", 2000, 1000, fault)
    tree["data"] = [{"path": str(path), "batch_size": 8} | ({"cache": str(tmp_path)} if kept == "disk" else {})]
    recipe = recipe_of(tree, tmp_path)
    error, code = cli("train", recipe)
    assert code == 1
    assert f"{path}:1001" in error
    assert "on_error: skip" in error
    assert "Traceback" not in error
    _, code = cli("train", recipe, "data.0.on_error=skip")
    assert code == 0
    assert "skipped 1 rows" in caplog.text
    assert "big.jsonl" in caplog.text


@pytest.mark.slow
def test_a_corrupt_row_in_the_middle_of_a_million(tree, tmp_path, cli, caplog):
    path = with_fault(tmp_path / "big.jsonl", 1_000_000, 500_000, b"{broken")
    tree["data"] = [{"path": str(path), "batch_size": 8}]
    error, _ = cli("train", recipe_of(tree, tmp_path))
    assert f"{path}:500001: not valid JSON" in error
    _, code = cli("train", recipe_of(tree, tmp_path), "data.0.on_error=skip")
    assert code == 0
    assert "skipped 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no records in it"),
        (b"\n\n", "no records in it"),
        ('{"query": "q", "pos": ["p"]}'.encode("utf-16"), "UTF-16"),
        (None, "no such file"),
    ],
)
def test_files_that_hold_nothing_to_read_are_named(tree, tmp_path, cli, content, message):
    path = tmp_path / "empty.jsonl"
    if content is not None:
        path.write_bytes(content)
    error, code = cli("train", recipe_of(tree | {"data": [{"path": str(path)}]}, tmp_path))
    assert code == 1
    assert str(path) in error
    assert message in error


def test_duplicate_ids_are_named(tree, tmp_path, cli):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "q"}\n')
    (folder / "corpus.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n")
    error, code = cli("train", recipe_of(tree | {"data": [{"path": str(folder)}]}, tmp_path))
    assert code == 1
    assert "corpus.jsonl:2: the id 'a' appears twice" in error


@pytest.mark.parametrize("kept", ["memory", "disk", "stream"])
def test_a_run_whose_file_changed_is_not_continued(tree, shards, files, tmp_path, cli, monkeypatch, kept):
    if kept == "stream":
        path, source = shards / "1.parquet", streamed(tree, shards)["data"][0]
    else:
        path = tmp_path / "grows.jsonl"
        path.write_text((files / "pairs.jsonl").read_text())
        source = {"path": str(path), "batch_size": 8} | ({"cache": str(tmp_path / "kept")} if kept == "disk" else {})
    tree |= {"data": [source]}
    whole, update = path.read_bytes(), loop.update

    def dying(run_, parts):
        if run_.state.step == 3:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    cli("train", recipe_of(tree, tmp_path))
    monkeypatch.setattr(loop, "update", update)
    if kept == "stream":
        pq.write_table(pa.concat_tables([pq.read_table(path)] * 2), path, row_group_size=10)
    else:
        path.write_bytes(whole + whole.splitlines(keepends=True)[0])
    error, code = cli("train", recipe_of(tree, tmp_path))
    assert code == 1
    assert ("120 rows before, 160 now" if kept == "stream" else "grows: 40 rows before, 41 now") in error
    path.unlink()
    error, code = cli("train", recipe_of(tree, tmp_path))
    assert code == 1
    if kept != "stream":
        assert str(path) in error
        assert ("the source is gone" if kept == "disk" else "no such file") in error
    path.write_bytes(whole)
    _, code = cli("train", recipe_of(tree, tmp_path))
    assert code == 0


def test_a_disk_that_fills_while_caching_is_one_error_and_there_is_a_way_on(tree, tmp_path, cli):
    path = with_fault(tmp_path / "big.jsonl", 20_000, 5, b'{"query": "q", "pos": ["p"]}')
    with tiny_disk(tmp_path) as disk:
        tree["data"] = [{"path": str(path), "batch_size": 8, "cache": str(disk)}]
        error, code = cli("train", recipe_of(tree, tmp_path))
        assert code == 1
        assert "no space left on the disk" in error
        assert str(disk) in error
    _, code = cli("train", recipe_of(tree, tmp_path), f"data.0.cache={tmp_path / 'roomy'}")
    assert code == 0


def test_a_disk_that_fills_while_tokenizing_is_one_error_and_the_command_goes_on(tree, tmp_path, cli):
    path = with_fault(tmp_path / "big.jsonl", 20_000, 5, b'{"query": "q", "pos": ["p"]}')
    with tiny_disk(tmp_path) as disk:
        error, code = cli("tokenize", path, "-m", tree["model"]["path"], "-o", disk / "tokens")
        assert code == 1
        assert "no space left on the disk" in error
    _, code = cli("tokenize", path, "-m", tree["model"]["path"], "-o", tmp_path / "tokens")
    assert code == 0


def test_a_model_of_another_tokenizer_is_refused_on_the_command_line(tree, tmp_path, cli, files):
    _, code = cli("tokenize", files / "pairs.jsonl", "-m", tree["model"]["path"], "-o", tmp_path / "tokens")
    assert code == 0
    manifest = tmp_path / "tokens" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0'))
    tree["data"] = [{"path": str(tmp_path / "tokens"), "batch_size": 8}]
    error, code = cli("train", recipe_of(tree, tmp_path))
    assert code == 1
    assert error.count("sha256") == 2
    error, code = cli("tokenize", files / "pairs.jsonl", "-o", tmp_path / "tokens")
    assert (code, "--model is missing" in error) == (1, True)


def test_tokenize_reads_its_recipe(tree, tmp_path, cli, files):
    changes = [f"data.{place}.path={files / name}.jsonl" for place, name in enumerate(("pairs", "scored"))]
    changes += ["model.max_length=16", "model.pooling=mean", f"out={tmp_path / 'tokens'}"]
    given = [part for change in changes for part in ("--set", change)]
    _, code = cli("tokenize", RECIPE, "-m", tree["model"]["path"], *given, "--layout", "inline")
    assert code == 0
    names = ["manifest.json", "pairs.parquet", "scored.parquet"]
    assert sorted(found.name for found in (tmp_path / "tokens").iterdir()) == names
