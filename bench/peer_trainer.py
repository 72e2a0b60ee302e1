"""The peer: sentence-transformers' own trainer on retrieval files and similarity files.

Run as `python -m bench.peer_trainer --retrieval F --sts F --steps N --seed S OUT`: it saves the model at OUT and the
seconds its training took in OUT/seconds.json. Files take turns, or with `--by-rows` have steps by their rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import minilm, write_json

LOSSES = ("mnrl", "cached", "gist")
CHUNK = 32


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ranking_loss(model: Any, name: str) -> Any:
    """Its ranking losses at their defaults: scale 20 (temperature 0.05); GIST's 0.01, the start itself as the guide."""
    from sentence_transformers.sentence_transformer import losses

    if name == "cached":
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=CHUNK)
    if name == "gist":
        return losses.GISTEmbedLoss(model, copy.deepcopy(model).eval())
    return losses.MultipleNegativesRankingLoss(model)


def build_trainer(
    model: Any,
    retrieval: Path | Sequence[Path],
    sts: Path | Sequence[Path] | None,
    scratch: Path,
    loss: str = "mnrl",
    **options: Any,
) -> Any:
    """Its trainer with its losses at their defaults: a ranking loss, and CoSENT at scale 20.

    Without `sts` it trains on retrieval alone. `retrieval` rows are `query` and `pos` (a list; the first is used),
    `sts` rows `text1`, `text2` and `score` in 0..1. A model with prompts is given them.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    pairs, graded = ([one] if isinstance(one, Path) else list(one or ()) for one in (retrieval, sts))
    ranking = ranking_loss(model, loss)
    sets, losses, prompts = {}, {}, {}
    query, document = ((model.prompts or {}).get(role) or "" for role in ("query", "document"))
    for path in pairs:
        rows = [{"anchor": row["query"], "positive": row["pos"][0]} for row in read_rows(path)]
        sets[path.stem], losses[path.stem] = Dataset.from_list(rows), ranking
        prompts[path.stem] = {"anchor": query, "positive": document}
    for path in graded:
        rows = [{name: row[name] for name in ("text1", "text2", "score")} for row in read_rows(path)]
        sets[path.stem], losses[path.stem] = Dataset.from_list(rows), CoSENTLoss(model)
        prompts[path.stem] = {"text1": query, "text2": query}
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
        **({"prompts": prompts} if query or document else {}),
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
    parser.add_argument("--model", default=None, help="a folder; MiniLM where it is left out")
    parser.add_argument("--loss", choices=LOSSES, default="mnrl")
    parser.add_argument("--retrieval", type=Path, required=True, action="append")
    parser.add_argument("--sts", type=Path, required=True, action="append")
    parser.add_argument("--by-rows", action="store_true", help="steps by the rows of each file, not in turn")
    parser.add_argument("--steps", type=int, required=True, help="steps of both tasks together")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(arguments.model or minilm(), device="cpu")
    model.max_seq_length = arguments.max_length
    trainer = build_trainer(
        model,
        arguments.retrieval,
        arguments.sts,
        arguments.out.with_name(arguments.out.name + ".scratch"),
        arguments.loss,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        multi_dataset_batch_sampler="proportional" if arguments.by_rows else "round_robin",
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(str(arguments.out))
    write_json(arguments.out / "seconds.json", seconds)


if __name__ == "__main__":
    main()
