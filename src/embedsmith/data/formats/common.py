"""The column layouts that published datasets have, read by their names: those of sentence-transformers (anchors and
positives, questions and answers, scored sentences), premises and hypotheses, Tevatron, ms-swift and CoDiEmb."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from embedsmith.core.inputs import kind_of
from embedsmith.core.shelf import layouts
from embedsmith.data.formats.columns import Layout, Row
from embedsmith.data.record import RowError, titled, typed_for_source

_ANCHORS = (("anchor", "positive"), ("query", "positive"))
_ANSWERS = (("question", "answer"), ("query", "answer"), ("query", "response"))
_SENTENCES = (("sentence1", "sentence2"), ("sentence_A", "sentence_B"), ("text1", "text2"))
_NEGATIVE = re.compile(r"negatives?(_\d+)?|rejected_response")


def _couples(names: Sequence[tuple[str, str]]) -> tuple[Layout, ...]:
    """A query and a positive, and negatives in columns of any number."""
    return tuple(
        Layout(
            {"query": query, "positives": positive, "negatives": "negatives"},
            (query, positive),
            task="retrieval",
            unfold=_numbered,
        )
        for query, positive in names
    )


def _numbered(row: Row) -> Row:
    """`negative`, `negative_1`, `negative_2`, ... as one list, in the order of their numbers."""
    names = [name for name in row if _NEGATIVE.fullmatch(name)]
    names.sort(key=lambda name: int("0" + "".join(filter(str.isdigit, name))))
    found: list[Any] = []
    for name in names:
        if row[name] is not None:
            found += row[name] if isinstance(row[name], list | tuple) else [row[name]]
    return {**row, "negatives": found}


@layouts.register("anchors")
def anchors() -> tuple[Layout, ...]:
    """`anchor` or `query` with `positive`, and `negative` or `negative_1`, `negative_2`, ... where there are any."""
    return _couples(_ANCHORS)


@layouts.register("answers")
def answers() -> tuple[Layout, ...]:
    """A question and its answer; negatives as among anchors, or in `rejected_response`."""
    return _couples(_ANSWERS)


@layouts.register("scored")
def scored() -> tuple[Layout, ...]:
    """Two texts, and how alike they are in `score` or `label`. Couples of a query and an answer are read so only where
    the format is named: their label may say something else."""
    return tuple(
        Layout({"text1": left, "text2": right, "score": score}, (left, right, score), task="sts")
        for left, right in _SENTENCES + _ANCHORS + _ANSWERS
        for score in ("score", "label")
    )


NLI_SCORES = {"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0, "0": 1.0, "1": 0.5, "2": 0.0}
"""What the classes of premise and hypothesis count as similarity, by name or by number as in GLUE, SNLI and XNLI.
Source: the `pair-score` subset of sentence-transformers/all-nli."""


@layouts.register("nli")
def nli() -> Layout:
    """A premise, a hypothesis and the class of the pair, as a scored pair (`NLI_SCORES`)."""
    columns = {"text1": "premise", "text2": "hypothesis", "score": "score"}
    return Layout(columns, ("premise", "hypothesis", "label"), task="sts", unfold=_entailed)


def _entailed(row: Row) -> Row:
    label = row["label"]
    score = None if isinstance(label, bool | float) else NLI_SCORES.get(str(label).strip().lower())
    if score is None:
        kind = "a label that is no class of premise and hypothesis"
        columns = {"text1": "premise", "text2": "hypothesis", "score": "label"}
        declared = ", ".join(f"{role}: {name}" for role, name in columns.items())
        typed = typed_for_source(*(f"columns.{role}={name}" for role, name in columns.items()))
        fix = f"remove the row; for labels that are scores, declare columns: {{{declared}}} beside the path {typed}"
        raise RowError(kind, f"{kind}: {label!r}", expected=", ".join(NLI_SCORES), fix=fix)
    return {**row, "score": score}


@layouts.register("tevatron")
def tevatron() -> Layout:
    """Tevatron's training files: lists of passages with `title` and `text`."""
    columns = {"query": "query", "positives": "positive_passages", "negatives": "negative_passages"}
    return Layout(columns, ("query", "positive_passages"), task="retrieval", unfold=_passages)


def _passages(row: Row) -> Row:
    def texts(name: str) -> Iterator[str]:
        for passage in _items(row, name):
            if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
                raise _not_like(name, passage, '{"title": ..., "text": ...}')
            yield titled(passage.get("title"), passage["text"])

    return {**row, **{name: list(texts(name)) for name in ("positive_passages", "negative_passages")}}


@layouts.register("texts")
def texts() -> Layout:
    """A text alone in `text`, which is its own positive: for training without labels (SimCSE, TSDAE). Only where the
    format is named: a file of documents looks the same."""
    columns = {"query": "text", "positives": "same"}
    return Layout(columns, ("text",), task="retrieval", unfold=lambda row: {**row, "same": row["text"]}, by_name=True)


@layouts.register("swift")
def swift() -> Layout:
    """ms-swift's rows for embedding: `messages`, with the messages of each positive and negative in a list of their own
    and a similarity in `label` where there is one. A system message is put in front, of the query as its instruction.
    """
    columns = {
        "query": "query",
        "positives": "positives",
        "negatives": "negatives",
        "score": "label",
        "instruction": "system",
    }
    return Layout(columns, ("messages", "positive_messages"), unfold=_conversations)


def _conversations(row: Row) -> Row:
    system, query = _said(row["messages"], "messages")
    sides = {
        side: ["".join(_said(turns, f"{side}_messages")) for turns in _items(row, f"{side}_messages")]
        for side in ("positive", "negative")
    }
    return {
        "system": system or None,
        "query": query,
        "positives": sides["positive"],
        "negatives": sides["negative"] or None,
        "label": row.get("label"),
    }


def _said(turns: Any, name: str) -> tuple[str, str]:
    """(the system message and a space, the other messages) of a conversation."""
    if not isinstance(turns, list | tuple) or not all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    ):
        raise _not_like(name, turns, '[{"role": "user", "content": ...}]')
    system = [turn["content"] + " " for turn in turns if turn.get("role") == "system"]
    return "".join(system), "\n".join(turn["content"] for turn in turns if turn.get("role") != "system")


@layouts.register("codiemb")
def codiemb() -> Layout:
    """CoDiEmb's training files: `task_type` (ir, sts), and every text as [task instruction, instruction, text].

    The task instruction of the query is put in front of it as CoDiEmb does (`Instruction: ... Query: `), a second
    instruction stands right before its text, and a score of -1 is one that is not known. Source: the training code of
    Youtu-Embedding.
    """
    columns = {
        "query": "query",
        "positives": "positives",
        "negatives": "negatives",
        "positive_scores": "positive_scores",
        "negative_scores": "negative_scores",
        "instruction": "instruction",
        "task": "task",
    }
    return Layout(columns, ("task_type", "query", "positives"), unfold=_triples)


def _triples(row: Row) -> Row:
    tasks = {"ir": "retrieval", "sts": "sts"}
    if row["task_type"] not in tasks:
        raise RowError("unknown task_type", f"unknown task_type {row['task_type']!r}", expected="ir or sts")
    task, query = _assembled(row["query"], "query")
    known = {
        name: [None if score == -1 else score for score in _items(row, name)]
        for name in ("positive_scores", "negative_scores")
    }
    return {
        "task": tasks[row["task_type"]],
        "instruction": f"Instruction: {task} Query: " if task else None,
        "query": query,
        **{name: [_assembled(text, name)[1] for text in _items(row, name)] for name in ("positives", "negatives")},
        **{name: scores if any(score is not None for score in scores) else None for name, scores in known.items()},
    }


def _assembled(parts: Any, name: str) -> tuple[str, str]:
    """(task instruction, text with its own instruction in front)."""
    if not isinstance(parts, list | tuple) or len(parts) != 3 or not all(isinstance(part, str) for part in parts):
        raise _not_like(name, parts, "[task instruction, instruction, text]")
    task, instruction, text = (part.strip("\t\n :") for part in parts)
    return task, instruction + text


def _items(row: Row, name: str) -> Sequence[Any]:
    value = row.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise _not_like(name, value, "a list")
    return value or ()


def _not_like(name: str, value: Any, expected: str) -> RowError:
    kind = f"{name} hold {kind_of(value)} of another form"
    return RowError(kind, f"{kind}: {str(value)[:60]}", expected=expected)
