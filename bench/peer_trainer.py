"""The peer: sentence-transformers' own trainer on one retrieval file and one similarity file, round robin.

Run as `python -m bench.peer_trainer --retrieval F --sts F --steps N --seed S OUT`: it saves the model at OUT and the
seconds its training took in OUT/seconds.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench.common import minilm, write_json


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_trainer(model: Any, retrieval: Path, sts: Path | None, scratch: Path, **options: Any) -> Any:
    """Its trainer with its losses at their defaults: ranking at scale 20 (temperature 0.05) and CoSENT at scale 20.

    Without `sts` it trains on retrieval alone. `retrieval` rows are `query` and `pos` (a list; the first is used),
    `sts` rows `text1`, `text2` and `score` in 0..1.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    pairs = Dataset.from_list([{"anchor": row["query"], "positive": row["pos"][0]} for row in read_rows(retrieval)])
    sets, losses = {"retrieval": pairs}, {"retrieval": MultipleNegativesRankingLoss(model)}
    if sts is not None:
        graded = [{name: row[name] for name in ("text1", "text2", "score")} for row in read_rows(sts)]
        sets["sts"], losses["sts"] = Dataset.from_list(graded), CoSENTLoss(model)
    defaults = {
        "output_dir": str(scratch),
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "multi_dataset_batch_sampler": "round_robin",
        "use_cpu": True,
        "fp16": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 25,
        "disable_tqdm": True,
    }
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**defaults | options),
        train_dataset=sets,
        loss=losses,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--retrieval", type=Path, required=True)
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps of both tasks together")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm(), device="cpu")
    model.max_seq_length = arguments.max_length
    trainer = build_trainer(
        model,
        arguments.retrieval,
        arguments.sts,
        arguments.out.with_name(arguments.out.name + ".scratch"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(str(arguments.out))
    write_json(arguments.out / "seconds.json", seconds)


if __name__ == "__main__":
    main()
