"""A tiny valid input of every kind of file, and a valid command of every verb that reads or writes some."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.faults.server import Server
from tests.tinybert import WORDS, tiny_bert


@dataclass(frozen=True)
class Command:
    """A command that works in a workplace. `reads`: the files it reads, so that what is wrong with one must be said;
    `looks`: files it may read. `makes`: the files of its result, which are the same every time; what it `prints` is
    if that is all there is. `out`: what it writes to. `shown`: a command that prints what was made, where files cannot
    be compared."""

    name: str
    args: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()
    out: str | None = None
    prints: bool = False
    shown: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        return self.args[0]


def _command(name: str, line: str, reads: str = "", **options: Any) -> Command:
    """A command as it is typed, and the files it reads as a line."""
    lists = {key: tuple(value.split()) for key, value in options.items() if key in ("makes", "looks", "shown")}
    return Command(name, tuple(line.split()), tuple(reads.split()), **(options | lists))


_ENCODER = "model/config.json model/model.safetensors model/tokenizer.json model/modules.json"
_ASIDE = "model/*.json model/1_Pooling/config.json"
_HEADS = "m3/config.json m3/model.safetensors m3/tokenizer.json"
_BEIR = "tasks/beir/corpus.jsonl tasks/beir/queries.jsonl tasks/beir/qrels/test.tsv"
_PARENT = "parent/config.json parent/model.safetensors"

MAKING = (
    _command(
        "convert",
        "convert bert converted pooling=mean",
        "bert/config.json bert/model.safetensors bert/tokenizer.json",
        makes="converted/*.safetensors converted/**/*.json",
        looks="bert/*.json",
        out="converted",
    ),
    _command(
        "export",
        "export m3 exported --head sparse",
        _HEADS,
        makes="exported/**/*.safetensors exported/**/*.json",
        looks="m3/*.json m3/*.safetensors m3/*/*",
        out="exported",
    ),
    _command(
        "encode",
        "encode texts.txt docs.jsonl vectors --model model --block 8",
        f"texts.txt docs.jsonl {_ENCODER}",
        makes="vectors/vectors.npy vectors/ids.txt",
        looks=_ASIDE,
        out="vectors",
    ),
    _command(
        "encode int8",
        "encode texts.csv vectors8 --model model --block 8 --stored int8 --column text",
        "texts.csv",
        makes="vectors8/vectors.npy vectors8/ranges.npy",
        out="vectors8",
    ),
    _command(
        "tokenize",
        "tokenize tokenize.yaml",
        "tokenize.yaml pairs.jsonl scored.jsonl model/tokenizer.json",
        makes="tokens/*.parquet tokens/manifest.json",
        looks=_ASIDE,
        out="tokens",
    ),
    _command(
        "curate",
        "curate curate.yaml",
        "curate.yaml pairs.jsonl",
        makes="curated.jsonl",
        looks=_ASIDE,
        out="curated.jsonl",
    ),
    _command(
        "mine",
        "mine mine.yaml",
        f"mine.yaml pairs.jsonl {_ENCODER}",
        makes="mined.jsonl",
        looks=_ASIDE,
        out="mined.jsonl",
    ),
    _command(
        "train",
        "train train.yaml",
        f"train.yaml pairs.jsonl scored.jsonl {_ENCODER}",
        makes="run/model/*.safetensors run/model/**/*.json",
        looks=_ASIDE,
        out="run",
    ),
    _command(
        "merge",
        "merge merge.yaml",
        f"merge.yaml model/config.json model/model.safetensors {_PARENT}",
        makes="merged/*.safetensors",
        looks=f"parent/*.json {_ASIDE}",
        out="merged",
    ),
    _command(
        "index",
        "index m3 docs.jsonl --to index --batch 4",
        f"docs.jsonl {_HEADS}",
        looks="m3/*.json m3/*.safetensors m3/*/*",
        out="index",
        shown="search cat --index index --json",
    ),
    _command(
        "evaluate",
        "evaluate model graded beir --data tasks --json scores.json --keep kept --items",
        f"tasks/sts/graded.jsonl {_BEIR} {_ENCODER}",
        makes="scores.json",
        looks=_ASIDE,
        out="kept",
    ),
    _command(
        "run",
        "run run.yaml",
        f"run.yaml pairs.jsonl {_ENCODER}",
        makes="pipeline/clean.jsonl pipeline/hard.jsonl pipeline/final/model/*.safetensors",
        looks=_ASIDE,
        out="pipeline",
    ),
)
"""Commands that write; each works in a workplace without its `out`, and again in one with it."""

_INSPECTED = "pairs.jsonl pairs.json pairs.csv pairs.tsv pairs.parquet pairs.jsonl.gz scored.jsonl"

READING = (
    *(_command(f"inspect {name}", f"inspect {name} --json", name, prints=True) for name in _INSPECTED.split()),
    _command("inspect beir", "inspect tasks/beir split=test --json", _BEIR, prints=True),
    _command(
        "inspect recipe",
        "inspect train.yaml --no-time --json",
        f"train.yaml pairs.jsonl {_ENCODER}",
        looks=_ASIDE,
        prints=True,
    ),
    _command(
        "inspect tokens", "inspect tokens split=pairs --json", "tokens/manifest.json", looks="tokens/*", prints=True
    ),
    _command("train dry", "train train.yaml --dry-run output=dry", "train.yaml", looks=_ASIDE),
    _command(
        "train tokens",
        "train train-tokens.yaml",
        "train-tokens.yaml tokens/manifest.json tokens/pairs_*",
        makes="run-tokens/model/*.safetensors",
        looks="tokens/*",
        out="run-tokens",
    ),
    _command(
        "train on",
        "train train.yaml train.steps=3 output=stopped",
        "train.yaml",
        makes="stopped/model/*.safetensors",
        looks="stopped/* stopped/checkpoints/*/* stopped/checkpoints/*/model/*",
    ),
    _command("merge dry", "merge merge.yaml --dry-run", "merge.yaml", looks="parent/*", prints=True),
    _command(
        "search",
        "search cat --index index --json -k 3",
        "index/embedsmith_index.json",
        looks="index/**/* m3/*",
        prints=True,
    ),
    _command("search file", "search --file queries.jsonl --index index --json", "queries.jsonl", prints=True),
    _command(
        "compare",
        "compare model parent -t graded --data tasks --json compared.json",
        f"tasks/sts/graded.jsonl {_PARENT}",
        makes="compared.json",
        looks="parent/**/*",
    ),
    _command(
        "compare results", "compare scores.json scores2.json --json again.json", "scores.json", makes="again.json"
    ),
    _command(
        "geometry",
        "geometry model -t texts.txt --texts 20 --json shape.json",
        f"texts.txt {_ENCODER}",
        makes="shape.json",
        looks=_ASIDE,
    ),
    _command("report", "report run", looks="run/* run/model/*"),
    _command("push", "push model someone/something", looks="model/*"),
    _command(
        "encode on",
        "encode texts.txt docs.jsonl vectors --model model --block 8",
        makes="vectors/vectors.npy",
        looks="vectors/*",
    ),
    _command("evaluate on", "evaluate model graded beir --data tasks --keep kept", looks="kept/**/*"),
    _command("tokenize on", "tokenize tokenize.yaml", looks="tokens/*"),
    _command("run on", "run run.yaml", "pipeline/pipeline.json", looks="pipeline/*.json"),
    _command("curate on", "curate curate.yaml", looks="curated* curated*/**/*"),
    _command("mine on", "mine mine.yaml", looks="mined* mined*/**/*"),
    _command("index on", "index m3 docs.jsonl --to index", "index/embedsmith_index.json", looks="index/**/*"),
)
"""Commands of a workplace where all of `MAKING` have run: they read, or go on."""


def _rows() -> dict[str, list[dict[str, Any]]]:
    chance = random.Random(0)
    text = lambda: " ".join(chance.sample(WORDS, chance.randint(2, 7)))
    return {
        "pairs": [{"query": text(), "pos": [text()], "neg": [text(), text()]} for _ in range(20)],
        "scored": [{"text1": text(), "text2": text(), "score": round(chance.random(), 2)} for _ in range(12)],
        "docs": [{"_id": f"d{n}", "title": text(), "text": text(), "lang": "en"} for n in range(12)],
        "queries": [{"_id": f"q{n}", "text": text()} for n in range(6)],
    }


def _recipes() -> dict[str, Any]:
    steps = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "log_every": 1, "precision": "fp32", "log_with": []}
    sources = [{"path": "pairs.jsonl", "negatives": 1}, {"path": "scored.jsonl", "task": "sts", "score_range": [0, 1]}]
    model = {"path": "model", "max_length": 16}
    searchers = [{"type": "embedding", "model": "model"}, {"type": "bm25"}]
    mine = {"searchers": searchers, "candidates": 6, "select": {"negatives": 2}, "part": 8}
    clean = [{"type": "length", "query_min": 3}, {"type": "exact_duplicates"}]
    scored = {"type": "score_filter", "model": "model", "threshold": -1.0}
    parents = [{"path": "model", "id": "one"}, {"path": "parent", "id": "two", "weight": 0.5}]
    return {
        "train": {"model": model, "data": sources, "train": steps, "output": "run"},
        "train-tokens": {
            "model": model,
            "data": [{"path": "tokens", "split": "pairs"}],
            "train": steps,
            "output": "run-tokens",
        },
        "mine": {"data": {"path": "pairs.jsonl"}, "output": "mined.jsonl", **mine},
        "curate": {"input": {"path": "pairs.jsonl"}, "output": "curated.jsonl", "steps": [*clean, scored]},
        "tokenize": {"model": model, "data": sources, "out": "tokens"},
        "merge": {"parents": parents, "base": "base", "method": {"type": "slerp"}, "output": "merged"},
        "run": {
            "output": "pipeline",
            "stages": [
                {"name": "clean", "verb": "curate", "recipe": {"input": {"path": "pairs.jsonl"}, "steps": clean}},
                {"name": "hard", "verb": "mine", "recipe": {"data": {"path": "${clean}"}, **mine}},
                {
                    "name": "final",
                    "verb": "train",
                    "recipe": {"model": model, "data": [{"path": "${hard}"}], "train": steps},
                },
            ],
        },
    }


def _models(folder: Path) -> None:
    import torch

    from embedsmith.models import load

    bert = tiny_bert(folder / "bert", dropout=0.0)
    heads = ("dense", "sparse", "multivector")
    load(str(bert), pooling="mean", heads=heads, multivector_dim=8, new_heads=True, device="cpu").save(folder / "m3")
    model = load(str(bert), pooling="mean", device="cpu", prompts={"query": "the "})
    torch.manual_seed(0)
    for name in ("base", "model", "parent"):
        model.save(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))


def _data(folder: Path) -> None:
    rows = _rows()
    lines = {name: "".join(json.dumps(row) + "\n" for row in each) for name, each in rows.items()}
    flat = [{"query": row["query"], "positives": row["pos"][0], "negatives": row["neg"][0]} for row in rows["pairs"]]
    for mark, ending in ((",", "csv"), ("\t", "tsv")):
        table = "".join(mark.join(row.values()) + "\n" for row in flat)
        (folder / f"pairs.{ending}").write_text(mark.join(flat[0]) + "\n" + table)
    for name in lines:
        (folder / f"{name}.jsonl").write_text(lines[name])
    (folder / "pairs.json").write_text(json.dumps(rows["pairs"]))
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines["pairs"].encode(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows["pairs"]), folder / "pairs.parquet")
    (folder / "texts.txt").write_text("".join(f"{row['text1']}\n" for row in rows["scored"]))
    (folder / "texts.csv").write_text("text\n" + "".join(f"{row['text2']}\n" for row in rows["scored"]))
    beir = folder / "tasks" / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(lines["docs"])
    (beir / "queries.jsonl").write_text(lines["queries"])
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(6))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    (folder / "tasks" / "sts").mkdir()
    (folder / "tasks" / "sts" / "graded.jsonl").write_text(lines["scored"])


def furnish(folder: Path) -> Path:
    """Write the inputs of every command to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _data(folder)
    _models(folder)
    for name, tree in _recipes().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


def use(server: Server, folder: Path) -> dict[str, float]:
    """Run every command of `MAKING` in its order, and a training that is stopped; seconds of each."""
    seconds = {}
    for command in MAKING:
        outcome = server.one(command.args, folder)
        if outcome.code != 0:
            raise RuntimeError(f"{' '.join(command.args)} does not work: {outcome.text}")
        seconds[command.name] = outcome.seconds
    server.one(("train", "train.yaml", "train.steps=3", "output=stopped"), folder, kill_at=("rename", 3))
    (folder / "scores2.json").write_bytes((folder / "scores.json").read_bytes())
    return seconds
