"""Speed of `embedsmith tokenize`, reading of ids and writing of Parquet included, against the tokenizer library alone.

`python -m bench.tokenize` tokenizes the same real texts (Debian package titles and descriptions, every text once) with
the tokenizer of all-MiniLM-L6-v2, in turn:

- `library`: `tokenizers`' own batch call on all texts (`encode_batch_fast`), with nothing done with its result;
- `ids`: the same, and the ids of every text taken out of it, as lists: the least that makes it of use;
- `transformers`: `tokenizer(texts)` of transformers, as most scripts call it;
- `embedsmith`: `TokenJob.write`, from records to the finished files of the corpus layout.

The figure is texts a second over rounds in turn, as a ratio of medians; beside it that of the processor's time (of all
threads), which a busy machine hardly changes. Target: 0.95 of the library's own batch call
on two cores (RAYON_NUM_THREADS=2). Results: bench/results/tokenize.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from bench.common import RESULTS, WORK, data_path, environment, minilm, write_json

MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / "tokenize.json")
    arguments = parser.parse_args()
    ways, count, tokens = contenders(arguments.rows)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            way()
            seconds[name].append((time.perf_counter() - started, time.process_time() - used))
    clock, processor = (
        {name: count / statistics.median(pair[kind] for pair in values) for name, values in seconds.items()}
        for kind in (0, 1)
    )
    ratios = {name: clock["embedsmith"] / clock[name] for name in ways}
    used_ratios = {name: processor["embedsmith"] / processor[name] for name in ways}
    for name in ways:
        print(
            f"{name:14} {clock[name]:9,.0f} texts/s, embedsmith is at {ratios[name]:.2f} of it; "
            f"of the processor's time at {used_ratios[name]:.2f}"
        )
    figures: dict[str, object] = {
        "texts": count,
        "tokens": tokens,
        "texts_per_second": clock,
        "texts_per_processor_second": processor,
    }
    figures |= {"ratios": ratios, "ratios_of_processor_time": used_ratios, "target": 0.95}
    write_json(arguments.results, {"environment": environment(), **figures, "seconds": seconds})


def contenders(rows: int | None) -> tuple[dict[str, Callable[[], object]], int, int]:
    """What is timed, by name; the number of texts, and of their tokens."""
    from embedsmith.data import Source, read_source
    from embedsmith.data.token_cache import TokenJob
    from embedsmith.models import load

    model = load(minilm(), device="cpu", max_length=MAX_LENGTH)
    source = Source(path=str(data_path("pairs/debian-en-train.jsonl.gz")), limit=rows, name="debian")
    records = read_source(source).texts_only("tokenizing", source.path)
    texts = [record.query for record in records.records]
    texts += list(dict.fromkeys(text for record in records.records for text in record.positives))
    tokens = len(model.tokenize(texts).id_S)
    native, tokenizer = model.tokenizer.backend_tokenizer, model.tokenizer

    def cache() -> None:
        shutil.rmtree(WORK / "tokens", ignore_errors=True)
        TokenJob(WORK / "tokens", records, model.tokenize, prompts={}, probes={}).write()

    ways: dict[str, Callable[[], object]] = {
        "library": lambda: native.encode_batch_fast(texts),
        "ids": lambda: [encoding.ids for encoding in native.encode_batch_fast(texts)],
        "transformers": lambda: tokenizer(texts, truncation=True, max_length=MAX_LENGTH),
        "embedsmith": cache,
    }
    return ways, len(texts), tokens


if __name__ == "__main__":
    main()
