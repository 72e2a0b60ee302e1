"""The folder in which a page is run: under the names that the text uses stand models and rows that this machine has.

So the text is run word for word. A folder `sentence-transformers/all-MiniLM-L6-v2` comes before the hub id of the same
name; in the default tier it holds a tiny model, in the slow tier the real one. A data file that the page shows with two
rows gets these rows and more of the same keys, so that there is something to learn and something to hold out.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedsmith.models import load
from tests.docs.blocks import Block
from tests.models import lm
from tests.tinybert import WORDS

ROWS = 40
POSITIONS = 600
Pool = Sequence[tuple[str, str]]

MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": "minilm",
    "BAAI/bge-small-zh-v1.5": "encoder",
    "BAAI/bge-m3": "three heads",
    "Qwen/Qwen3-0.6B": "decoder",
}
"""Every model that a page may name, and what stands in its place."""


_CHINESE = [(f"请问第{place}号申请应该怎样办理？", f"第{place}号申请请在网上办理。") for place in range(200)]


def made_up(count: int = 200) -> Pool:
    """Questions and answers of the tiny model's words; a question shares words with its answer."""
    chance = random.Random(0)
    texts = [" ".join(chance.sample(WORDS, 5)) for _ in range(count)]
    return [(f"{text} {number}", f"the {text} {number} ran") for number, text in enumerate(texts)]


def write_rows(path: Path, shown: str, pool: Pool, rows: int = ROWS) -> None:
    """The rows that the page shows, then others with the keys of its first one."""
    first = json.loads(shown.splitlines()[0])
    pool = _CHINESE if re.search("[\u4e00-\u9fff]", shown) else pool
    path.parent.mkdir(parents=True, exist_ok=True)
    more = (json.dumps(_row(first, place, pool), ensure_ascii=False) + "\n" for place in range(rows))
    path.write_text(shown + "".join(more), encoding="utf-8")


def _row(like: dict[str, Any], place: int, pool: Pool) -> dict[str, Any]:
    """A row with the keys of `like`: texts that belong together are of one place of the pool."""
    question, answer = pool[place % len(pool)]
    stranger = pool[(place + len(pool) // 2) % len(pool)][1]
    values: dict[str, Any] = {
        "query": question,
        "pos": [answer],
        "neg": [stranger],
        "text1": question,
        "text2": answer if place % 2 else stranger,
        "score": (place % 5) / 4,
        "_id": f"n{place}",
        "text": answer,
    }
    return {key: values[key] for key in like}


def place_models(blocks: Sequence[Block], folder: Path, minilm: Path | None) -> None:
    """A folder for every model that the page names; `minilm` is the real one, None a tiny one."""
    words = "\n".join(block.text for block in blocks)
    for name, kind in MODELS.items():
        if name not in words:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "minilm" and minilm is not None:
            (folder / name).symlink_to(minilm)
        else:
            _tiny(folder / name, kind)


def _tiny(path: Path, kind: str) -> None:
    if kind == "decoder":
        lm.folder(path, "llama-tied", POSITIONS)
        return
    plain = str(lm.folder(path.with_name(f".{path.name}"), "bert", POSITIONS))
    heads = ("dense", "sparse", "multivector") if kind == "three heads" else ("dense",)
    load(plain, pooling="mean", heads=heads, new_heads=True, device="cpu").save(path)
