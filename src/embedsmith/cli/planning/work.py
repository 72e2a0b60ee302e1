"""What each verb has to do for so many texts, and how long that takes by the rates that are known: a function a verb.

On this machine a verb's time is that of its own runs (`measured.py`), carried on in a straight line; what grows with
the square (every query against every document) is added by its arithmetic. On cards, what the cards multiply is
counted in floating-point operations, and what the hosts do beside it in the time measured here, shared among their
cores; the longer of the two counts.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from embedsmith.api.curating import curation_tools
from embedsmith.api.tokenizing import tokenize
from embedsmith.cli.planning.machines import Machines
from embedsmith.cli.planning.measured import Line, disk_rate, measured_line, more_of, rows_beside, search_rate
from embedsmith.cli.planning.sample import ModelShape, TextFacts
from embedsmith.core.device import cores
from embedsmith.core.errors import MissingExtraError
from embedsmith.curate import curate
from embedsmith.data import Source
from embedsmith.data.record import Record
from embedsmith.index.commands import Place
from embedsmith.index.filling import run_index
from embedsmith.index.index import Document
from embedsmith.mining import mine
from embedsmith.models import load, load_reranker
from embedsmith.models.encode_files import EncodeJob, encode_files
from embedsmith.train import EvaluateConfig, train
from embedsmith.train.build import make_accelerator
from embedsmith.train.loop import build, update
from embedsmith.train.rank_memory import RankMemory, in_bytes, rank_memory

BESIDE = 1e9
"""Bytes of a process beside weights and what is counted: libraries, texts under way, a block of scores."""


@dataclass(frozen=True)
class VerbWork:
    """What a verb takes. `seconds`: for n texts, by what takes them, one after the other; `disk`: bytes it writes;
    `memory`: bytes a rank holds; `basis`: what the numbers rest on, a sentence each."""

    verb: str
    seconds: Callable[[float], Mapping[str, float]]
    disk: Callable[[float], float]
    memory: float | None
    basis: tuple[str, ...]


NOTHING: Callable[[float], float] = lambda texts: 0.0


@dataclass(frozen=True)
class Rates:
    """The machines, and what of them is measured once for all verbs."""

    machines: Machines
    place: Path

    @cached_property
    def disk(self) -> tuple[float, str]:
        """Bytes a second of all nodes, and how that is known."""
        given = self.machines.disk
        rate = given or disk_rate(self.place)
        how = "as given" if given else "measured here by 64 MB"
        return rate * self.machines.nodes, f"disk: {in_bytes(rate)} a second of a node, {how}"

    @cached_property
    def hosts(self) -> float:
        """By how much all nodes do faster what this machine's cores do."""
        return self.machines.cores_a_node / cores() * self.machines.nodes

    def on_hosts(self, line: Line, rows: float) -> float:
        return line.fixed + rows * line.each / self.hosts

    def encoding(self, shape: ModelShape, sample: TextFacts, line: Callable[[], Line]) -> "Encoding":
        """How long a model takes for texts: as given, by its arithmetic on cards, or by a line measured here."""
        machines = self.machines
        length, how = shape.tokens_a_text(sample, machines)
        given = (machines.tokens_a_second or {}).get("encode")
        if given is not None:
            basis = f"{given:,.0f} tokens a second of each, as given"
            return Encoding(0.0, length / (given * machines.ranks), (how, basis))
        if machines.card is not None:
            flops = shape.flops(length) * length
            each = flops / (machines.card.tflops * 1e12 * machines.utilisation * machines.ranks)
            basis = (
                f"{flops / 1e9:.3g} GFLOP a text by {shape.multiplied:,} multiplied weights; {machines.gpu} at "
                f"{machines.utilisation:.0%} of {machines.card.tflops:g} TFLOP/s"
            )
            return Encoding(0.0, each, (how, basis))
        found = line()
        return Encoding(found.fixed, found.each / machines.nodes, (how, found.basis))


@dataclass(frozen=True)
class Encoding:
    """Seconds of n texts through a model: `fixed` + n x `each`."""

    fixed: float
    each: float
    basis: tuple[str, ...]

    def seconds(self, texts: float) -> float:
        return self.fixed + texts * self.each


def _changes(shape: ModelShape) -> dict[str, Any]:
    """What a recipe says of a model and its folder may not."""
    return {} if shape.config.pooling is None else {"pooling": shape.config.pooling}


def encode_line(shape: ModelShape, sample: TextFacts) -> Line:
    """`embedsmith encode` on the sample's texts."""

    def run(rows: int, folder: Path) -> None:
        path = folder.with_name(f"{folder.name}.txt")
        try:
            lines = (" ".join(record.query.split()) or "." for record in more_of(_one_text_each(sample), rows))
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            encode_files(
                EncodeJob(shape.config.path, (path,), folder / "out", changes=_changes(shape)), show_progress=False
            )
        finally:
            path.unlink(missing_ok=True)

    return measured_line(f"encode with {shape.config.path}", run)


def _one_text_each(sample: TextFacts) -> list[Record]:
    texts = [text for r in sample.records for text in (r.query, *r.positives, *r.negatives)]
    return [Record(query=text) for text in texts]


def encode_work(shape: ModelShape, sample: TextFacts, rates: Rates) -> VerbWork:
    made = rates.encoding(shape, sample, lambda: encode_line(shape, sample))
    tokenizing, how = _tokenizing(shape, sample, rates)
    disk, disk_basis = rates.disk
    size = 4.0 * shape.dimension
    basis = (*made.basis, *how, f"vectors of {shape.dimension} numbers of 4 bytes", disk_basis)
    written = size + sample.bytes_a_text

    def seconds(texts: float) -> dict[str, float]:
        if rates.machines.card is None:  # its run reads, tokenizes and writes
            return {"run": made.seconds(texts)}
        host, read = texts * tokenizing, texts * written / disk
        at_once = {"cards": made.seconds(texts), "tokenizer": host, "disk": read}
        slowest = max(at_once, key=lambda each: at_once[each])
        return {slowest: at_once[slowest]}

    return VerbWork("encode", seconds, lambda texts: texts * size, 4.0 * shape.size + BESIDE, basis)


def _tokenizing(shape: ModelShape, sample: TextFacts, rates: Rates) -> tuple[float, tuple[str, ...]]:
    """Seconds of a text on all hosts; what that rests on. Only cards leave the hosts the time for it."""
    if rates.machines.card is None or not sample.records:
        return 0.0, () if rates.machines.card is None else (
            "the tokenizer's time is not counted: no text to try it on",
        )
    texts = _one_text_each(sample)

    def run(rows: int, folder: Path) -> None:
        shape.frame.tokenize([record.query for record in more_of(texts, rows)])

    line = measured_line("tokenizing", run, patience=1.0)
    basis = f"{line.basis}, on {cores()} cores; a node has {rates.machines.cores_a_node}"
    return line.each / rates.hosts, (basis,)


def tokenize_work(recipe: Any, shape: ModelShape, sample: TextFacts, rates: Rates) -> VerbWork:
    task: Any = sample.records[0].task if sample.records else "retrieval"

    def run(rows: int, folder: Path) -> None:
        with rows_beside(sample.records, rows, folder) as path:
            tokenize(replace(recipe, data=(Source(path=str(path), task=task),), out=str(folder / "tokens")))

    line = measured_line("tokenize", run)

    def seconds(texts: float) -> dict[str, float]:
        return {"hosts": rates.on_hosts(line, texts / sample.texts_a_row)}

    basis = (line.basis, f"{line.bytes_each:.0f} bytes a row on the disk")
    return VerbWork("tokenize", seconds, lambda texts: texts / sample.texts_a_row * line.bytes_each, BESIDE, basis)


def curate_work(recipe: Any, sample: TextFacts, rates: Rates) -> VerbWork:
    asking = [step for step in recipe.steps if hasattr(step, "generator")]
    kept = tuple(step for step in recipe.steps if step not in asking)
    basis = tuple(
        f"{type(step).registered_name} asks a language model: its time and cost are not counted" for step in asking
    )

    def run(rows: int, folder: Path) -> None:
        with rows_beside(sample.records, rows, folder) as path:
            given = replace(recipe.input, path=str(path), kind=None, columns=None, format=None, limit=None, pairs=None)
            curate(
                replace(recipe, input=given, steps=kept, output=str(folder / "out.jsonl"), work=None), curation_tools()
            )

    line = measured_line("curate", run)
    row = sample.bytes_a_text * sample.texts_a_row

    def seconds(texts: float) -> dict[str, float]:
        return {"hosts": rates.on_hosts(line, texts / sample.texts_a_row)}

    basis = (line.basis, *basis, "output and one stage beside it, at most as large as the input")
    return VerbWork("curate", seconds, lambda texts: 2 * row * texts / sample.texts_a_row, BESIDE, basis)


def mine_work(recipe: Any, shapes: Sequence[ModelShape], sample: TextFacts, rates: Rates) -> VerbWork:
    """Encoding, and every query against every document: of n texts, those that are no query are documents."""
    a_row, machines = sample.texts_a_row, rates.machines
    made = [rates.encoding(shape, sample, lambda shape=shape: encode_line(shape, sample)) for shape in shapes]  # type: ignore[misc]

    def run(rows: int, folder: Path) -> None:
        with rows_beside(sample.records, rows, folder) as path:
            given = {"data": Source(path=str(path)), "output": str(folder / "out.jsonl"), "corpus": ()}
            mine(replace(recipe, **given, work=None, vectors=None), load, load_reranker)

    line = measured_line("mine", run)
    pair, how = _pair_seconds(recipe, shapes, rates)
    few, many = line.sizes
    row = max(line.each - pair * (a_row - 1) * (few + many) * rates.hosts, 0.0)

    def seconds(texts: float) -> dict[str, float]:
        rows = texts / a_row
        found = {"search": rows * (texts - rows) * pair, "hosts": line.fixed + rows * row / rates.hosts}
        if machines.card is not None:
            found["cards"] = sum(each.seconds(texts) for each in made)
        return found

    vectors = sum(4.0 * shape.dimension for shape in shapes)
    out = sample.bytes_a_text * (a_row + recipe.select.negatives)
    basis = (*(text for each in made for text in each.basis), line.basis, *how)
    memory = 4.0 * max((shape.size for shape in shapes), default=0) + BESIDE
    return VerbWork("mine", seconds, lambda texts: texts * vectors + 2 * out * texts / a_row, memory, basis)


def _pair_seconds(recipe: Any, shapes: Sequence[ModelShape], rates: Rates) -> tuple[float, tuple[str, ...]]:
    """Seconds that all searchers take for one query and one document more, and what that rests on."""
    card, machines = rates.machines.card, rates.machines
    total, basis = 0.0, []
    for shape in shapes:
        flops = 2.0 * shape.dimension
        if card is not None:
            rate = card.tflops * 1e12 * machines.utilisation * machines.ranks
            basis.append(f"search: {flops:,.0f} FLOP a pair of vectors at {rate / 1e12:,.0f} TFLOP/s")
        else:
            rate = search_rate(shape.dimension) * machines.nodes
            basis.append(f"search: {flops:,.0f} FLOP a pair of vectors at {rate / 1e9:,.1f} GFLOP/s, measured here")
        total += flops / rate
    if len(shapes) < len(recipe.searchers):
        basis.append("other searchers (bm25) are in the time of a row: what they take more in a larger corpus is not")
    return total, tuple(basis)


def index_work(shape: ModelShape, sample: TextFacts, rates: Rates) -> VerbWork:
    texts = _one_text_each(sample)

    def run(rows: int, folder: Path) -> None:
        documents = [Document(id=str(n), text=one.query) for n, one in enumerate(more_of(texts, rows))]
        run_index(shape.config.path, documents, Place(folder / "index"), ("dense",), 256, _changes(shape))

    try:
        line = measured_line(f"index with {shape.config.path}", run)
    except MissingExtraError as error:
        return VerbWork("index", lambda texts: {}, NOTHING, None, (f"index: not tried, {error.what}",))
    encoding = rates.encoding(shape, sample, lambda: line)
    beside = line.each
    if rates.machines.card is not None:
        beside = max(line.each - encode_line(shape, sample).each, 0.0)

    def seconds(texts: float) -> dict[str, float]:
        host = line.fixed + texts * beside / rates.hosts
        return {"run": host} if rates.machines.card is None else {"cards": encoding.seconds(texts), "hosts": host}

    size = max(line.bytes_each, 4.0 * shape.dimension + sample.bytes_a_text)
    basis = (line.basis, f"{size:.0f} bytes a text in the index")
    return VerbWork("index", seconds, lambda texts: texts * size, 4.0 * shape.size + BESIDE, basis)


def train_work(recipe: Any, shape: ModelShape, sample: TextFacts, rates: Rates) -> VerbWork:
    machines, config = rates.machines, recipe.train
    ranks = machines.ranks
    length, how = shape.tokens_a_text(sample, machines)
    tokens_a_row = length * sample.drawn_a_row
    batch = sum(source.batch_size or config.batch_size for source in recipe.data) / len(recipe.data)
    speed = _step_seconds(recipe, shape, sample, rates, tokens_a_row * batch)
    disk, disk_basis = rates.disk
    trained = sum(fact.count for fact in shape.facts if fact.trained)
    checkpoint = 4.0 * shape.size + 8.0 * trained

    def steps(texts: float) -> int:
        return int(config.steps or math.ceil((config.epochs or 1) * texts / sample.texts_a_row / batch))

    def seconds(texts: float) -> dict[str, float]:
        saves = steps(texts) / config.checkpoint_every if config.checkpoint_every else 10
        step, talk = speed.step, speed.between_ranks
        found = {"steps": steps(texts) * step, "ranks": steps(texts) * talk, "disk": saves * checkpoint / disk}
        return found | {"start and end": speed.fixed}

    kept = (config.keep_checkpoints + 2) * checkpoint
    basis = [
        how,
        *speed.basis,
        f"{batch:,.0f} rows a step"
        + (f", {config.steps:,} steps as the recipe says" if config.steps else f", {config.epochs or 1:g} epochs"),
        f"checkpoints of {in_bytes(checkpoint)}, of which {config.keep_checkpoints + 2} are there at most",
        disk_basis,
    ]
    memory, told = _train_memory(recipe, shape, machines, tokens_a_row * batch / ranks)
    row = sample.bytes_a_text * sample.texts_a_row

    def size(texts: float) -> float:
        return float(kept + row * texts / sample.texts_a_row)

    return VerbWork("train", seconds, size, memory, (*basis, *told))


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: of its arithmetic, and of what its ranks then say to each other. `fixed`: of every run."""

    step: float
    between_ranks: float
    basis: tuple[str, ...]
    fixed: float = 0.0


def _step_seconds(recipe: Any, shape: ModelShape, sample: TextFacts, rates: Rates, tokens: float) -> Speed:
    machines, ranks = rates.machines, rates.machines.ranks
    trained = sum(4.0 * fact.count for fact in shape.facts if fact.trained)
    rate, where = machines.network / max(machines.cards if machines.gpu else 1, 1), "network"
    if machines.nodes == 1:
        rate, where = (machines.card.link if machines.card else 1e10), "links"
    sent = 2 * trained * (ranks - 1) / ranks * (1.5 if recipe.train.shard is True else 1)
    talk = sent / rate
    said = (
        () if ranks == 1 else (f"{in_bytes(sent)} of gradients a step and rank at {in_bytes(rate)} a second ({where})",)
    )
    given = (machines.tokens_a_second or {}).get("train")
    if given is not None:
        basis = f"{given:,.0f} tokens a second of each, as given"
        return Speed(tokens / (given * ranks), talk, (basis, *said))
    if machines.card is None:
        step, fixed, basis = _measured_step(recipe)
        return Speed(step / machines.nodes, talk, (basis, *said), fixed)
    length, _ = shape.tokens_a_text(sample, machines)
    passes = 2 if shape.config.lora is not None else 3
    passes += shape.config.gradient_checkpointing
    flops = passes * shape.flops(length) * tokens
    basis = (
        f"{flops / 1e12:,.3g} TFLOP a step ({passes} forward passes' worth of {tokens:,.0f} tokens); "
        f"{machines.gpu} at {machines.utilisation:.0%} of {machines.card.tflops:g} TFLOP/s"
    )
    return Speed(flops / (machines.card.tflops * 1e12 * machines.utilisation * ranks), talk, (basis, *said))


def _measured_step(recipe: Any) -> tuple[float, float, str]:
    """Seconds of a step on this machine, those that every run takes, and how they were found."""
    folder = Path(tempfile.mkdtemp(prefix="embedsmith-plan-"))
    try:
        some = tuple(replace(source, limit=min(source.limit or 5000, 5000)) for source in recipe.data)
        plain = replace(recipe.train, shard=False, balance=None, log_with=(), steps=2, epochs=None)
        tried = replace(recipe, data=some, train=plain, evaluate=EvaluateConfig(), output=str(folder / "run"))
        begun = time.perf_counter()
        train(tried)
        whole = time.perf_counter() - begun
        run = build(tried, make_accelerator(tried))
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < 5 and len(taken) < 200):
            draw = run.feed.draw(len(taken) % run.feed.steps_per_epoch)
            begun = time.perf_counter()
            update(run, draw)
            taken.append(time.perf_counter() - begun)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    step = sum(taken[1:]) / len(taken[1:])
    basis = f"{step:.3g} s a step, the mean of {len(taken[1:])} steps here; a run of two steps took {whole:.1f} s"
    return step, max(whole - 2 * step, 0.0), basis


def _train_memory(recipe: Any, shape: ModelShape, machines: Machines, tokens: float) -> tuple[float, tuple[str, ...]]:
    """Bytes of a rank, with as much of a step at once as a card holds; and what that rests on."""
    config = recipe.train
    each, how = shape.activations(min(shape.frame.max_length, 512))
    half = machines.gpu is not None and config.precision != "fp32"
    each = each if half else 2 * each

    def under(tokens: float) -> RankMemory:
        return rank_memory(
            shape.facts,
            shard=config.shard,
            ranks=min(config.shard_ranks or machines.ranks, machines.ranks),
            optimizer=config.optimizer,
            half=half,
            replayed_layers=shape.config.gradient_checkpointing,
            activations=tokens * each,
        )

    text = f"{in_bytes(each)} of graph a token, {how}"
    whole = under(min(tokens, config.token_budget or tokens))
    longest = under(shape.frame.max_length)
    if machines.card is None or whole.total <= machines.card.memory:
        return whole.total, (text, f"a rank holds {whole}")
    if longest.total <= machines.card.memory:
        return 0.9 * machines.card.memory, (text, "a card is filled, and what does not fit at once is replayed")
    what = (
        f"not one text of {shape.frame.max_length:,} tokens fits {machines.gpu} ({in_bytes(machines.card.memory)}): a "
        f"rank would hold {longest}; set train.shard=true on more ranks, model.gradient_checkpointing=true, model.lora"
    )
    return longest.total, (text, what)


def fixed_work(verb: str, why: str) -> VerbWork:
    """A verb whose time does not grow with the texts."""
    return VerbWork(verb, lambda texts: {}, NOTHING, None, (f"{verb}: {why}",))
