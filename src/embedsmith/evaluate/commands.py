"""What the evaluation verbs of the command line do, and the two commands of the decoder reference.

A model comes in through `load`, since this room knows no models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate.compare import Comparison, compare
from embedsmith.evaluate.heads import HeadScores, score_heads
from embedsmith.evaluate.load import load_task
from embedsmith.evaluate.mteb_run import find_mteb_tasks, mteb_evaluate
from embedsmith.evaluate.mteb_tasks import Limits
from embedsmith.evaluate.result import Results
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks import Task
from embedsmith.evaluate.widths import FULL, score_widths
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.hybrid import M3_WEIGHTS, HybridEncoder

Load = Callable[..., Encoder]


@dataclass(frozen=True)
class Scoring:
    """How the verbs score a model. `keep`: a folder for results and vectors, so that a stopped command continues."""

    tasks: tuple[str, ...]
    data: Path | None = None
    split: str = "test"
    head: str = "dense"
    keep: Path | None = None
    weights: Mapping[str, float] | None = None

    def score(self, encoder: Encoder, about: Mapping[str, Any]) -> Results:
        """The model on all tasks, with our own evaluator."""
        loaded = self._load(self.tasks)
        if self.head == "hybrid":
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        if self.keep is None:
            return evaluate(encoder, loaded, head=self.head, about=about)
        cached = CachedEncoder.of(encoder, self.keep / "vectors")
        return evaluate(cached, loaded, head=self.head, about=about, keep=self.keep / "results")

    def side_by_side(
        self, encoder: Encoder, heads: Sequence[str], tune_on: Sequence[str], about: Mapping[str, Any]
    ) -> HeadScores:
        """Every head alone and heads together, on all tasks; weights tuned on the dev split of `tune_on`."""
        loaded, dev = self._load(self.tasks), self._load(tune_on, "dev")
        if same := [one.name for one in dev if one in loaded]:
            raise EvaluationError(f"weights tuned on {same[0]} and reported on it", fix="tune on another task")
        return score_heads(encoder, loaded, heads, weights=self.weights, tune_on=dev, about=about, keep=self.keep)

    def at_widths(self, encoder: Encoder, widths: Sequence[int], about: Mapping[str, Any]) -> HeadScores:
        """The whole vectors and their first numbers, on all tasks."""
        return score_widths(encoder, self._load(self.tasks), widths, about=about, keep=self.keep)

    def _load(self, names: Sequence[str], split: str | None = None) -> list[Task]:
        return [load_task(name, data_dir=self.data, split=split or self.split) for name in names]

    def with_mteb(self, encoder: Encoder, model: str, output: Path, limits: Limits | None) -> Results:
        """The model on all tasks, with mteb."""
        chosen = find_mteb_tasks(self.tasks, data=self.data, split=self.split)
        if self.head == "hybrid":
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        return mteb_evaluate(encoder, chosen, output, name=model, head=self.head, limits=limits)


def compare_models(models: Sequence[str], scoring: Scoring, load: Load, widths: Sequence[int] = ()) -> Comparison:
    """Models by folder or hub id, or results by file (`evaluate --items --json`), the one to measure against first.
    With `widths` every model is scored at those widths too.

    Errors: `EvaluationError` for fewer than two to compare, and results of other tasks.
    """
    if len(models) < 2 and not widths:
        raise EvaluationError(f"{len(models)} model given", expected="two or more")
    scored: list[tuple[str, Results]] = []
    for name in models:
        if name.endswith(".json"):
            results = Results.load(name)
            scored.append((name, _chosen(results, scoring, name)))
        elif widths:
            columns = scoring.at_widths(load(name), widths, {"model": name}).columns
            scored += [(name if width == FULL else f"{name} at {width}", each) for width, each in columns.items()]
        else:
            scored.append((name, scoring.score(load(name), {"model": name})))
    return compare(scored)


def _chosen(results: Results, scoring: Scoring, name: str) -> Results:
    """The asked tasks of a file with results; all of them where none was asked for."""
    wanted = [Path(task).name.removesuffix(".jsonl") for task in scoring.tasks]
    found = {result.task: result for result in results}
    if missing := [task for task in wanted if task not in found]:
        raise EvaluationError(f"no result for {missing[0]!r}", where=name, expected=", ".join(found))
    return Results(tuple(found[task] for task in wanted) or results.tasks, results.about)


T2_PROMPT = "Instruct: Given a Chinese search query, retrieve web passages that answer the question\nQuery: "

PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "e5": ("intfloat/multilingual-e5-large-instruct", {"prompts": {"query": T2_PROMPT}}),
    "bge": ("BAAI/bge-m3", {"pooling": "cls"}),
    "qwen3embedding": ("Qwen/Qwen3-Embedding-0.6B", {"prompts": {"query": T2_PROMPT}}),
    "qwen3eos": ("Qwen/Qwen3-0.6B", {"pooling": "last", "prompts": {"query": T2_PROMPT}}),
}
"""The models of the reference's table: the id, and how to load it."""

_POOLINGS = {"eos": "last", "last": "last", "mean": "mean", "cls": "cls"}


def t2retrieval_command(load: Load, arguments: Sequence[str] | None = None) -> Results:
    """`evaluate_mteb_t2retrieval_models.py`: a known model on T2Retrieval under mteb."""
    parser = argparse.ArgumentParser(
        prog="evaluate_mteb_t2retrieval_models.py", description=t2retrieval_command.__doc__
    )
    parser.add_argument("--model", required=True, choices=sorted(PRESETS), help="which way of loading")
    parser.add_argument("--model_id", help="another folder or hub id, loaded the same way")
    _shared_flags(parser)
    said = parser.parse_args(arguments)
    name, options = PRESETS[said.model]
    model_id = said.model_id or name
    return _run(load, said, ["T2Retrieval"], model_id, dict(options))


def extractor_command(load: Load, arguments: Sequence[str] | None = None) -> Results:
    """`evaluate_extractor_mteb.py`: a trained checkpoint on tasks of mteb."""
    parser = argparse.ArgumentParser(prog="evaluate_extractor_mteb.py", description=extractor_command.__doc__)
    parser.add_argument("--config", type=Path, help="the JSON the model was trained with: length and pooling")
    parser.add_argument("--ckpt_dir", required=True, help="the model's folder")
    parser.add_argument("--tasks", nargs="+", default=["T2Retrieval"], help="names of mteb, or paths of local files")
    parser.add_argument("--task_langs", nargs="*", default=[], help="only these languages, such as cmn eng")
    _shared_flags(parser)
    said = parser.parse_args(arguments)
    names = [name for text in said.tasks for name in text.split(",") if name]
    return _run(load, said, names, said.ckpt_dir, {} if said.config is None else _from_config(said.config))


def _shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, help="accepted; batches are sized by their tokens here")
    parser.add_argument("--limits", type=int, help="score this many queries, drawn at random, on the whole corpus")
    parser.add_argument("--corpus_limit", type=int, help="cut the corpus too; such a score is not comparable")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--device", help="cpu, cuda, cuda:0, or the number of a GPU")
    parser.add_argument("--query_instruction", help=r"put before every query; \n is a line break")
    parser.add_argument("--output_folder", type=Path, default=Path("mteb_results"))


def _run(load: Load, said: argparse.Namespace, names: list[str], model: str, options: dict[str, Any]) -> Results:
    if said.corpus_limit is not None and said.limits is None:
        raise EvaluationError("--corpus_limit without --limits", fix="say how many queries to sample")
    if said.query_instruction is not None:
        options["prompts"] = {"query": said.query_instruction.replace("\\n", "\n")}
    if said.device is not None:
        options["device"] = f"cuda:{said.device}" if said.device.isdecimal() else said.device
    limits = None if said.limits is None else Limits(said.limits, said.corpus_limit, said.seed)
    tasks = find_mteb_tasks(names, languages=getattr(said, "task_langs", ()))
    return mteb_evaluate(load(model, **options), tasks, said.output_folder, name=model, limits=limits)


def _from_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read the configuration ({error})", where=path) from error
    options: dict[str, Any] = {}
    if "max_seq_length" in config:
        options["max_length"] = int(config["max_seq_length"])
    if config.get("pooling_mode") is not None:
        if config["pooling_mode"] not in _POOLINGS:
            raise EvaluationError(
                f"pooling_mode is {config['pooling_mode']!r}", where=path, expected="eos, mean or cls"
            )
        options["pooling"] = _POOLINGS[config["pooling_mode"]]
    return options
