"""Training tokens per second of a decoder, against the reference implementation's way, same model and same texts.

    python -m bench.decoder_speed [--rounds 3] [--pairs 8] [--negatives 1] [--layers 4]

Its way: queries, positives and negatives are one batch, padded together to the longest document, with a mask; the
end token is found row by row in Python. Ours is the step of every training run (train/step.py) with the memory that
the device gets by itself: chunks of similar length, no mask for causal attention, pooling by index.
Lengths are drawn evenly: queries of 8 to 32 tokens, documents of 32 to 512. Random weights in the shape of
SmolLM2-135M, its first layers. A round is forward and backward of both ways, in turn; the figure is the median ratio.
Both compute the same loss (checked). Processor time is told too: it hardly changes when others use the machine.
On a GPU: `--gpu` takes the shape of Qwen3-0.6B in bf16 with documents of up to 512 tokens and adds memory and model
FLOPs utilisation (6 x parameters x tokens, over `--peak` TFLOP/s).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3Model

from bench.common import RESULTS, environment, write_json
from embedsmith.core.batch import RetrievalIds
from embedsmith.core.reps import Dense, Reps, in_fp32
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.losses import InfoNCE
from embedsmith.models.attention import Attention, prepare_config, switch_attention
from embedsmith.models.pooling import last
from embedsmith.train import TrainConfig
from embedsmith.train.build import derive_memory
from embedsmith.train.feed import Draw
from embedsmith.train.step import Memory, Part, run_step

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TEMPERATURE = 0.05


def backbone(layers: int, gpu: bool) -> tuple[Any, Attention]:
    torch.manual_seed(0)
    shape = QWEN if gpu else {**SMALL, "num_hidden_layers": layers}
    model = Qwen3Model(prepare_config(Qwen3Config(**shape, max_position_embeddings=1024), "causal"))
    return (model.cuda() if gpu else model), switch_attention(model, "causal")


def texts(pairs: int, negatives: int, seed: int) -> tuple[TokenBatch, TokenBatch]:
    """Queries, and the positive and negatives of each in turn."""
    draw = np.random.default_rng(seed)
    rows = lambda count, low, high: [draw.integers(10, 8000, n).tolist() for n in draw.integers(low, high + 1, count)]
    documents = pairs * (1 + negatives)
    return (
        TokenBatch.from_rows(rows(pairs, 8, 32), [0] * pairs, True),
        TokenBatch.from_rows(rows(documents, 32, 512), [0] * documents, False),
    )


def their_way(model: Any, queries: TokenBatch, documents: TokenBatch, negatives: int) -> float:
    """One padded batch of everything, its mask, and a loop over rows to find the last token."""
    padded = TokenBatch.concatenate([queries, documents]).pad(0, model.device)
    hidden_NTH = model(input_ids=padded.id_NT, attention_mask=padded.mask_NT.long(), use_cache=False).last_hidden_state
    pooled = []
    for row in range(len(hidden_NTH)):
        place = int(padded.mask_NT[row].nonzero()[-1])
        pooled.append(hidden_NTH[row, place])
    vector_ND = F.normalize(torch.stack(pooled).float(), dim=-1)
    score_QK = vector_ND[: len(queries)] @ vector_ND[len(queries) :].T / TEMPERATURE
    target_Q = torch.arange(len(queries), device=score_QK.device) * (1 + negatives)
    loss = F.cross_entropy(score_QK, target_Q)
    loss.backward()
    return float(loss.detach())


def draw_of(queries: TokenBatch, documents: TokenBatch, negatives: int) -> Draw:
    """The same texts as the one part of a training step; a text's id is its place."""
    document_N = torch.arange(len(documents))
    group_QG = document_N.view(len(queries), 1 + negatives)

    ids = RetrievalIds(
        query_id_Q=torch.arange(len(queries)) + len(documents),
        positive_id_QP=group_QG[:, :1],
        negative_id_QM=group_QG[:, 1:],
        document_id_N=document_N,
    )
    part = Part("bench", "retrieval", ids, InfoNCE(temperature=TEMPERATURE))
    return TokenBatch.concatenate([queries, documents]), [part]


def our_way(model: Any, attention: Attention, memory: Memory, draw: Draw) -> float:
    """A step of embedsmith's training."""

    def encode(tokens: TokenBatch, _heads: Sequence[str], rows: IntArray) -> Reps:
        padded = tokens.pad(0, model.device, rows=rows)
        mask = attention.mask(padded.mask_NT, "sdpa", model.dtype)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            states = model(input_ids=padded.id_NT, attention_mask=mask, use_cache=False).last_hidden_state
        pooled_ND = last(in_fp32(states), padded.mask_NT, padded.mask_NT)
        return {"dense": Dense(F.normalize(pooled_ND, dim=-1))}

    return float(run_step(encode, *draw, memory).value)


def timed(way: Callable[[], float], model: Any) -> dict[str, float]:
    """Seconds and loss of a forward and backward pass; on a GPU its peak of memory too."""
    model.zero_grad(set_to_none=True)
    gpu = model.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, processor = time.perf_counter(), time.process_time()
    loss = way()
    if gpu:
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"seconds": seconds, "processor": processor, "loss": loss} | (
        {"GiB": torch.cuda.max_memory_allocated() / 2**30} if gpu else {}
    )


def one_round(model: Any, attention: Attention, arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """Both ways on the same new texts, in an order that alternates."""
    queries, documents = texts(arguments.pairs, arguments.negatives, number)
    memory = derive_memory(TrainConfig(), model.device)

    def theirs() -> float:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.gpu):
            return their_way(model, queries, documents, arguments.negatives)

    ours = partial(our_way, model, attention, memory, draw_of(queries, documents, arguments.negatives))
    ways = {"ours": ours, "theirs": theirs}
    found = {name: timed(ways[name], model) for name in (sorted(ways) if number % 2 else sorted(ways, reverse=True))}
    if abs(found["ours"]["loss"] - found["theirs"]["loss"]) > (5e-2 if arguments.gpu else 1e-4):
        raise SystemExit(f"the losses differ: {found['ours']['loss']} and {found['theirs']['loss']}")
    tokens = len(queries.id_S) + len(documents.id_S)
    row = {name: tokens / each["seconds"] for name, each in found.items()}
    row |= {"tokens": tokens, "ratio": row["ours"] / row["theirs"]}
    if not arguments.gpu:
        row["processor ratio"] = found["theirs"]["processor"] / found["ours"]["processor"]
    if arguments.gpu:
        size = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
        row |= {f"{name} GiB": each["GiB"] for name, each in found.items()}
        row |= {f"{name} mfu": 6 * size * row[name] / (arguments.peak * 1e12) for name in found}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU in bf16")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    model, attention = backbone(arguments.layers, arguments.gpu)
    one_round(model, attention, arguments, 0)  # warms up
    rounds = []
    for number in range(1, arguments.rounds + 1):
        row = one_round(model, attention, arguments, number)
        rounds.append(row)
        if not arguments.gpu:
            print(f"processor time {row['processor ratio']:.2f}; ", end="")
        print(f"ours {row['ours']:,.0f} tokens/s, theirs {row['theirs']:,.0f}, ratio {row['ratio']:.2f}", flush=True)
    ratio = statistics.median(row["ratio"] for row in rounds)
    print(f"median ratio {ratio:.2f} (target 2 on a CPU)")
    results = arguments.results or RESULTS / f"decoder_speed{'_gpu' if arguments.gpu else ''}.json"
    told = {name: value for name, value in vars(arguments).items() if name != "results"}
    write_json(results, {"environment": environment(), "ratio": ratio, "rounds": rounds, **told})


if __name__ == "__main__":
    main()
