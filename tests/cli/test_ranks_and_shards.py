"""Every verb whose work is shared: one process, ranks and shards give the same bytes, whoever is killed; and what goes
wrong among them is told."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import embedsmith as es
from embedsmith.core import sharing
from embedsmith.core.errors import CheckpointError, EmbedsmithError, EvaluationError, RecipeError, TrainingError
from embedsmith.core.sharing import OthersFirstError
from embedsmith.data import token_cache
from embedsmith.evaluate import encoding
from embedsmith.index.edge import EdgeStore
from embedsmith.mining import searchers
from embedsmith.models.encode_files import EncodeJob, encode_files
from embedsmith.search import approximate
from tests.ranks import on_ranks
from tests.tinybert import WORDS

VERBS = ("encode", "tokenize", "mine", "index", "evaluate")
SMALL = ((token_cache, "PART_ROWS", 7), (searchers, "PIECE", 16), (encoding, "PIECE", 16), (sharing, "_LOOK", 0.05))
SMALL += ((approximate, "_RUN", 16), (approximate, "_BLOCK_BYTES", 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory, bert, files):
    """A model, documents, pairs, scored pairs; and what one process makes of them."""
    folder = tmp_path_factory.mktemp("base")
    es.load(str(bert), pooling="mean").save(folder / "model")
    chance = random.Random(1)
    rows = [{"_id": f"d{n}", "text": " ".join(chance.sample(WORDS, chance.randint(1, 12)))} for n in range(60)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = (files / "pairs.jsonl").read_text().splitlines(keepends=True)
    pairs.insert(15, pairs[8])  # documents of the second part and of the third, which another shard makes before it
    (folder / "pairs.jsonl").write_text("".join(pairs))
    shutil.copy(files / "scored.jsonl", folder)
    with pytest.MonkeyPatch.context() as patch:
        for change in SMALL:
            patch.setattr(*change)
        for verb in VERBS:
            run(verb, folder, folder / "alone")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for change in SMALL:
        monkeypatch.setattr(*change)


def some(*verbs, slow=False):
    return [pytest.param(verb, marks=pytest.mark.slow if slow else ()) for verb in verbs]


def run(verb, base, out, model="model", **how):
    """One verb from Python, with parts of a few rows."""
    model, docs, pairs = str(base / model), str(base / "docs.jsonl"), str(base / "pairs.jsonl")
    if verb == "encode":
        job = EncodeJob(model, (Path(docs),), out / "vectors", block=8, stored="int8")
        return encode_files(job, **how)
    if verb == "tokenize":
        return es.tokenize(model=model, data=[pairs, str(base / "scored.jsonl")], out=out / "tokens", **how)
    if verb == "mine":
        how = {"select": {"negatives": 2, "near_duplicate": None}} | how
        place = {"output": str(out / "mined.jsonl"), "corpus": [{"path": docs}]}
        how = {
            "searchers": ["bm25", model, {"type": "embedding", "model": model, "index": "IVF3,Flat", "effort": 2}]
        } | how
        return es.mine(data=pairs, part=7, candidates=12, **place, **how)
    if verb == "index":
        return es.index(model, docs, to=out / "index", batch=8, **how)
    tasks = [str(base / "scored.jsonl"), str(base / "pairs.jsonl")]
    results = es.evaluate(model, tasks, cache=out / "kept", **how)
    if "shard" not in how and os.environ.get("RANK", "0") == "0":
        results.save(out / "scores.json", items=True)
    return results


def content(verb, out):
    """What a verb has made, as bytes where it promises these; without the time that it took."""
    if verb == "index":
        store = EdgeStore(out / "index", read_only=True)
        try:
            return store.sample("dense", 1000)
        finally:
            store.close()
    if verb in ("mine", "evaluate"):
        path = out / ("mined.report.json" if verb == "mine" else "scores.json")
        report = json.loads(path.read_text(), object_hook=lambda row: {k: v for k, v in row.items() if k != "seconds"})
        report.pop("output", None)
        return report, (out / "mined.jsonl").read_bytes() if verb == "mine" else None
    folder = out / ("vectors" if verb == "encode" else "tokens")
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(verb, base, out):
    assert content(verb, out) == content(verb, base / "alone")
    left = [path.name for path in out.iterdir() if "shard" in path.name or path.name.endswith("index.work")]
    assert not left, "notes, locks and parts are gone"


def on_one(verbs, base, out, kill=None):
    """What a rank does: all of the verbs; where it is the second, it is killed at its n-th write to the disk."""
    for change in SMALL:
        setattr(*change)
    write, count = os.fsync, [0]

    def killing(descriptor):
        count[0] += 1
        if os.environ["RANK"] == "1" and count[0] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor)

    os.fsync = killing
    told = []
    for verb in verbs:
        try:
            run(verb, base, out)
        except EmbedsmithError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.dist
def test_two_ranks_make_what_one_process_makes(base, tmp_path):
    assert on_ranks(2, on_one, tmp_path, VERBS, base, tmp_path) == [[], []]
    for verb in VERBS:
        same(verb, base, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_make_what_one_process_makes(base, tmp_path):
    assert on_ranks(4, on_one, tmp_path, VERBS, base, tmp_path) == [[]] * 4
    for verb in VERBS:
        same(verb, base, tmp_path)


def stopped_and_continued(verb, base, tmp_path, kill):
    """One of two ranks is killed; the other ends with an error of ours; the same command goes on, on two ranks."""
    (tmp_path / "out").mkdir()
    first, second = on_ranks(2, on_one, tmp_path, (verb,), base, tmp_path / "out", kill, may_die=True)
    if second is None:
        assert first is None or first == [] or "TrainingError" in first[0], first
    assert on_ranks(2, on_one, tmp_path, (verb,), base, tmp_path / "out") == [[], []]
    same(verb, base, tmp_path / "out")


@pytest.mark.dist
@pytest.mark.parametrize(("verb", "kill"), [("mine", 4)])
def test_a_killed_rank_loses_nothing(base, tmp_path, verb, kill):
    stopped_and_continued(verb, base, tmp_path, kill)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_rank_killed_again_and_again_loses_nothing(base, tmp_path, verb):
    """At its first write to the disk; when the work goes on at its second; then at its fourth."""
    (tmp_path / "out").mkdir()
    for kill in (1, 2, 4):
        on_ranks(2, on_one, tmp_path, (verb,), base, tmp_path / "out", kill, may_die=True)
        for path in tmp_path.glob("rank*.pt"):
            path.unlink()
    assert on_ranks(2, on_one, tmp_path, (verb,), base, tmp_path / "out") == [[], []]
    same(verb, base, tmp_path / "out")


def in_shards(verb, base, out, count=2):
    for index in [*range(count), *range(count)]:  # a shard of `mine` needs what the others have encoded
        try:
            run(verb, base, out, shard=(index, count))
        except OthersFirstError:
            assert verb == "mine"
            assert index < count - 1


@pytest.mark.parametrize("verb", VERBS)
def test_shards_make_what_one_process_makes(base, tmp_path, verb):
    in_shards(verb, base, tmp_path)
    run(verb, base, tmp_path, join=True)
    same(verb, base, tmp_path)
    run(verb, base, tmp_path, shard=(0, 2))  # a scheduler that starts one again after the end
    same(verb, base, tmp_path)


@pytest.mark.parametrize("verb", [*some("encode", "mine"), *some("tokenize", "index", "evaluate", slow=True)])
def test_a_shard_that_is_missing_is_named_and_the_plain_command_makes_it(base, tmp_path, verb):
    with pytest.raises(CheckpointError, match=r"no shard has begun|parts are not there"):
        run(verb, base, tmp_path, join=True)
    if verb == "mine":
        with pytest.raises(OthersFirstError, match="those of shard 0/3, 2/3, which are not at work"):
            run(verb, base, tmp_path, shard="1/3")
    else:
        run(verb, base, tmp_path, shard="1/3")
    with pytest.raises(CheckpointError, match=r"parts are not there: those of shard 0/3") as caught:
        run(verb, base, tmp_path, join=True)
    assert "--shard 0/3" in str(caught.value)
    run(verb, base, tmp_path)
    same(verb, base, tmp_path)


@pytest.mark.parametrize("verb", [*some("tokenize"), *some("encode", "mine", "index", "evaluate", slow=True)])
@pytest.mark.parametrize("kill", [2, 5])
def test_a_killed_shard_loses_nothing(base, tmp_path, verb, kill, monkeypatch):
    write, count = os.fsync, [0]

    def killing(descriptor):
        count[0] += 1
        if count[0] == kill:
            raise KeyboardInterrupt
        write(descriptor)

    monkeypatch.setattr(os, "fsync", killing)
    with pytest.raises((KeyboardInterrupt, OthersFirstError)):
        run(verb, base, tmp_path, shard=(0, 2))
        raise KeyboardInterrupt  # it had less to write
    monkeypatch.undo()
    for change in SMALL:
        monkeypatch.setattr(*change)
    in_shards(verb, base, tmp_path)
    run(verb, base, tmp_path, join=True)
    same(verb, base, tmp_path)


def test_another_number_of_shards_recipe_or_model_is_refused_and_the_fixes_work(base, tmp_path):
    run("encode", base, tmp_path, shard=(0, 2))
    note = tmp_path / "vectors.shards.json"
    with pytest.raises(
        CheckpointError, match=r"begun in 2 shards, not in 3(.|\n)*--shard I/2; or delete .*shards.json"
    ):
        run("encode", base, tmp_path, shard=(0, 3))
    model = es.load(str(base / "model"), device="cpu")
    model.backbone.embeddings.word_embeddings.weight.data[5] += 1
    model.save(tmp_path / "other")
    for how in ({"shard": (1, 2)}, {"join": True}):
        with pytest.raises(CheckpointError, match="begun with another weights"):
            run("encode", base, tmp_path, model=tmp_path / "other", **how)
    note.unlink()
    for index in range(3):
        run("encode", base, tmp_path, shard=(index, 3))
    run("encode", base, tmp_path, join=True)
    same("encode", base, tmp_path)
    with pytest.raises(OthersFirstError):
        run("mine", base, tmp_path, shard=(0, 2))
    other = {"select": {"negatives": 3, "near_duplicate": None}}
    with pytest.raises(CheckpointError, match=r"begun with another recipe\.select\.negatives"):
        run("mine", base, tmp_path, shard=(1, 2), **other)
    with pytest.raises(RecipeError, match="--overwrite with --shard"):
        run("mine", base, tmp_path, shard=(1, 2), overwrite=True)


def test_a_join_while_a_shard_works_and_a_shard_twice_are_refused(base, tmp_path):
    place = str(tmp_path / "vectors")
    program = f"""from embedsmith.core.outputs import claimed
with claimed({place!r}, "shards of encode that are at work", shared=True), claimed({place!r} + ".shard-1-of-2", "this"):
    input(1)
with claimed({place!r}, "encode"):
    input(2)"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as holder:
        assert holder.stdout.read(1) == b"1"
        for how in ({"join": True}, {}):
            with pytest.raises(CheckpointError, match="in use by shards of encode that are at work"):
                run("encode", base, tmp_path, **how)
        with pytest.raises(CheckpointError, match=f"in use by this, process {holder.pid}"):
            run("encode", base, tmp_path, shard="1/2")
        run("encode", base, tmp_path, shard="0/2")
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        assert holder.stdout.read(1) == b"2"
        with pytest.raises(CheckpointError, match=f"in use by encode, process {holder.pid}"):
            run("encode", base, tmp_path, join=True)  # another join is at work
        holder.communicate(b"\n")
    run("encode", base, tmp_path)
    same("encode", base, tmp_path)


def test_what_is_no_shard_is_told(base, tmp_path, typed):
    for wrong in ("2/2", "a/2", "1", "-1/2", "0/0"):
        with pytest.raises(RecipeError, match=r"counted from 0|I from 0 to N - 1"):
            run("encode", base, tmp_path, shard=wrong)
    with pytest.raises(RecipeError, match="a shard that joins"):
        run("encode", base, tmp_path, shard=(0, 2), join=True)
    scored = str(base / "scored.jsonl")
    with pytest.raises(EvaluationError, match="add --keep FOLDER"):
        es.evaluate(str(base / "model"), scored, shard=(0, 2))
    with pytest.raises(EvaluationError, match="shards of several widths"):
        es.evaluate(str(base / "model"), scored, dims=[8], cache=tmp_path / "kept", shard=(0, 2))
    given = ("encode", base / "docs.jsonl", tmp_path / "v", "--model", base / "model", "--block", 8)
    out, err, code = typed(*given, "--shard", "0/2")
    assert (code, out) == (0, "")
    assert "shard 0/2: its 4 of 8 parts are done" in err
    assert typed(*given, "--join")[2] == 1
    assert typed(*given, "--shard", "1/2")[2] == 0
    assert typed(*given, "--join")[0] == f"60 vectors in {tmp_path / 'v'}\n"


def refused_on_ranks(base, out):
    with pytest.raises(RecipeError, match="--shard under a launcher of 2 ranks"):
        run("encode", base, out, shard=(0, 2))
    job = EncodeJob(str(base / "model"), (base / "docs.jsonl",), out / "vectors", processes=2)
    with pytest.raises(RecipeError, match="leave --processes out"):
        encode_files(job)
    with pytest.raises((EmbedsmithError, TrainingError), match=r"no such|there is no"):
        run("encode", base, out, model="model" if os.environ["RANK"] == "0" else "nowhere")


@pytest.mark.dist
def test_ranks_have_no_shards_and_an_error_of_one_is_one_of_all(base, tmp_path):
    on_ranks(2, refused_on_ranks, tmp_path, base, tmp_path)
