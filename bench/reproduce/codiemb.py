"""CoDiEmb (2508.11442): retrieval and similarity in one model, fusion of checkpoints, the shape of token space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.quality_joint import read_lines
from bench.reproduce.claim import MEAN, RETRIEVAL, STS, TEST, Check, Claim, Measure
from bench.reproduce.study import COSENT, RETRIEVAL_LOSS, TEMPERATURE, Maker, Study, save_lines

LOSSES = {"type": "codiemb_sts"}
ALIKE = 0.8
"""Pairs from this score on (4 of 5) are positives where similarity is learned by InfoNCE. Reconstructed."""
FUSED = ("codiemb", "retrieval", "sts")


def joint(study: Study, seed: int, arm: str, loss: dict[str, Any], **changes: Any) -> Path:
    """Half the steps on each task, one task a step, in random order."""
    half = study.steps // 2 * study.batch
    data = [study.pairs(seed, half) | {"loss": RETRIEVAL_LOSS}, study.graded(seed, half) | {"loss": loss}]
    return study.train(arm, seed, data, **changes)


def codiemb(study: Study, seed: int) -> Path:
    return joint(study, seed, "codiemb", LOSSES, checkpoints=True)


def infonce_cosent(study: Study, seed: int) -> Path:
    """InfoNCE for retrieval, CoSENT for similarity: what Conan calls vanilla."""
    return joint(study, seed, "infonce + cosent", COSENT)


def infonce_only(study: Study, seed: int) -> Path:
    """Both tasks by InfoNCE; of the graded pairs, those from `ALIKE` on are positives."""
    return joint(study, seed, "infonce only", {
        "type": "mid_nce", "head": "dense", "temperature": TEMPERATURE, "threshold": ALIKE,
    })  # fmt: skip


def cosent_only(study: Study, seed: int) -> Path:
    """Both tasks by CoSENT: questions with their answer score 1, with another's 0, as many texts as elsewhere."""
    half = study.steps // 2 * study.batch
    data = [study.pairs(seed, half // 2) | {"loss": COSENT}, study.graded(seed, half) | {"loss": COSENT}]
    path = Path(data[0]["path"]).with_suffix(".scored.jsonl")
    if not path.exists():
        rows = read_lines(Path(data[0]["path"]))
        others = rows[1:] + rows[:1]
        right = [{"text1": row["query"], "text2": row["pos"][0], "score": 1} for row in rows]
        wrong = [{"text1": row["query"], "text2": other["pos"][0], "score": 0} for row, other in zip(rows, others)]
        save_lines(path, right + wrong)
    del data[0]["negatives"]
    data[0] |= {"path": str(path), "task": "sts", "score_range": [0, 1]}
    return study.train("cosent only", seed, data)


def mixed(study: Study, seed: int) -> Path:
    """CoDiEmb's losses, but every step holds half a batch of each task."""
    half = study.steps // 2 * study.batch
    data = [study.pairs(seed, half) | {"loss": RETRIEVAL_LOSS}, study.graded(seed, half) | {"loss": LOSSES}]
    data = [{key: value for key, value in source.items() if key != "batch_size"} for source in data]
    return study.train("mixed batches", seed, data, plan={"batches": "mixed"})


def retrieval(study: Study, seed: int) -> Path:
    data = study.pairs(seed, study.steps * study.batch) | {"loss": RETRIEVAL_LOSS}
    return study.train("retrieval", seed, [data], checkpoints=True)


def sts(study: Study, seed: int) -> Path:
    data = study.graded(seed, study.steps * study.batch) | {"loss": LOSSES}
    return study.train("sts", seed, [data], checkpoints=True)


def fused(arm: str, **method: Any) -> Maker:
    """Three runs of one base, each by its checkpoints at half time and at the end."""

    def make(study: Study, seed: int) -> Path:
        from embedsmith.core.recipe import parse
        from embedsmith.merge import MergeRecipe, merge

        parents = []
        for name in FUSED:
            study.model(name, seed)
            found = sorted(study.folder(name, seed).glob("checkpoints/step-*/model"))
            parents += [{"path": str(path), "trajectory": name, "id": f"{name} {path.parent.name}"} for path in found]
        tree = {"parents": parents, "base": str(study.base()), "method": method, "cache": None,
                "output": str(study.folder(arm, seed))}  # fmt: skip
        if not (study.folder(arm, seed) / "model.safetensors").exists():
            merge(parse(MergeRecipe, tree))
        return study.folder(arm, seed)

    return make


def untrained(study: Study, seed: int) -> Path:
    return study.base()


MAKERS: dict[str, Maker] = {
    "untrained": untrained,
    "codiemb": codiemb,
    "infonce + cosent": infonce_cosent,
    "infonce only": infonce_only,
    "cosent only": cosent_only,
    "mixed batches": mixed,
    "retrieval": retrieval,
    "sts": sts,
    "uniform soup": fused("uniform soup", type="average"),
    "fusion": fused("fusion", type="codiemb"),
    "fusion by layer": fused("fusion by layer", type="codiemb", layer=1.0, element=0.0),
    "fusion by parameter": fused("fusion by parameter", type="codiemb", layer=0.0, element=1.0),
}
GEOMETRY = frozenset({"untrained", "codiemb", "infonce only", "cosent only"})

SIMILARITY = Measure("token similarity", ("token_similarity",), lower_is_better=True, digits=3, least=0.02)
RANK = Measure("relative rank", ("token_rank",), digits=3, least=0.02)
ENTROPY = Measure("SVD entropy", ("token_entropy",), digits=3, least=0.02)
CONDITION = Measure("log10 condition", ("token_condition",), lower_is_better=True, digits=3, least=0.02)

PAPER = "CoDiEmb, arXiv 2508.11442"
SCORED = "scored on a part of debian-dev (nDCG@10) and on stsb-en-dev (Spearman)"
SETTING = (
    "MiniLM's first three layers, as many steps and rows in every arm (joint arms: half on each task), learning "
    f"rate 5e-5, texts cut at 48 tokens; debian-en-train and stsb-en-train; {SCORED}."
)
FULL = (
    "bge-large-zh-v1.5 (or mE5-large, MiniCPM-Embedding) on twelve Chinese training sets, 5 epochs at 512 tokens, "
    "scored on 8 retrieval and 7 similarity tasks of CMTEB: some days on eight GPUs for all baselines."
)

LIKE = "As in codiemb-joint."
MORE = "As for codiemb-joint."

CLAIMS = (
    Claim(
        name="codiemb-joint",
        system="CoDiEmb",
        says="Joint training with a loss for each task, in batches of one task, beats InfoNCE for both tasks, CoSENT "
        "for both, and batches of mixed tasks.",
        source=f"{PAPER}, table 1 (as its public reviews describe it)",
        measured="Better than all three on 15 CMTEB tasks for three backbones; the tables could not be read. "
        "Reviewers: gains consistent on similarity only. Youtu-Embedding, of the same framework: retrieval 80.21, "
        "STS 68.82.",
        setting=SETTING + " Positives of InfoNCE on graded pairs: score 4 of 5 or more (reconstructed). Mixed batches "
        "have CoDiEmb's losses, each on half a batch.",
        full=FULL,
        recipes=("codiemb.yaml",),
        checks=(
            Check("above InfoNCE for both tasks", "codiemb", "infonce only"),
            Check("above CoSENT for both tasks", "codiemb", "cosent only"),
            Check("above batches of mixed tasks", "codiemb", "mixed batches"),
        ),
        arms=("untrained", "infonce only", "cosent only", "mixed batches", "infonce + cosent", "codiemb"),
        shown=(RETRIEVAL, STS, MEAN, TEST),
    ),
    Claim(
        name="codiemb-single",
        system="CoDiEmb",
        says="One joint model does both tasks without one hurting the other: about as well as a model for each.",
        source=f"{PAPER}, abstract; table 2 (as its reviews describe it)",
        measured="A small cost in retrieval in exchange for gains in similarity; figures could not be read.",
        setting=LIKE + " The single models take all steps on their task, twice as many as the joint model does. "
        'A point is the margin of "about as well".',
        full=MORE,
        recipes=("codiemb.yaml",),
        checks=(
            Check("retrieval within a point of the retrieval model", "codiemb", "retrieval", RETRIEVAL, margin=-1.0),
            Check("similarity within a point of the similarity model", "codiemb", "sts", STS, margin=-1.0),
            Check("mean above the retrieval model's", "codiemb", "retrieval"),
            Check("mean above the similarity model's", "codiemb", "sts"),
        ),
        arms=("untrained", "retrieval", "sts", "codiemb"),
        shown=(RETRIEVAL, STS, MEAN, TEST),
    ),
    Claim(
        name="codiemb-fusion",
        system="CoDiEmb",
        says="Fusing checkpoints of several runs with weights from each parameter's deviation beats a uniform soup.",
        source=f"{PAPER}, abstract; the formula is reconstructed (docs/merging.md)",
        measured="Better than model soups; neither formula nor figures could be read.",
        setting=LIKE + " Six checkpoints: the joint, the retrieval and the similarity run, each at half time and at "
        "its end, are merged without training.",
        full=MORE + " Then the checkpoints of every epoch are merged, in minutes.",
        recipes=("codiemb.yaml", "merge-codiemb.yaml"),
        checks=(
            Check("hierarchical fusion above the soup", "fusion", "uniform soup"),
            Check("fusion by layer above the soup", "fusion by layer", "uniform soup"),
            Check("fusion by parameter above the soup", "fusion by parameter", "uniform soup"),
        ),
        arms=("codiemb", "uniform soup", "fusion", "fusion by layer", "fusion by parameter"),
        shown=(RETRIEVAL, STS, MEAN, TEST),
        parts=dict.fromkeys(("uniform soup", "fusion", "fusion by layer", "fusion by parameter"), FUSED),
    ),
    Claim(
        name="codiemb-geometry",
        system="CoDiEmb",
        says="CoDiEmb's tokens are less alike, and their matrix has a higher rank, a higher entropy and a much lower "
        "condition number than after training with InfoNCE or CoSENT alone.",
        source=f"{PAPER}, table 3 (direction only); definitions reconstructed (docs/geometry.md)",
        measured="Lowest token similarity, highest rank and SVD entropy, much lower condition number; no figures.",
        setting=LIKE + " Token states of 200 documents of debian-dev, one matrix a text; the condition number "
        "is the logarithm's mean. The rank, divided by the number of tokens, is shown and not checked: texts so short "
        "have full rank in the untrained model already.",
        full=MORE + " `embedsmith geometry` reads any of the models.",
        recipes=("codiemb.yaml",),
        checks=tuple(
            Check(f"{measure.words}, against {arm}", "codiemb", arm, measure)
            for arm in ("infonce only", "cosent only")
            for measure in (SIMILARITY, ENTROPY, CONDITION)
        ),
        arms=("untrained", "infonce only", "cosent only", "codiemb"),
        shown=(SIMILARITY, RANK, ENTROPY, CONDITION),
    ),
)
