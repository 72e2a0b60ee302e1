"""The two evaluation scripts of the decoder reference, with their flags."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedsmith.compat.config import Reference, read_reference
from embedsmith.core.device import use_device
from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError
from embedsmith.core.recipe import read_tree
from embedsmith.evaluate.mteb.run import find_mteb_tasks, mteb_evaluate
from embedsmith.evaluate.mteb.tasks import SampleLimits
from embedsmith.evaluate.result import Results
from embedsmith.evaluate.tasks.kinds import is_beir, known_tasks
from embedsmith.models.lora import ADAPTER

Load = Callable[..., Encoder]

T2_PROMPT = "Instruct: Given a Chinese search query, retrieve web passages that answer the question\nQuery: "

PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "e5": ("intfloat/multilingual-e5-large-instruct", {"prompts": {"query": T2_PROMPT}}),
    "bge": ("BAAI/bge-m3", {"pooling": "cls"}),
    "qwen3embedding": ("Qwen/Qwen3-Embedding-0.6B", {"prompts": {"query": T2_PROMPT}}),
    "qwen3eos": ("Qwen/Qwen3-0.6B", {"pooling": "last", "prompts": {"query": T2_PROMPT}}),
}


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
    parser.add_argument("--config", type=Path, help="the flat config of the training: pooling, attention, LoRA, length")
    parser.add_argument("--ckpt_dir", help="the model's folder, or one with adapter/; by default the config's base")
    parser.add_argument("--tasks", nargs="+", default=["T2Retrieval"], help="names of mteb, or paths of local files")
    parser.add_argument("--task_langs", nargs="*", default=[], help="only these languages, such as cmn eng")
    _shared_flags(parser)
    flags = parser.parse_args(arguments)
    names = [name for text in flags.tasks for name in text.split(",") if name]
    if flags.config is None:
        if flags.ckpt_dir is None:
            raise EvaluationError("neither --ckpt_dir nor --config is given", fix="name the model: --ckpt_dir FOLDER")
        return _run(load, flags, names, flags.ckpt_dir, {})
    config = read_reference(read_tree(flags.config), (), flags.config)
    model, base = _checkpoint(flags.ckpt_dir, config)
    options = {key: value for key, value in config.encoding().items() if value is not None}
    return _run(load, flags, names, model, options | ({} if base is None else {"base": base}))


def _checkpoint(folder: str | None, config: Reference) -> tuple[str, str | None]:
    """What is scored, and the base of an adapter that does not lie where its own file says: the adapter in the folder,
    as the reference saves it below adapter/, else the folder itself under the adapter that the config names."""
    if folder is not None and (Path(folder) / "adapter" / ADAPTER).is_file():
        return str(Path(folder) / "adapter"), config.model_path
    if config.lora_enabled and config.lora_adapter_path and not (folder and (Path(folder) / ADAPTER).is_file()):
        return config.lora_adapter_path, folder or config.model_path
    return folder or config.model_path, None


def _shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, help="accepted; batches are sized by their tokens here")
    parser.add_argument("--limits", type=int, help="score this many queries, drawn at random, on the whole corpus")
    parser.add_argument("--corpus_limit", type=int, help="cut the corpus too; such a score is not comparable")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--device", help="cpu, cuda, cuda:0, or the number of a GPU")
    parser.add_argument(
        "--data", type=Path, help="a local folder for the task (corpus, queries, qrels), or with it in it"
    )
    parser.add_argument("--split", help="which judgements of a local folder; by default test, or the only ones")
    parser.add_argument("--query_instruction", help=r"put before every query; \n is a line break")
    parser.add_argument("--output_folder", type=Path, default=Path("mteb_results"))


def _run(load: Load, flags: argparse.Namespace, names: list[str], model: str, options: dict[str, Any]) -> Results:
    if flags.corpus_limit is not None and flags.limits is None:
        raise EvaluationError("--corpus_limit without --limits", fix="say how many queries to sample")
    if flags.query_instruction is not None:
        options["prompts"] = {"query": flags.query_instruction.replace("\\n", "\n")}
    if flags.device is not None:
        use_device(flags.device)
    limits = None if flags.limits is None else SampleLimits(flags.limits, flags.corpus_limit, flags.seed)
    tasks = _tasks(flags, names)
    return mteb_evaluate(load(model, **options), tasks, flags.output_folder, name=model, limits=limits)


def _tasks(flags: argparse.Namespace, names: list[str]) -> list[Any]:
    """The tasks, of local data where there is `--data`: the folder itself, for a single task, or what is in it."""
    languages, folder = getattr(flags, "task_langs", ()), flags.data
    if folder is None:
        return find_mteb_tasks(names, languages=languages, split=flags.split or "test")
    if is_beir(folder):
        if len(names) > 1:
            raise EvaluationError(f"--data {folder} is one task, and {len(names)} are named", fix="name one of them")
        names = [str(folder)]
    elif folder.is_dir() and (missing := [name for name in names if not os.path.exists(name)]):
        known = known_tasks(folder)
        absent = [n for n in missing if n not in known and f"{n}-{flags.split or 'test'}" not in known]
        if absent:
            raise EvaluationError(
                f"--data {folder} holds no {absent[0]}; found: {', '.join(known) or 'no tasks'}",
                expected=f"a folder with corpus.jsonl, queries.jsonl and qrels/, or with one of: {', '.join(names)}",
            )
    found: list[Any] = []
    for name in names:
        place = next((path for path in (Path(name), folder / name) if path.is_dir()), folder)
        splits = sorted({path.name.partition(".")[0] for path in place.glob("qrels/*.tsv*")})
        split = flags.split or (splits[0] if len(splits) == 1 else "test")  # or the only judgements that there are
        found += find_mteb_tasks([name], data=folder, split=split, languages=languages)
    return found
