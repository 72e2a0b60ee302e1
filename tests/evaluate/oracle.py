"""trec_eval's figures, which ours are held to."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytrec_eval

from embedsmith.evaluate.metrics import CUTS, Floats

_TREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "accuracy": "success"}


def trec_scores(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]], cuts: Sequence[int] = CUTS
) -> dict[str, Floats]:
    """Values of every query of `run`, under our names."""
    at = ",".join(str(k) for k in cuts)
    measures = {f"{name}.{at}" for name in _TREC.values()} | {"recip_rank"}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    column = lambda name: np.array([by_query[query][name] for query in run], dtype=np.float64)
    values = {f"{ours}_at_{k}": column(f"{theirs}_{k}") for ours, theirs in _TREC.items() for k in cuts}
    reciprocal_Q = column("recip_rank")  # has no cut: 1/rank counts at k only where rank <= k
    return values | {f"mrr_at_{k}": np.where(reciprocal_Q >= 1 / k, reciprocal_Q, 0.0) for k in cuts}
