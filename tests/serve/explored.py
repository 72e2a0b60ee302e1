"""A service to explore: a tiny model of three heads with an index of hostile and plain texts, and one of one head."""

import json

from embedsmith.index import Document, EdgeStore, open_index
from embedsmith.models import load
from embedsmith.serve.service import Service, Sources
from tests.tinybert import WORDS, tiny_bert

HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\"> cat",
    "<script>document.title='owned'</script> cat dog",
    "\u202ecat gnp.exe\u202c <svg/onload=document.title='owned'>",
    "cat &lt;b&gt; &amp; ${document.title='owned'} {{7*7}} </li></ol><style>*{display:none}</style>",
    "cat " + "W" * 400,
    "猫 坐在 垫子 上 cat " + "很长" * 300,
]
HEADS = ("dense", "sparse", "multivector")


def documents():
    plain = [" ".join(WORDS[(start + step) % 16] for step in range(2 + start % 5)) for start in range(24)]
    kinds = ["river", "<b>hill</b>", "sea"]
    return [
        Document(f"d{n}", text, {"kind": kinds[n % 3], "year": 1990 + n, "name": f"name {n}"})
        for n, text in enumerate([*HOSTILE, *plain])
    ]


def service(folder):
    """Models `three` and `one`, each with an index, the second without the last two documents."""
    bert = tiny_bert(folder / "bert")
    three = load(bert, pooling="mean", heads=HEADS, new_heads=True, multivector_dim=8)
    one = load(tiny_bert(folder / "bert-2", seed=1), pooling="mean")
    stores = []
    for name, model, heads, left_out in (("three", three, HEADS, 0), ("one", one, ("dense",), 2)):
        store = EdgeStore(folder / name)
        found = documents()
        open_index(model, store, heads=heads, create=True).add(found[: len(found) - left_out], show=False)
        store.close()
        stores.append(lambda name=name: EdgeStore(folder / name, read_only=True))
    return Service(Sources({"three": lambda: three, "one": lambda: one}, stores))


def run_folder(folder):
    """What a run leaves that scored a retrieval task and one of pairs before and after."""
    path = folder / "a-run"
    (path / "evaluation").mkdir(parents=True)
    figures = {"before": ([1.0, 0.63, 0.0], [0.9, 0.5, 0.2]), "after": ([0.5, 0.63, 1.0], [0.4, 0.5, 0.8])}
    for name, (ndcg, relevant) in figures.items():
        shown = {"query": HOSTILE[0], "relevant": HOSTILE[1], "found before it": HOSTILE[2]}
        retrieval = {
            "task": "search",
            "kind": "retrieval",
            "metric": "ndcg_at_10",
            "scores": {"ndcg_at_10": sum(ndcg) / 3},
            "counts": {"queries": 3},
            "item_ids": ["q1", "q2", "q3"],
            "items": {
                "ndcg_at_10": ndcg,
                "mrr_at_10": [1.0, 0.5, 0.0] if name == "before" else [0.25, 0.5, 1.0],
                "similarity_relevant": relevant,
                "similarity_other": [0.6, 0.6, 0.6],
            },
            "examples": [{"id": "q1", "value": ndcg[0], "numbers": {}, "texts": shown}],
        }
        pairs = {
            "task": "alike",
            "kind": "sts",
            "metric": "cosine_spearman",
            "scores": {"cosine_spearman": 1.0 if name == "before" else -1.0},
            "item_ids": [str(n) for n in range(8)],
            "items": {
                "cosine": [n / 10 if name == "before" else (7 - n) / 10 for n in range(8)],
                "score": [n * 5 / 7 for n in range(8)],
            },
        }
        (path / "evaluation" / f"{name}.json").write_text(json.dumps({"tasks": [retrieval, pairs]}), encoding="utf-8")
    lines = [{"step": step, "loss/pairs": 3.0 - step / 10, "score/search": step / 20} for step in range(1, 11)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "finished.json").write_text(json.dumps({"steps": 10}))
    return path
