"""Settings of every registered loss that the tests walk, and arguments that each must refuse."""

from __future__ import annotations

from embedsmith.core.batch import PairBatch, RetrievalBatch
from embedsmith.losses import (
    F2LLM,
    GOR,
    GORST,
    PRO,
    AnglE,
    Classifier,
    CoDiEmbSTS,
    ConanWeak,
    CoSENT,
    CosineConsistency,
    CrossBatchBalance,
    Flops,
    InfoNCE,
    M3RankedKD,
    M3SelfDistillation,
    MarginMSE,
    Matryoshka,
    MidNCE,
    Pearson,
    PerHead,
    Qwen3,
    RankKL,
    ScoreKL,
    Sum,
    SupervisedContrastive,
    Symmetric,
    TeacherVectors,
    Uniformity,
    Weighted,
)
from embedsmith.pretrain.losses import MNTP, RetroMAE
from tests.losses.examples import PAIRS, RETRIEVAL, UNDEFINED_PAIRS, UNDEFINED_RETRIEVAL

T = 0.2  # temperature of the examples: few candidates, so that no softmax is saturated

CASES = {
    "infonce": [
        InfoNCE(T),
        InfoNCE(T, "sparse"),
        InfoNCE(T, "multivector"),
        InfoNCE(T, multi_positive="inside"),
        InfoNCE(T, mask_false_negatives=False),
        InfoNCE(T, negatives="positives"),
        InfoNCE(T, negatives="positives_and_own"),
        InfoNCE(T, negatives="own"),
        InfoNCE(T, negatives="own", mask_false_negatives=False, margin=0.05),
        InfoNCE(T, margin=0.1),
        InfoNCE(T, multi_positive="inside", margin=0.1, relative_margin=0.9),
        InfoNCE(T, relative_margin=0.5, negatives="positives"),
        InfoNCE(T, symmetric=True),
        InfoNCE(T, "multivector", symmetric=True),
        InfoNCE(T, include_qq=True),
        InfoNCE(T, include_dd=True, margin=0.2),
        InfoNCE(T, include_qq=True, include_dd=True, mask_false_negatives=False),
        InfoNCE(T, hardness_weight=3.0),
        InfoNCE(T, hardness_weight=3.0, hardness_on="in_batch"),
        InfoNCE(T, hardness_weight=3.0, hardness_on="all", negatives="own"),
        InfoNCE(T, focal_gamma=0.5),
        InfoNCE(T, focal_gamma=2.0, symmetric=True, margin=0.1),
        InfoNCE(T, learn_temperature=True, temperature_name="tau"),
    ],
    "conan_weak": [ConanWeak(T), ConanWeak(T, symmetric=True)],
    "f2llm": [F2LLM(T), F2LLM(T, in_batch=False)],
    "qwen3": [Qwen3(T), Qwen3(T, margin=0.0, hardness_weight=2.0)],
    "cross_batch_balance": [CrossBatchBalance(T)],
    "cosine_consistency": [CosineConsistency(), CosineConsistency(0.5, "multivector")],
    "supervised_contrastive": [SupervisedContrastive(T), SupervisedContrastive(T, "sparse")],
    "classifier": [Classifier(4), Classifier(5, smoothing=0.1)],
    "score_kl": [ScoreKL(T), ScoreKL(T, 0.5)],
    "margin_mse": [MarginMSE(), MarginMSE(0.3)],
    "m3_ranked_kd": [M3RankedKD(T)],
    "m3_self_distillation": [
        M3SelfDistillation(T),
        M3SelfDistillation(T, start_step=10),
        M3SelfDistillation(T, start_step=2, ramp_steps=5),
        M3SelfDistillation(T, {"dense": 1.0, "sparse": 0.3}, {"dense": 1.0, "sparse": 0.1}),
    ],
    "teacher_vectors": [
        TeacherVectors(),
        TeacherVectors("mse"),
        TeacherVectors("cosine", project=True, teacher_dimension=12),
        TeacherVectors("mse", project=True, teacher_dimension=12),
    ],
    "cosent": [CoSENT(T), CoSENT(), CoSENT(T, "multivector")],
    "angle": [AnglE(T)],
    "pearson": [Pearson(), Pearson("sparse")],
    "rank_kl": [RankKL(T), RankKL(T, "sum")],
    "pro": [PRO(T), PRO(T, center=True)],
    "mid_nce": [MidNCE(T), MidNCE(T, 0.5, mask_false_negatives=False)],
    "codiemb_sts": [
        CoDiEmbSTS(rank_temperature=T, mid_temperature=T),
        CoDiEmbSTS({"pearson": 1.0, "pro": 0.0}, reduction="sum"),
    ],
    "uniformity": [Uniformity(), Uniformity(3.0, "second")],
    "gor": [GOR(), GOR("first")],
    "gor_st": [GORST(), GORST("sum")],
    "flops": [Flops(0.3, 0.7), Flops(1.0, 0.0, ramp_steps=10)],
    "retromae": [RetroMAE(), RetroMAE("both"), RetroMAE("queries")],
    "mntp": [MNTP(), MNTP("both"), MNTP("queries")],
    "matryoshka": [
        Matryoshka(InfoNCE(T), (4, 2)),
        Matryoshka(InfoNCE(T, symmetric=True, margin=0.1, include_qq=True, include_dd=True), (5, 8)),
        Matryoshka(InfoNCE(T, negatives="own", focal_gamma=0.5), (3,), (0.5,), normalise=False),
        Matryoshka(CoSENT(T), (4, 1), weighting="f2llm", normalise=False),
        Matryoshka(AnglE(T), (2, 6)),
        Matryoshka(CoDiEmbSTS(rank_temperature=T, mid_temperature=T), (4,)),
        Matryoshka(Uniformity(), (4,), (2.0,)),
        Matryoshka(GORST(), (4,)),
        Matryoshka(Classifier(4), (4,)),
        Matryoshka(TeacherVectors("mse", project=True, teacher_dimension=12), (4,)),
        Matryoshka(TeacherVectors("cosine"), (4,)),
        Matryoshka(M3SelfDistillation(T), (4,)),
        Matryoshka(CrossBatchBalance(T), (4,)),
        Matryoshka(ScoreKL(T), (4,)),
        Matryoshka(SupervisedContrastive(T), (4,)),
        Matryoshka(PerHead(InfoNCE(T), {"dense": 1.0, "sparse": 0.1}), (4,)),
    ],
    "weighted": [Weighted(InfoNCE(T), 0.3), Weighted(CoSENT(T), 2.0, warmup_steps=10)],
    "symmetric": [Symmetric(InfoNCE(T)), Symmetric(AnglE(T)), Symmetric(MidNCE(T, 0.5))],
    "per_head": [PerHead(InfoNCE(T), {"dense": 1.0, "sparse": 0.1, "multivector": 1.0})],
    "sum": [
        Sum((InfoNCE(T), GOR(), InfoNCE(T, "sparse")), (1.0, 0.1, 0.5)),
        Sum((CoSENT(T), AnglE(T), MidNCE(T, head="dense"))),
        Sum((ScoreKL(T), InfoNCE(T, learn_temperature=True))),
    ],
}

REFUSED = {
    "flops": [dict(query=-1.0), dict(document=float("nan")), dict(ramp_steps=-1), dict(head="")],
    "retromae": [dict(sides="all"), dict(head="")],
    "mntp": [dict(sides="all"), dict(head="")],
    "infonce": [
        dict(temperature=0),
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(margin=-1),
        dict(relative_margin=0),
        dict(block_size=0),
        dict(focal_gamma=-1),
        dict(hardness_weight=-5),
        dict(head=""),
        dict(multi_positive="within"),
        dict(negatives="some"),
        dict(hardness_on="none"),
        dict(include_dd=True, multi_positive="inside"),
    ],
    "conan_weak": [dict(temperature=0)],
    "f2llm": [dict(temperature=0)],
    "qwen3": [dict(temperature=0), dict(margin=-0.1)],
    "cross_batch_balance": [dict(temperature=0)],
    "cosine_consistency": [dict(threshold=float("inf"))],
    "supervised_contrastive": [dict(temperature=0)],
    "classifier": [dict(classes=1), dict(classes=3, smoothing=1.0), dict(classes=3, name="")],
    "score_kl": [dict(temperature=0), dict(teacher_temperature=-1)],
    "margin_mse": [dict(scale=0)],
    "m3_ranked_kd": [dict(temperature=0)],
    "m3_self_distillation": [dict(temperature=0), dict(weights={"dense": 1.0}), dict(start_step=-1)],
    "teacher_vectors": [dict(kind="dot"), dict(project=True)],
    "cosent": [dict(temperature=0)],
    "angle": [dict(temperature=0)],
    "pearson": [dict(head="")],
    "rank_kl": [dict(temperature=0), dict(reduction="mean")],
    "pro": [dict(temperature=0)],
    "mid_nce": [dict(temperature=0), dict(threshold=float("nan"))],
    "codiemb_sts": [
        dict(weights={}),
        dict(weights={"pearson": -1.0}),
        dict(weights={"cosent": 1.0}),
        dict(weights={"pro": 0.0}),
    ],
    "uniformity": [dict(t=0), dict(t=50), dict(sides="left")],
    "gor": [dict(sides="left")],
    "gor_st": [dict(combine="max")],
    "matryoshka": [
        dict(inner=InfoNCE(), dims=()),
        dict(inner=InfoNCE(), dims=(0, 4)),
        dict(inner=InfoNCE(), dims=(4, 4)),
        dict(inner=InfoNCE(), dims=(4,), weights=(1.0, 2.0)),
        dict(inner=InfoNCE(), dims=(4,), weights=(-1.0,)),
        dict(inner=InfoNCE(), dims=(4,), weights=(1.0,), weighting="f2llm"),
    ],
    "weighted": [dict(inner=InfoNCE(), weight=-1.0), dict(inner=InfoNCE(), weight=1.0, warmup_steps=-1)],
    "symmetric": [dict(inner={"type": "infonce", "temperature": 0})],
    "per_head": [
        dict(inner=InfoNCE(), weights={}),
        dict(inner=CoDiEmbSTS(weights={"pro": 1.0}), weights={"dense": -1.0}),
    ],
    "sum": [dict(parts=()), dict(parts=(InfoNCE(), CoSENT())), dict(parts=(CoSENT(),), weights=(1.0, 2.0))],
}


def every_case():
    return [(name, loss) for name, cases in CASES.items() for loss in cases]


def examples_for(loss, undefined: bool = False):
    """The examples a loss can read."""
    kinds = {}
    if RetrievalBatch in loss.batches:
        kinds |= UNDEFINED_RETRIEVAL if undefined else RETRIEVAL
    if PairBatch in loss.batches:
        kinds |= {f"pairs: {name}": example for name, example in (UNDEFINED_PAIRS if undefined else PAIRS).items()}
    labelled = any(word in repr(loss) for word in ("SupervisedContrastive", "Classifier"))
    return {name: e for name, e in kinds.items() if not labelled or getattr(e, "label", None) is not None}
