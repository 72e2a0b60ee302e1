"""The decoder reference's own workflow on a small real decoder: its four configs, from Parquet files to scores.

    python -m bench.decoder_configs [--configs f2llm ...] [--steps 25]

Writes a folder of F2LLM's shape (retrieval with 7 mined negatives, clustering, and classification with its single
negative), tokenizes it with one command, trains SmolLM2-135M's first six layers by each of the reference's flat configs
(its values; what a small model and two cores ask for is changed, see CHANGES), and scores them on xquad-en by
`evaluate_extractor_mteb.py --config --data`, before and after. About ten minutes on two cores. What is done already is
kept: stop and repeat the command. Results: bench/results/decoder_configs.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, WORK, data_path, environment, read_json, write_json
from bench.decoder_quality import embedsmith, gguf

REFERENCE = {
    "experiment_id": "",
    "tb_dir": "tb",
    "train_batch_size": 24,
    "max_seq_length": 1024,
    "learning_rate": 1.2e-5,
    "min_lr": 1e-7,
    "weight_decay": 0.01,
    "warmup_steps": 1000,
    "train_epochs": 2,
    "num_hard_neg": 7,
    "checkpointing_steps": 1000,
    "validation_steps": 2000,
    "log_interval": 10,
    "mrl_dims": [128, 256],
    "mrl_dim_weights": [0.5, 0.5],
    "spread_weight": 0.1,
    "spread_t": 2.0,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_bias": "none",
    "lora_task_type": "FEATURE_EXTRACTION",
    "lora_target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_adapter_path": "",
    "skip_instruction": False,
    "instruction_separator": "Query:",
}
SPREAD = {"mrl_enabled": True, "spread_enabled": True}
BOTH = {"bi_attn_enabled": True, "pooling_mode": "mean"}
CONFIGS: dict[str, dict[str, Any]] = {
    "f2llm": {"pooling_mode": "eos"},
    "mrl_spread": {**SPREAD, "pooling_mode": "eos"},
    "mrl_spread.bi_mean": SPREAD | BOTH,
    "mrl_spread.lora.bi_mean": SPREAD | BOTH | {"lora_enabled": True},
}
"""The values of the reference's configs/config.NAME.json."""
CHANGES = {
    "attn_implementation": "sdpa",
    "max_seq_length": 96,
    "train_batch_size": 16,
    "num_hard_neg": 2,
    "warmup_steps": 3,
    "validation_steps": None,
    "learning_rate": 1e-4,
}
RATE_OF_ADAPTERS = 5e-4
FIND = "Instruct: Given a question, retrieve the passage that answers it.\nQuery: "
DESCRIBE = "Instruct: Given a short description of a package, retrieve its long one.\nQuery: "
INTENT = "Instruct: Find questions with the same intent.\nQuery: "


def raw(folder: Path) -> None:
    """Three datasets as F2LLM publishes them, in files of their own, with different numbers of negatives."""
    folder.mkdir(parents=True, exist_ok=True)
    mined = folder.parent / "mined.jsonl"
    if not mined.exists():
        pairs = folder.parent / "pairs.jsonl"
        with gzip.open(data_path("pairs/debian-en-train.jsonl.gz"), "rt", encoding="utf-8") as file:
            lines = random.Random(0).sample(list(file), 3000)
        pairs.write_text("".join(lines), encoding="utf-8")
        searchers = "searchers=[{type: bm25}]"
        embedsmith("mine", str(ROOT / "recipes/mine.yaml"), f"data.path={pairs}", searchers, f"output={mined}")
    with mined.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    _write(
        folder / "debian.parquet",
        (
            (DESCRIBE + r["query"], r["positives"][0], r["negatives"])
            for r in records
            if len(r.get("negatives") or ()) >= 7
        ),
    )
    with data_path("labels/banking77-train.jsonl").open(encoding="utf-8") as file:
        labelled = [json.loads(line) for line in file]
    random.Random(0).shuffle(labelled)
    half = len(labelled) // 2
    _write(folder / "banking77.parquet", _of_classes(labelled[:half], 7))
    _write(folder / "intents.parquet", _of_classes(labelled[half:], 1))


def _of_classes(rows: Sequence[dict[str, str]], negatives: int) -> Iterator[tuple[str, str, list[str]]]:
    """A text, another of its class, and texts of other classes."""
    chance = random.Random(1)
    by_label: dict[str, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["text"])
    for row in rows:
        same = [text for text in by_label[row["label"]] if text != row["text"]]
        others = chance.sample([label for label in by_label if label != row["label"]], negatives)
        if same:
            yield INTENT + row["text"], chance.choice(same), [chance.choice(by_label[label]) for label in others]


def _write(path: Path, rows: Iterable[tuple[str, str, list[str]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [
        {"query": query, "passage": passage} | {f"negative_{n}": text for n, text in enumerate(negatives[:7], start=1)}
        for query, passage, negatives in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), path)


def flat_config(name: str, steps: int, work: Path) -> Path:
    path = work / f"config.{name}.json"
    own = {
        "model_path": str(work / "smollm2"),
        "train_data_path": str(work / "tokens"),
        "output_dir": str(work / "runs"),
        "cache_dir": str(work / "cache"),
        "experiment_id": f"{name}-{steps}",
        "train_steps": steps,
        "checkpointing_steps": steps,
    }
    rate = {"learning_rate": RATE_OF_ADAPTERS} if CONFIGS[name].get("lora_enabled") else {}
    write_json(path, REFERENCE | CONFIGS[name] | CHANGES | rate | own)
    return path


def score(config: Path, checkpoint: Path | None, out: Path) -> float:
    """nDCG@10 on xquad-en, by the reference's script."""
    command = [sys.executable, str(ROOT / "scripts/evaluate_extractor_mteb.py"), "--config", str(config)]
    command += ["--data", str(data_path("retrieval/xquad-en")), "--query_instruction", FIND.replace("\n", "\\n")]
    command += ["--output_folder", str(out), *([] if checkpoint is None else ["--ckpt_dir", str(checkpoint)])]
    made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return round(float(made["tasks"][0]["main_score"]), 4)


def measured(name: str, steps: int, work: Path) -> dict[str, Any]:
    config = flat_config(name, steps, work)
    before, start = score(config, None, work / "mteb"), time.perf_counter()
    embedsmith("train", str(config), "train.log_with=[]")
    minutes = (time.perf_counter() - start) / 60
    after = score(config, work / "runs" / f"{name}-{steps}" / "model", work / "mteb")
    return {"before": before, "after": after, "minutes": round(minutes, 2), "steps": steps}


def prepare(work: Path) -> None:
    """The decoder and the tokens, once."""
    if not (work / "smollm2" / "config.json").exists():
        embedsmith("convert", gguf(), str(work / "smollm2"), "layers=6", "pooling=last", "max_length=96")
    if not (work / "raw" / "intents.parquet").exists():
        raw(work / "raw")
    tokens = (
        "--model",
        str(work / "smollm2"),
        "--max-length",
        "96",
        "--pooling",
        "last",
        "--out",
        str(work / "tokens"),
    )
    embedsmith("tokenize", str(work / "raw"), *tokens, "--set", "instruction_separator=Query:")


def table(kept: dict[str, Any]) -> str:
    lines = ["| config | xquad-en, nDCG@10 | minutes |", "|---|---|---|"]
    for name, row in kept["configs"].items():
        lines.append(f"| `config.{name}.json` | {row['before']:.3f} -> {row['after']:.3f} | {row['minutes']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--work", type=Path, default=WORK / "decoder_configs")
    parser.add_argument("--results", type=Path, default=RESULTS / "decoder_configs.json")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    prepare(work)
    for name in arguments.configs:
        kept: dict[str, Any] = read_json(arguments.results, {"environment": environment(), "configs": {}})
        if kept["configs"].get(name, {}).get("steps") == arguments.steps:
            continue
        kept["configs"][name] = measured(name, arguments.steps, work)
        write_json(arguments.results, kept)
    print(table(read_json(arguments.results, {"configs": {}})))


if __name__ == "__main__":
    main()
