"""Training tokens per second of a decoder, against the reference implementation's way, same model and same texts.

    python -m bench.decoder_speed [--rounds 5] [--pairs 16] [--hidden 256] [--layers 6]

Its way: queries, positives and negatives are one batch, padded together to the longest document, with a mask; the
end token is found row by row in Python. Ours: chunks of similar length, no mask for causal attention, pooling by index.
Mixed lengths: queries of 8 to 32 tokens, documents of 32 to 512. Rounds alternate; the figure is the median ratio.
Both compute the same loss (checked). On a GPU: `--gpu` takes the shape of Qwen3-0.6B in bf16 with documents of up to
512 tokens and adds memory and model FLOPs utilisation (6 x parameters x tokens, over `--peak` TFLOP/s).
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3Model

from bench.common import RESULTS, environment, write_json
from embedsmith.core.tokens import TokenBatch, chunk_rows
from embedsmith.models.attention import prepare_config, switch_attention

SMALL = {"vocab_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
QWEN = {"vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


def backbone(hidden: int, layers: int, gpu: bool) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden}
    config = prepare_config(Qwen3Config(**(QWEN if gpu else SMALL), **shape, max_position_embeddings=1024), "causal")
    model = Qwen3Model(config)
    switch_attention(model, "causal")
    return model.cuda() if gpu else model


def texts(pairs: int, negatives: int, seed: int) -> tuple[TokenBatch, TokenBatch]:
    draw = np.random.default_rng(seed)
    rows = lambda count, low, high: [draw.integers(10, 8000, n).tolist() for n in draw.integers(low, high + 1, count)]
    documents = pairs * (1 + negatives)
    return (
        TokenBatch.from_rows(rows(pairs, 8, 32), [0] * pairs, True),
        TokenBatch.from_rows(rows(documents, 32, 512), [0] * documents, False),
    )


def contrast(query_QH: torch.Tensor, document_KH: torch.Tensor, negatives: int) -> torch.Tensor:
    score_QK = F.normalize(query_QH, dim=-1) @ F.normalize(document_KH, dim=-1).T / 0.05
    target_Q = torch.arange(len(query_QH), device=score_QK.device) * (1 + negatives)
    return F.cross_entropy(score_QK.float(), target_Q)


def their_way(model: Any, queries: TokenBatch, documents: TokenBatch, negatives: int) -> torch.Tensor:
    """One padded batch of everything, its mask, and a loop over rows to find the last token."""
    padded = TokenBatch.concatenate([queries, documents]).pad(0, model.device)
    hidden_NTH = model(input_ids=padded.id_NT, attention_mask=padded.mask_NT.long(), use_cache=False).last_hidden_state
    pooled = []
    for row in range(len(hidden_NTH)):
        last = int(padded.mask_NT[row].nonzero()[-1])
        pooled.append(hidden_NTH[row, last])
    pooled_NH = torch.stack(pooled)
    return contrast(pooled_NH[: len(queries)], pooled_NH[len(queries) :], negatives)


def our_way(model: Any, queries: TokenBatch, documents: TokenBatch, negatives: int, budget: int) -> torch.Tensor:
    """Chunks of similar length without a mask."""
    tokens = TokenBatch.concatenate([queries, documents])
    chunks = chunk_rows(tokens.length_N, budget)
    pooled = []
    for rows in chunks:
        part = tokens.take(rows)
        hidden_NTH = model(input_ids=part.pad(0, model.device).id_NT, use_cache=False).last_hidden_state
        last_N = torch.from_numpy(part.length_N - 1).to(model.device)
        pooled.append(hidden_NTH[torch.arange(len(rows), device=model.device), last_N])
    order = torch.from_numpy(np.argsort(np.concatenate(chunks))).to(model.device)
    pooled_NH = torch.cat(pooled)[order]
    return contrast(pooled_NH[: len(queries)], pooled_NH[len(queries) :], negatives)


def timed(step: Any, model: Any, gpu: bool) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=gpu):
        loss = step()
    loss.backward()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU in bf16")
    arguments = parser.parse_args()
    hidden, layers = (1024, 28) if arguments.gpu else (arguments.hidden, arguments.layers)
    model, budget = backbone(hidden, layers, arguments.gpu), 32768 if arguments.gpu else 2048
    size = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    rounds = []
    for number in range(arguments.rounds + 1):  # the first warms up
        queries, documents = texts(arguments.pairs, arguments.negatives, number)
        tokens = len(queries.id_S) + len(documents.id_S)
        step = partial(our_way, model, queries, documents, arguments.negatives, budget)
        ours, our_loss = timed(step, model, arguments.gpu)
        step = partial(their_way, model, queries, documents, arguments.negatives)
        theirs, their_loss = timed(step, model, arguments.gpu)
        if abs(our_loss - their_loss) > (5e-2 if arguments.gpu else 1e-4):
            raise SystemExit(f"the losses differ: {our_loss} and {their_loss}")
        row = {"tokens": tokens, "ours": tokens / ours, "theirs": tokens / theirs, "ratio": theirs / ours}
        if arguments.gpu:
            row |= {
                "mfu": 6 * size * tokens / ours / (arguments.peak * 1e12),
                "memory": torch.cuda.max_memory_allocated(),
            }
        rounds.append(row)
        print(f"ours {row['ours']:,.0f} tokens/s, theirs {row['theirs']:,.0f}, ratio {row['ratio']:.2f}")
    ratio = statistics.median(row["ratio"] for row in rounds[1:])
    print(f"median ratio {ratio:.2f} (target 2)")
    name = "decoder_speed_gpu.json" if arguments.gpu else "decoder_speed.json"
    write_json(RESULTS / name, {"environment": environment(), "ratio": ratio, "rounds": rounds[1:], **vars(arguments)})


if __name__ == "__main__":
    main()
