"""Small tasks of every kind, made of a few letters so that texts repeat and scores tie."""

import random

from embedsmith.evaluate import (
    ClassificationTask,
    ClusteringTask,
    PairClassificationTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
    Task,
)
from tests.evaluate.fakes import HashEncoder


class NamedEncoder(HashEncoder):
    """Knows which model it is."""

    def fingerprint(self) -> str:
        return f"hash-{self.width}"


def small_tasks(seed: int = 0) -> dict[str, Task]:
    chance = random.Random(seed)
    texts = lambda count: [" ".join(chance.choices("abcdefghi", k=5)) for _ in range(count)]
    corpus = {f"d{number}": text for number, text in enumerate(texts(80))}
    corpus["d80"] = corpus["d3"]
    queries = {f"q{number}": text for number, text in enumerate(texts(20))}
    qrels = {query: {f"d{chance.randint(0, 79)}": chance.randint(0, 2) for _ in range(4)} for query in queries}
    candidates = {
        query: list(dict.fromkeys([*grades, *chance.sample(list(corpus), 10)])) for query, grades in qrels.items()
    }
    labels = lambda count, of="xyz": [chance.choice(of) for _ in range(count)]
    many = texts(120)
    return {
        "sts": STSTask("sts", texts(50), texts(50), [float(chance.randint(0, 5)) for _ in range(50)]),
        "pairs": PairClassificationTask("pairs", texts(50), texts(50), [chance.randint(0, 1) for _ in range(50)]),
        "classes": ClassificationTask("classes", many[:80], labels(80), many[80:], labels(40), experiments=3),
        "binary": ClassificationTask("binary", many[:80], labels(80, [0, 1]), many[80:], labels(40, [0, 1]), 4, 3),
        "clusters": ClusteringTask("clusters", many, labels(120, "wxyz"), sample=200, experiments=3),
        "levels": ClusteringTask("levels", many, [[a, b] for a, b in zip(labels(120), labels(120))], 100, 2),
        "search": RetrievalTask("search", queries, corpus, qrels),
        "rerank": RerankingTask("rerank", queries, corpus, qrels, candidates),
    }
