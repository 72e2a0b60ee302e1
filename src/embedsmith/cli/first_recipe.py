"""`embedsmith init --data`: files are looked at, a part of each is held out, and a recipe is written that says why each
of its numbers is what it is.

    look    what a file holds: its task, its rows, how long its texts are, in which script
    choose  task and loss a source, batch, length, learning rate, steps
    write   the held-out parts and the recipe with its reasons
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import claimed, refuse_foreign_file
from embedsmith.core.recipe import apply_override, parse
from embedsmith.core.shipped import shipped_named
from embedsmith.core.tokens import IntArray
from embedsmith.core.words import runs
from embedsmith.data import RecordSet, Source, read_source, row_facts
from embedsmith.data.source import source_name
from embedsmith.data.split import NO_PART, Split, split_source

SAMPLE = 2000
"""Rows whose texts are measured, spread over the file."""
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
HELD_OUT, LEAST_ROWS = 0.1, 20
"""The share of the rows that is scored on, and the rows below which nothing is held out."""
FEW_ROWS = 100
"""Rows below which a model learns little."""
ENGLISH = "sentence-transformers/all-MiniLM-L6-v2"
CHINESE = "BAAI/bge-small-zh-v1.5"
OTHERS = "intfloat/multilingual-e5-small"
_WHY_MODEL = {
    ENGLISH: "  # small and quick, for English",
    CHINESE: "  # small and quick, for Chinese",
    OTHERS: "  # small, for texts of many languages",
}
_LOSSES = {
    "retrieval": ("{type: infonce, temperature: 0.05}", "each query is told from the answers of the other rows"),
    "sts": ("{type: cosent, temperature: 0.05}", "pairs are put into the order of their scores"),
    "classification": ("{type: supervised_contrastive}", "texts of one class come together"),
    "clustering": ("{type: supervised_contrastive}", "texts of one class come together"),
}
MARK = "# Written by embedsmith init"


@dataclass(frozen=True)
class Looked:
    """What a file was found to hold.

    `lengths`: tokens of sampled texts; `unspaced`: the share of their letters that is in a script without spaces, such
    as Chinese; `latin`: the share of plain Latin words among the others; `negatives`: the most that a row has;
    `repeats`: rows of the query or positive that most rows have.
    """

    source: Source
    found: RecordSet
    lengths: IntArray
    unspaced: float
    latin: float
    negatives: int
    repeats: int

    @property
    def rows(self) -> int:
        return len(self.found.records)


@dataclass(frozen=True)
class FirstRecipe:
    """The text of a recipe, and what is said on the terminal."""

    text: str
    said: tuple[str, ...]


def first_recipe(
    data: Sequence[str], folder: Path, model: str | None, overwrite: bool = False, read_as: Sequence[str] = ()
) -> tuple[Path, str]:
    """Look at the files, hold out a part of each, write `folder/recipe.yaml`. Returns its path and what to tell.
    `read_as`: settings of all of them, `key=value`.

    Errors: those of reading a source; `RecipeError` for a task without a loss; `CheckpointError` for a recipe or a
    split that is there already and that `overwrite` does not replace.
    """
    path = folder / "recipe.yaml"
    with claimed(path, "init"):
        refuse_another(path, overwrite)
        sources = _named_apart(data, read_as)
        if not model:  # by the script of the texts
            shown = [_looked(source, None) for source in sources]
            if max(one.unspaced for one in shown) > 0.3:
                model = CHINESE
            else:
                model = ENGLISH if min(one.latin for one in shown) > 0.95 else OTHERS
        tokenizer = _tokenizer_of(model)
        looked = [_looked(source, tokenizer) for source in sources]
        splits = [_split(one, folder, overwrite) for one in looked]
        made = _recipe(looked, splits, model, tokenizer is not None, folder)
        with atomic_file(path) as file:
            file.write(made.text)
    return path, "\n".join((*made.said, f"recipe: {path}", f"next: embedsmith train {path} --dry-run, and without it"))


def _named_apart(data: Sequence[str], read_as: Sequence[str]) -> list[Source]:
    """Files of one name in two folders get numbers: what is held out of them lies under their names."""
    settings: dict[str, Any] = {}
    for setting in read_as:
        apply_override(settings, setting)
    names = [source_name(Source(path=one)) for one in data]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    apart = (f"{name}-{count}" if count > 1 else name for name, count in zip(names, counts))
    return [parse(Source, {**settings, "path": one, "name": name}, where="init") for one, name in zip(data, apart)]


def refuse_another(path: Path, overwrite: bool) -> None:
    """Errors: `CheckpointError` for what stands at `path` already, unless init wrote it and it is to be replaced."""
    refuse_foreign_file(path, MARK)
    if path.exists() and not overwrite:
        fix = "replace it with --overwrite, or name another folder"
        raise CheckpointError("there is a recipe already", where=path, fix=fix)


def copy_recipe(name: str, folder: Path, overwrite: bool = False) -> Path:
    """A shipped recipe under its own name in a folder. Errors: `RecipeError` for a name that is none; `CheckpointError`
    for a file that is there already."""
    shipped = shipped_named(name).path
    path = folder / shipped.name
    with claimed(path, "init"):
        refuse_another(path, overwrite)
        with atomic_file(path) as file:
            file.write(f"{MARK}: a copy of the recipe {name} that ships.\n{shipped.read_text(encoding='utf-8')}")
    return path


# Look.


def _looked(source: Source, tokenizer: Any) -> Looked:
    found = read_source(source).texts_only("init", source.path)
    if found.task not in _LOSSES:
        raise RecipeError(f"no loss is known for the task {found.task!r}", where=source.path)
    places = np.linspace(0, len(found.records) - 1, min(SAMPLE, len(found.records))).astype(int)
    records = [found.records[int(place)] for place in places]
    texts = [text for record in records for text in (record.query, *record.positives, *record.negatives)]
    words = [run for text in texts for run in runs(text)]
    spaced = [word for word, unspaced in words if not unspaced]
    letters = sum(len(word) for word, _ in words)
    if tokenizer is not None:
        lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    else:  # guessed, with the special tokens: 1.3 a word, and one a letter of Chinese
        guesses = (sum(len(run) if unspaced else 1.3 for run, unspaced in runs(text)) for text in texts)
        lengths = [math.ceil(guess) + 2 for guess in guesses]
    facts = row_facts(found.records)
    both = (np.unique(ids, return_counts=True)[1] for ids in (facts.query_id_N, facts.positive_id_P))
    return Looked(
        source,
        found,
        np.asarray(lengths, np.int64),
        (letters - sum(map(len, spaced))) / max(letters, 1),
        sum(map(str.isascii, spaced)) / max(len(spaced), 1),
        max(len(record.negatives) for record in records),
        max(int(count_T.max(initial=1)) for count_T in both),
    )


def _tokenizer_of(model: str) -> Any:
    """The tokenizer of a model that is on this disk; of any other `None`, and lengths are guessed."""
    if not Path(model).is_dir():
        return None
    import transformers

    auto: Any = transformers.AutoTokenizer
    try:
        return auto.from_pretrained(model)
    except (OSError, ValueError):
        return None


def _split(looked: Looked, folder: Path, overwrite: bool) -> Split | None:
    if looked.rows < LEAST_ROWS:
        return None
    try:
        out = folder / f"{looked.found.name}-split"
        return split_source(looked.source, out, test=HELD_OUT, overwrite=overwrite)
    except DataError as error:
        if NO_PART not in error.what:
            raise
        return None


# Choose and write.


def _recipe(
    looked: Sequence[Looked], splits: Sequence[Split | None], model: str, counted: bool, folder: Path
) -> FirstRecipe:
    rows = [one.rows if split is None else split.train_rows for one, split in zip(looked, splits)]
    batches = [_batch(count, one.repeats) for count, one in zip(rows, looked)]
    repeats = [one for one, count, batch in zip(looked, rows, batches) if count < batch * one.repeats > batch]
    length, cut = _max_length(np.concatenate([one.lengths for one in looked]), model)
    epochs = 3 if sum(rows) < 10_000 else 2 if sum(rows) < 100_000 else 1
    steps = max(epochs * sum(max(count // batch, 1) for count, batch in zip(rows, batches)), 1)
    rate, why_rate = _learning_rate(model)
    how = "counted with its tokenizer" if counted else "estimated from words and letters"
    longest = f"{cut:.1%} of the texts are longer and are cut" if cut else "no text is longer"
    sources = [_source(*each) for each in zip(looked, splits, rows, batches, strict=True)]
    tasks = [split.test for split in splits if split is not None]
    pooling = _pooling(model)
    reasons = [f"max_length {length}: {longest} ({how})"]
    reasons += [f"{one.found.name}: {batch} rows a step" for one, batch in zip(looked, batches)]
    few = [f"{one.found.name}: few rows ({count}); some hundreds teach more" for one, count in zip(looked, rows)]
    reasons += [text for text, count in zip(few, rows) if count < FEW_ROWS]
    reasons += [f"{steps} steps: {epochs} passes over {sum(rows):,} rows", f"learning rate {rate}: {why_rate}"]
    lines = [
        f"{MARK} for {', '.join(one.source.path for one in looked)}. Change what you like.",
        "#",
        f"#   embedsmith train {folder / 'recipe.yaml'} --dry-run",
        f"#   embedsmith train {folder / 'recipe.yaml'}",
        "model:",
        f"  path: {_quoted(model)}{_WHY_MODEL.get(model, '')}",
        *([f"  pooling: {pooling}  # the folder does not say how it pools"] if pooling else []),
        f"  max_length: {length}  # tokens: {longest} ({how})",
        "data:",
        *(line for lines_, _ in sources for line in lines_),
        "train:",
        f"  steps: {steps}  # {epochs} passes over {sum(rows):,} rows",
        f"  learning_rate: {rate}  # {why_rate}",
        "  warmup: 0.1  # the rate rises during the first tenth: the first gradients are the largest",
        *([_REPEATS.format(repeats[0].found.name, repeats[0].repeats)] if repeats else []),
        "  precision: auto  # 16 bits where the hardware multiplies them",
        "  seed: 0  # of everything that is drawn: the same seed gives the same run",
        *_evaluation(tasks),
        f"output: {_quoted(str(folder / 'runs' / 'first'))}",
    ]
    return FirstRecipe("\n".join(lines) + "\n", (*(said for _, said in sources), *reasons))


def _source(looked: Looked, split: Split | None, rows: int, batch: int) -> tuple[list[str], str]:
    """The lines of a source in the recipe, and what is said of it."""
    found = looked.found
    loss, why = _LOSSES[found.task]
    path = looked.source.path if split is None else split.train
    if found.task == "retrieval":
        why_batch = f"each query sees {batch - 1} answers of others as negatives"
    else:
        why_batch = "rows that are compared with each other"
    small = f"; more would leave few batches of {rows:,} rows" if batch < min(64, rows) else ""
    held = "nothing is held out" if split is None else f"{split.test_rows:,} rows are held out in {split.test}"
    why_held = "; too few rows, or all share texts" if split is None else ", with no text in common"
    named = looked.source.columns is not None
    how = "by the columns that were named" if named else f"as the format {found.format}"
    lines = [
        f"  - path: {_quoted(path)}  # {rows:,} rows of {looked.source.path}; {held}{why_held}",
        f"    task: {found.task}  # {looked.source.path} is read {how}",
        f"    loss: {loss}  # {why}",
        f"    batch_size: {batch}  # {why_batch}{small}",
    ]
    if split is None:  # a part that is held out leaves a file of our own layout
        said = {key: getattr(looked.source, key) for key in ("format", "columns", "split")}
        lines += [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in said.items() if value]
    if split is None and found.score_range not in (None, (0.0, 1.0)):
        lines.append(f"    score_range: {list(found.score_range)}  # {found.scores}")
    if found.task == "retrieval" and looked.negatives:
        lines.append(
            f"    negatives: {min(looked.negatives, 4)}  # drawn for each query, of at most {looked.negatives}"
        )
    return lines, f"{looked.source.path}: {looked.rows:,} rows, {found.task} ({found.format}); {held}"


def _batch(rows: int, repeats: int) -> int:
    """64 as a rule; of a small file what leaves at least eight batches, of a very large one more. No two rows of a
    batch share a text, so that a text of many rows makes batches smaller, down to 8."""
    most = 128 if rows >= 100_000 else 64
    most = min(most, max(1 << int(math.log2(max(rows // repeats, 1))), 8))
    return min(most, 1 << int(math.log2(max(rows / 8, 4))), rows)


def _max_length(lengths: IntArray, model: str) -> tuple[int, float]:
    """The shortest usual length that 99 of 100 texts fit, within what the model takes; and the share that is cut."""
    wanted = float(np.percentile(lengths, 99))
    length: int = next((each for each in LENGTHS if each >= wanted), LENGTHS[-1])
    config = _config(model)
    most = int(config.get("max_position_embeddings") or 512)
    most -= 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0
    length = min(length, most)
    return length, float((lengths > length).mean())


def _learning_rate(model: str) -> tuple[str, str]:
    hidden = int(_config(model).get("hidden_size") or (384 if model in (ENGLISH, OTHERS) else 512))
    if hidden <= 384:
        return "5.0e-5", "small encoders bear a higher rate"
    if hidden <= 1024:
        return "2.0e-5", "usual for encoders of this size"
    return "1.0e-5", "large models want a low rate"


def _pooling(model: str) -> str | None:
    """For a folder of plain transformers: the last token of a decoder, the mean of an encoder."""
    config = _config(model)
    if not config or any((Path(model) / name).exists() for name in ("modules.json", "embedsmith.json")):
        return None
    return "last" if any("CausalLM" in name for name in config.get("architectures") or ()) else "mean"


def _config(model: str) -> dict[str, Any]:
    from embedsmith.core.inputs import read_json

    try:
        return read_json(Path(model) / "config.json") if Path(model).is_dir() else {}
    except EmbedsmithError:
        return {}


def _evaluation(tasks: Sequence[str]) -> list[str]:
    if not tasks:
        return []
    names = ", ".join(map(_quoted, tasks))
    return [
        "evaluate:",
        f"  tasks: [{names}]  # held out: the training data has none of its texts",
        "  before: true  # scored before the first step too, so that the report tells what training changed",
    ]


_REPEATS = "  plan: {{duplicates: allow}}  # a text of {} is in {} rows, too many to keep them in batches apart"
_PLAIN = re.compile(r"[A-Za-z][\w./-]*[./][\w./-]*", re.ASCII)


def _quoted(text: str) -> str:
    """A path as YAML, in quotes unless it cannot be taken for anything else."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
