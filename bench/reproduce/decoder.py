"""Decoders as embedders (the line of LLM2Vec, F2LLM, EmbeddingGemma): attention, Matryoshka, spread-out, adapters."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.reproduce.claim import MEAN, RETRIEVAL, STS, Bench, Check, Claim, Measure, Row
from bench.reproduce.study import RETRIEVAL_LOSS, WIDTHS, Maker, Study

WAYS = ("causal-last", "causal-weighted", "both-mean")
KINDS = ("lora", "full")


def regularised(arm: str, loss: dict[str, Any]) -> Maker:
    """The retrieval arm with another loss; nothing else differs."""

    def make(study: Study, seed: int) -> Path:
        data = study.pairs(seed, study.steps * study.batch) | {"loss": loss}
        return study.train(arm, seed, [data])

    return make


def beside(weight: float, regulariser: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sum", "parts": [RETRIEVAL_LOSS, regulariser], "weights": [1.0, weight]}


MAKERS: dict[str, Maker] = {
    "matryoshka": regularised("matryoshka", {"type": "matryoshka", "dims": list(WIDTHS), "inner": RETRIEVAL_LOSS}),
    "uniformity": regularised("uniformity", beside(0.1, {"type": "uniformity"})),
    "gor": regularised("gor", beside(1.0, {"type": "gor"})),
}
SCORED_AT_WIDTHS = frozenset({"matryoshka", "retrieval"})

COSINE = Measure("mean cosine of unrelated texts", ("mean_cosine",), lower_is_better=True, digits=3, least=0.01)
UNIFORMITY = Measure("uniformity", ("uniformity",), lower_is_better=True, digits=3, least=0.05)
XQUAD = Measure("xquad-en", ("xquad-en",))
DECODER_STS = Measure("stsb-en-dev", ("stsb-en-dev",))
DECODER_MEAN = Measure("mean of both", ("stsb-en-dev", "xquad-en"))


def read_cells(table: dict[str, Any]) -> list[Row]:
    """Cells of the newest number of steps, their starting points, and means over adapters and weights."""
    cells = {name: row for name, row in table.get("cells", {}).items() if "-deep" not in name}
    steps = [name.partition(", ")[2] for name in cells]
    rows = []
    for name, cell in cells.items():
        arm, _, of = name.partition(", ")
        if of == steps[-1]:
            rows.append(Row(arm, cell.get("seed", 0), _hundredfold(cell["after"])))
            rows.append(Row(f"{arm.rpartition('-')[0]} untrained", None, _hundredfold(cell["before"])))
    found = {row.arm: row for row in rows}
    for name, arms in [
        *((way, [f"{way}-{kind}" for kind in KINDS]) for way in WAYS),
        *((kind, [f"{way}-{kind}" for way in WAYS]) for kind in KINDS),
    ]:
        if all(arm in found for arm in arms):
            own = [found[arm].scores for arm in arms]
            rows.append(Row(f"{name}, mean", 0, {key: statistics.fmean(s[key] for s in own) for key in own[0]}))
    return list({(row.arm, row.seed): row for row in rows}.values())


def sizes_of_cells(table: dict[str, Any]) -> dict[str, Any]:
    """The newest number of steps."""
    return {"steps": list(table["cells"])[-1].partition(", ")[2].removesuffix(" steps")}


def _hundredfold(scores: dict[str, float]) -> dict[str, float]:
    return {name: 100 * value for name, value in scores.items()}


CELLS = Bench("bench.decoder_quality", (), "decoder_quality.json", read_cells, sizes_of_cells, takes_seeds=False)
SETTING = (
    "bench.decoder_quality: SmolLM2-135M's first six layers, steps of 48 rows (debian-en-train and stsb-en-train in "
    "turn), adapters of rank 16 at 5e-4 or all weights at 1e-4; stsb-en-dev (Spearman) and xquad-en (nDCG@10). One "
    "run a cell, so a difference below a point says nothing."
)
ENCODER = (
    "On an encoder, MiniLM's first three layers, since its vectors are good enough to lose something: the retrieval "
    "run of codiemb-single (Debian pairs, InfoNCE) with and without the extra loss. "
)
FULL = (
    "Qwen3-0.6B on five million rows, 2 epochs at 1024 tokens: some days on eight GPUs for a run of F2LLM; 80,000 "
    "rows a dataset and one epoch, as in its second version's script, about a day."
)

LIKE = "As in decoder-attention."
LIKE_MRL = "As in decoder-matryoshka. "
MORE = "As for decoder-attention."

CLAIMS = (
    Claim(
        name="decoder-attention",
        system="Decoders",
        says="A decoder embeds better with bidirectional attention and the mean over tokens than with causal attention "
        "and its last token.",
        source="LLM2Vec, arXiv 2404.05961; GritLM, arXiv 2402.09906; the reference's configurations",
        measured="LLM2Vec (bidirectional, mean) 64.62 on MTEB English, GritLM 67.06; but F2LLM and Qwen3-Embedding "
        "(causal, last token) 70.05 and 70.50 at a tenth of the size: data decides first.",
        setting=SETTING,
        full=FULL,
        recipes=("decoder/mrl_spread.bi_mean.yaml", "decoder/mrl_spread.yaml", "decoder/mntp.yaml"),
        checks=(
            Check(
                "bidirectional with mean above causal with last", "both-mean, mean", "causal-last, mean", DECODER_MEAN
            ),
            Check("and above causal with the weighted mean", "both-mean, mean", "causal-weighted, mean", DECODER_MEAN),
            Check(
                "tuning lifts it far above the untrained",
                "both-mean, mean",
                "both-mean untrained",
                DECODER_MEAN,
                margin=10.0,
            ),
        ),
        bench=CELLS,
        beside=("causal-last untrained", "causal-weighted untrained"),
        shown=(DECODER_STS, XQUAD, DECODER_MEAN),
    ),
    Claim(
        name="decoder-lora",
        system="Decoders",
        says="Adapters reach what training all weights reaches.",
        source="Conan-embedding-v2, arXiv 2509.12892; reference configuration mrl_spread.lora.bi_mean",
        measured="MTEB English without SoftMask: adapters of rank 16, 32 and 64 72.18, 72.08 and 71.83, all weights "
        "71.50; with SoftMask all weights win, 73.52 against 72.40.",
        setting=LIKE,
        full=MORE,
        recipes=("decoder/mrl_spread.lora.bi_mean.yaml", "decoder/mrl_spread.bi_mean.yaml"),
        checks=(
            Check(
                "adapters within a point of all weights, or above",
                "lora, mean",
                "full, mean",
                DECODER_MEAN,
                margin=-1.0,
            ),
            *(Check(f"the same for {way}", f"{way}-lora", f"{way}-full", DECODER_MEAN, margin=-1.0) for way in WAYS),
        ),
        bench=CELLS,
        shown=(DECODER_STS, XQUAD, DECODER_MEAN),
    ),
    Claim(
        name="decoder-matryoshka",
        system="Decoders",
        says="Trained at several widths, a model's leading coordinates serve as shorter vectors: better than cutting a "
        "model that was not, at no cost at full width.",
        source="Matryoshka, arXiv 2205.13147; EmbeddingGemma, arXiv 2509.20354; F2LLM-v2",
        measured="EmbeddingGemma, MTEB multilingual at 768, 512, 256 and 128: 61.15, 60.71, 59.68, 58.23, so 95 % at a "
        "sixth of the width.",
        setting=ENCODER + "Widths 32, 64, 128, 192 and 384, equal weights.",
        full=MORE,
        recipes=("decoder/mrl_spread.yaml",),
        checks=(
            *(Check(f"above cutting at width {width}", "matryoshka", "retrieval", MEAN.at(width)) for width in WIDTHS),
            Check("at full width within a point", "matryoshka", "retrieval", margin=-1.0),
            Check(
                "keeps 95 % at a sixth of the width", "matryoshka", "matryoshka", MEAN.at(64), share=0.95, against=MEAN
            ),
        ),
        arms=("retrieval", "matryoshka"),
        shown=(RETRIEVAL, STS, MEAN, *(MEAN.at(width) for width in reversed(WIDTHS))),
    ),
    Claim(
        name="decoder-spread",
        system="Decoders",
        says="A spread-out regulariser lowers the mean cosine of unrelated texts and does not hurt the scores.",
        source="the reference's mrl_spread (Wang and Isola, arXiv 2005.10242); EmbeddingGemma, arXiv 2509.20354",
        measured="EmbeddingGemma trains with it; no ablation is published. Random vectors of 384 coordinates have a "
        "mean cosine of 0 and a uniformity of -3.97.",
        setting=LIKE_MRL + "0.1 times uniformity (t = 2), or once the second moment of cosines (gor).",
        full=MORE,
        recipes=("decoder/mrl_spread.yaml", "decoder/mrl_spread.bi_mean.yaml"),
        checks=(
            *(
                check
                for arm in ("uniformity", "gor")
                for check in (
                    Check(f"{arm}: lower mean cosine", arm, "retrieval", COSINE),
                    Check(f"{arm}: texts more uniform", arm, "retrieval", UNIFORMITY),
                    Check(f"{arm}: mean score within a point", arm, "retrieval", margin=-1.0),
                )
            ),
        ),
        arms=("untrained", "retrieval", "uniformity", "gor"),
        shown=(RETRIEVAL, STS, MEAN, COSINE, UNIFORMITY),
    ),
)
