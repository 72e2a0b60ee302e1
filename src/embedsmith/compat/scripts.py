"""The two evaluation scripts of the decoder reference, with their flags."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError
from embedsmith.core.inputs import read_typed
from embedsmith.evaluate.mteb.run import find_mteb_tasks, mteb_evaluate
from embedsmith.evaluate.mteb.tasks import SampleLimits
from embedsmith.evaluate.result import Results

Load = Callable[..., Encoder]

T2_PROMPT = "Instruct: Given a Chinese search query, retrieve web passages that answer the question\nQuery: "

PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "e5": ("intfloat/multilingual-e5-large-instruct", {"prompts": {"query": T2_PROMPT}}),
    "bge": ("BAAI/bge-m3", {"pooling": "cls"}),
    "qwen3embedding": ("Qwen/Qwen3-Embedding-0.6B", {"prompts": {"query": T2_PROMPT}}),
    "qwen3eos": ("Qwen/Qwen3-0.6B", {"pooling": "last", "prompts": {"query": T2_PROMPT}}),
}

_POOLINGS = {"eos": "last", "last": "last", "mean": "mean", "cls": "cls"}


def t2retrieval_command(load: Load, arguments: Sequence[str] | None = None) -> Results:
    """`evaluate_mteb_t2retrieval_models.py`: a known model on T2Retrieval under mteb."""
    parser = argparse.ArgumentParser(
        prog="evaluate_mteb_t2retrieval_models.py", description=t2retrieval_command.__doc__
    )
    parser.add_argument("--model", required=True, choices=sorted(PRESETS), help="which way of loading")
    parser.add_argument("--model_id", help="another folder or hub id, loaded the same way")
    _shared_flags(parser)
    flags = parser.parse_args(arguments)
    name, options = PRESETS[flags.model]
    model_id = flags.model_id or name
    return _run(load, flags, ["T2Retrieval"], model_id, dict(options))


def extractor_command(load: Load, arguments: Sequence[str] | None = None) -> Results:
    """`evaluate_extractor_mteb.py`: a trained checkpoint on tasks of mteb."""
    parser = argparse.ArgumentParser(prog="evaluate_extractor_mteb.py", description=extractor_command.__doc__)
    parser.add_argument("--config", type=Path, help="the JSON the model was trained with: length and pooling")
    parser.add_argument("--ckpt_dir", required=True, help="the model's folder")
    parser.add_argument("--tasks", nargs="+", default=["T2Retrieval"], help="names of mteb, or paths of local files")
    parser.add_argument("--task_langs", nargs="*", default=[], help="only these languages, such as cmn eng")
    _shared_flags(parser)
    flags = parser.parse_args(arguments)
    names = [name for text in flags.tasks for name in text.split(",") if name]
    return _run(load, flags, names, flags.ckpt_dir, {} if flags.config is None else _from_config(flags.config))


def _shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, help="accepted; batches are sized by their tokens here")
    parser.add_argument("--limits", type=int, help="score this many queries, drawn at random, on the whole corpus")
    parser.add_argument("--corpus_limit", type=int, help="cut the corpus too; such a score is not comparable")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--device", help="cpu, cuda, cuda:0, or the number of a GPU")
    parser.add_argument("--query_instruction", help=r"put before every query; \n is a line break")
    parser.add_argument("--output_folder", type=Path, default=Path("mteb_results"))


def _run(load: Load, flags: argparse.Namespace, names: list[str], model: str, options: dict[str, Any]) -> Results:
    if flags.corpus_limit is not None and flags.limits is None:
        raise EvaluationError("--corpus_limit without --limits", fix="say how many queries to sample")
    if flags.query_instruction is not None:
        options["prompts"] = {"query": flags.query_instruction.replace("\\n", "\n")}
    if flags.device is not None:
        options["device"] = f"cuda:{flags.device}" if flags.device.isdecimal() else flags.device
    limits = None if flags.limits is None else SampleLimits(flags.limits, flags.corpus_limit, flags.seed)
    tasks = find_mteb_tasks(names, languages=getattr(flags, "task_langs", ()))
    return mteb_evaluate(load(model, **options), tasks, flags.output_folder, name=model, limits=limits)


def _from_config(path: Path) -> dict[str, Any]:
    config = read_typed(path, _Config, EvaluationError)
    options: dict[str, Any] = {}
    if config.max_seq_length is not None:
        options["max_length"] = config.max_seq_length
    if config.pooling_mode is not None:
        if config.pooling_mode not in _POOLINGS:
            raise EvaluationError(f"pooling_mode is {config.pooling_mode!r}", where=path, expected="eos, mean or cls")
        options["pooling"] = _POOLINGS[config.pooling_mode]
    return options


@dataclass(frozen=True)
class _Config:
    """What is read of the flat config that a model was trained with."""

    max_seq_length: int | None = None
    pooling_mode: str | None = None
