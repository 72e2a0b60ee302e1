"""What `freeze.py` runs: command lines of `embedsmith` on tiny random models and small texts, in relative paths.

A side's folder holds `recipes/` of its own commit, `inputs/` that are the same for both, `jobs/` with the recipes as
they are run, and `out/` with a folder for every job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """`commands`: run in turn, each in a process of its own: words behind `embedsmith`, or `copy` and `remove` with
    paths. `printed`: as what the commands' output is compared (json, schema, help, table), if it is. `names`:
    registered names, verbs and recipes without which the job must fail. `unread`: files that are not compared. `same`:
    files that must be equal within the tree."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    printed: str = ""
    names: tuple[str, ...] = ()
    unread: tuple[str, ...] = ("*.html", "*.sqlite", "*tfevents*", "*/hparams.yml")
    same: tuple[tuple[str, str], ...] = ()


def typed(name: str, *commands: str, **more: Any) -> Job:
    return Job(name, tuple(tuple(command.split()) for command in commands), **more)


def of_recipe(side: Path, name: str, verb: str, recipe: Tree, **more: Any) -> Job:
    """A job that is one recipe; what it makes goes to `out/NAME/made`."""
    made = f"out/{name}/made" + (".jsonl" if verb in ("mine", "curate") else "")
    recipe = {"out" if verb == "tokenize" else "output_dir" if "model_path" in recipe else "output": made} | recipe
    (side / "jobs").mkdir(parents=True, exist_ok=True)
    (side / f"jobs/{name}.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    types = {tree["type"] for tree in nested(recipe) if isinstance(tree.get("type"), str)}
    return Job(name, ((verb, f"jobs/{name}.yaml"),), names=(verb, name.partition(".")[2], *sorted(types)), **more)


def nested(tree: Any) -> Iterator[Tree]:
    """Every mapping inside a tree, itself included."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nested(child)


# Recipes of our own.

TRAIN = {"steps": 2, "log_with": [], "log_every": 1, "precision": "fp32", "batch_size": 4}
SOURCES: list[Tree] = [
    {"path": "inputs/retrieval-0.jsonl", "task": "retrieval", "negatives": 3, "batch_size": 4},
    {"path": "inputs/sts-0.jsonl", "task": "sts", "batch_size": 4},
]
JOINT: Tree = {"model": {"path": "inputs/embedder", "max_length": 16}, "data": SOURCES, "train": TRAIN}
TASKS = ["inputs/sts.jsonl", "inputs/beir"]


def setup_jobs(side: Path) -> list[Job]:
    """The models that both sides start from, made by the base: `embedder` and `last` are untrained, `parent-0` and
    `parent-1` descend from the embedder, `heads` has three heads."""
    far = TRAIN | {"steps": 4, "learning_rate": 0.01}
    heads = {"path": "inputs/bert", "pooling": "mean", "max_length": 16, "heads": ["dense", "sparse", "multivector"]}
    recipes = {f"parent-{n}": JOINT | {"data": [source], "train": far} for n, source in enumerate(SOURCES)}
    recipes |= {"heads": JOINT | {"model": heads, "data": SOURCES[:1]}}
    return [
        typed("embedder", "convert inputs/bert inputs/embedder pooling=mean"),
        typed("last", "convert inputs/decoder inputs/last pooling=last max_length=64"),
        *(of_recipe(side, name, "train", one | {"output": f"inputs/{name}"}) for name, one in recipes.items()),
    ]


PROBE = {"sources": [{"path": one["path"], "task": one["task"]} for one in SOURCES], "examples": 12}
POSITIONING = {"steps": 2, "check_every": 1, "batch_size": 4, "held_out": 0.5}
GOAL = {"tasks": TASKS, "items": 8, "documents": 20}
METHODS: dict[str, Tree] = {
    **{name: {} for name in ("task_arithmetic", "slerp", "karcher", "normalised_mean", "model_stock", "codiemb")},
    **{name: {} for name in ("warp", "nan", "magmax")},
    "average": {"restore_norm": True},
    "ties": {"density": 0.4, "rescale": "norm"},
    "dare": {"density": 0.6},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "sce": {"density": 0.5},
    "fisher": {"probe": PROBE},
    "regmean": {"probe": PROBE},
    "regmean_plus": {"type": "regmean", "probe": PROBE, "sequential": True},
    "self_positioning": {"probe": PROBE, **POSITIONING},
    "parent_matching": {"probe": PROBE, **POSITIONING},
    "lm_cocktail": {"probe": PROBE, "batch_size": 4},
    "fisher_embedding": {"type": "fisher", "probe": PROBE, "definition": "embedding"},
    "search": {"goal": GOAL, "steps": 2, "lengths": [0.8, 1.0]},
    "cma": {"type": "search", "goal": GOAL, "searcher": "cma", "evaluations": 6},
    "halving": {"type": "search", "goal": GOAL, "searcher": "halving", "points": 4},
    "greedy_soup": {"goal": GOAL},
}
MERGE: Tree = {
    "parents": [{"path": f"inputs/parent-{n}/model", "id": f"p{n}", "trajectory": f"run{n}"} for n in (0, 1)],
    "base": "inputs/embedder",
    "cache": None,
}
LOSSES: dict[str, tuple[str, Tree]] = {
    **{name: ("sts-0", {}) for name in ("angle", "codiemb_sts", "cosent", "pearson", "pro", "rank_kl")},
    **{name: ("retrieval-0", {}) for name in ("conan_weak", "cosine_consistency", "cross_batch_balance", "f2llm")},
    **{name: ("retrieval-0", {}) for name in ("flops", "gor", "gor_st", "m3_self_distillation", "qwen3")},
    **{name: ("retrieval-0", {}) for name in ("teacher_neighbours", "teacher_vectors", "uniformity")},
    **{name: ("taught", {}) for name in ("m3_ranked_kd", "margin_mse", "score_kl")},
    "supervised_contrastive": ("topics-train", {}),
    "classifier": ("topics-train", {"classes": 3}),
    "mid_nce": ("sts-0", {"threshold": 0.5}),
    "infonce-inside": ("retrieval-0", {"multi_positive": "inside", "margin": 0.1, "symmetric": True}),
    "infonce-both": ("retrieval-0", {"include_qq": True, "include_dd": True, "hardness_weight": 3.0, "block_size": 5}),
    "infonce-focal": ("retrieval-0", {"focal_gamma": 0.5, "learn_temperature": True, "negatives": "own"}),
    "infonce-late": ("retrieval-0", {"head": "multivector", "relative_margin": 0.9}),
    "matryoshka": ("retrieval-0", {"inner": "infonce", "dims": [4, 16], "weighting": "f2llm"}),
    "sum": ("retrieval-0", {"parts": ["infonce", "uniformity"], "weights": [1.0, 0.1]}),
    "weighted": ("retrieval-0", {"inner": "infonce", "weight": 0.5, "warmup_steps": 2}),
    "symmetric": ("retrieval-0", {"inner": "f2llm"}),
    "per_head": ("retrieval-0", {"inner": "infonce", "weights": {"dense": 1.0, "sparse": 0.3}}),
}
"""Every loss but those that only pre-training uses (their recipes are shipped): the file it reads, its settings."""
REFERENCE: Tree = {
    "model_path": "inputs/decoder",
    "train_data_path": "inputs/flat",
    **{"train_steps": 2, "train_batch_size": 4, "max_seq_length": 32, "warmup_steps": 1, "log_interval": 1},
    **{"mrl_enabled": True, "mrl_dims": [4, 8], "spread_enabled": True, "spread_weight": 0.1, "bi_attn_enabled": True},
    **{"lora_enabled": True, "pooling_mode": "mean"},
}
"""A flat config of the decoder toolkit."""
CHANGING = {"factor": 0.97, "ceiling": 2.0, "too_easy": -1.0}  # nearly every score replaces a negative
LIVE: dict[str, Tree] = {
    "each_loss": CHANGING,
    "scheduled": {"rule": "scheduled", "every": 4, "rescored": 6, **CHANGING},
    "remine": {"guard": 0.9, "remine_every": 5, "pool": 12, **CHANGING},
}
MINE: Tree = {
    "data": {"path": "inputs/retrieval-0.jsonl"},
    "corpus": [{"path": "inputs/docs.jsonl"}],
    "candidates": 24,
    "select": {"negatives": 5, "strategy": "random", "skip": 1, "near_duplicate": None},
    "teacher": {"type": "embedding", "model": "inputs/parent-0/model"},
}
SEARCHERS: dict[str, list[Tree]] = {
    "both": [{"type": "embedding", "model": "inputs/embedder"}, {"type": "bm25"}],
    "hybrid": [{"type": "embedding", "model": "inputs/heads/model", "head": "hybrid"}],
    "approximate": [{"type": "embedding", "model": "inputs/embedder", "index": "HNSW8,Flat"}],
}


def own_jobs(side: Path) -> Iterator[Job]:
    """Jobs that are a recipe: trainings, merges by every method, minings."""
    scored = {"tasks": TASKS, "every": 2, "geometry": 12, "dims": [4, 8], "validation": SOURCES[1:]}
    plans: dict[str, Tree] = {
        "mixed": {"batches": "mixed"},
        "balanced": {"schedule": "balanced", "order": "strict", "small": "pad"},
        "temperature": {"schedule": "temperature", "order": "sequential"},
        "tokens": {"batch_tokens": 160, "multiple": 2},
    }
    trainings: dict[str, Tree] = {
        "reference": REFERENCE,
        "packed": JOINT | {"model": {"path": "inputs/last", "packing": True, "prompts": {"query": "the "}}},
        "scored": JOINT | {"evaluate": scored, "train": TRAIN | {"steps": 4, "final": "best"}},
        "budget": JOINT | {"train": TRAIN | {"batch_size": 12, "token_budget": 64}},
        "micro": JOINT | {"train": TRAIN | {"micro_batch": 2, "clip_norm": None, "schedule": "cosine"}},
        **{f"plan.{name}": JOINT | {"train": TRAIN | {"steps": 6, "plan": plan}} for name, plan in plans.items()},
    }
    for name, mining in LIVE.items():
        rows = {"data": [SOURCES[0] | {"batch_size": 8}]}
        trainings[name] = JOINT | rows | {"train": TRAIN | {"steps": 12, "checkpoint_every": 5, "mining": mining}}
    for name, recipe in trainings.items():
        yield of_recipe(side, f"train.{name}", "train", recipe)
    for name, (path, loss) in LOSSES.items():
        source = {"path": f"inputs/{path}.jsonl", "batch_size": 8, "loss": {"type": name.partition("-")[0], **loss}}
        source |= {"teacher": "inputs/parent-0/model"} if name.startswith("teacher_") else {}
        heads = {"path": "inputs/heads/model", "max_length": 16}
        yield of_recipe(side, f"loss.{name}", "train", JOINT | {"model": heads, "data": [source]})
    for name, method in METHODS.items():
        yield of_recipe(side, f"merge.{name}", "merge", MERGE | {"method": {"type": name} | method})
    yield of_recipe(side, "merge.adapter", "merge", MERGE | {"method": {"type": "slerp"}, "adapter": {"rank": 2}})
    for name, searchers in SEARCHERS.items():
        yield of_recipe(side, f"mine.{name}", "mine", MINE | {"searchers": searchers})


def cut_job(side: Path) -> Job:
    """A run that lost all behind its second step, and was continued: it ends as it did before it was cut off."""
    made, whole = "out/train.cut/made", "out/train.cut/whole"
    job = of_recipe(side, "train.cut", "train", JOINT | {"train": TRAIN | {"steps": 4, "checkpoint_every": 2}})
    lost = ("remove", f"{made}/finished.json", f"{made}/model", f"{made}/checkpoints/step-4")
    files = ("model/model.safetensors", "metrics.jsonl", "checkpoints/step-4/training.pt")
    commands = (*job.commands, ("copy", made, whole), lost, *job.commands)
    return replace(job, commands=commands, same=tuple((f"whole/{file}", f"made/{file}") for file in files))


def ranks_job(side: Path) -> Job:
    """A training on two processes."""
    job = of_recipe(side, "train.ranks", "train", JOINT)
    return replace(job, commands=(("ranks", "2", *job.commands[0]),))


def tokens_job(side: Path) -> Job:
    """Texts to token ids, and a training on them."""
    texts = [source["path"] for source in SOURCES]
    cached = [source | {"path": "out/tokens/cache", "split": Path(source["path"]).stem} for source in SOURCES]
    model = {"path": "inputs/last", "max_length": 32}
    job = of_recipe(side, "tokens", "train", JOINT | {"model": model, "data": cached})
    made = ("tokenize", *texts, "--model", "inputs/last", "--max-length", "32", "--out", "out/tokens/cache")
    return replace(job, commands=(made, *job.commands))


# Command lines.


def jobs_of(side: Path, verbs: list[str], url: str) -> list[Job]:
    """All jobs of a side; the recipes that they need are written. `url`: of a language model."""
    heads, parents = "inputs/heads/model", "inputs/parent-0/model inputs/parent-1/model"
    tasks = "-t inputs/beir -t inputs/sts.jsonl"
    more = f"{tasks} -t inputs/topics-test.jsonl -t clustering:inputs/groups.jsonl"
    probes = "--probe inputs/retrieval-0.jsonl --probe inputs/sts-0.jsonl"
    inspected = [f"inspect inputs/{name}.jsonl --json" for name in ("retrieval-0", "sts-0")]
    exported = [
        f"export {heads} out/export/{head} --head {head}" for head in ("dense", "sparse", "multivector", "pylate")
    ]
    changes = (
        "attention=bidirectional pooling=weighted_mean",
        "pooling=latent pooler.latents=4",
        "head.out=8 layers=1",
    )
    converted = [f"convert inputs/decoder out/convert/{place} {change}" for place, change in enumerate(changes)]
    return [
        typed("help", "--help", *(f"{verb} --help" for verb in verbs), printed="help"),
        typed("schema", "schema", printed="schema"),
        typed("losses", "losses", printed="table"),
        typed("curate.list", "curate --list", printed="table"),
        typed("inspect", *inspected, "inspect jobs/recipe.joint.yaml --no-time --json", printed="json"),
        *shipped_jobs(side, url),
        *own_jobs(side),
        cut_job(side),
        tokens_job(side),
        ranks_job(side),
        typed("merge.explain", f"merge jobs/merge.slerp.yaml --explain out/merge.explain {probes}"),
        typed("merge.verify", f"merge jobs/merge.slerp.yaml --verify {probes} output=out/merge.verify"),
        typed(
            "encode",
            "encode inputs/texts.txt out/encode/a --model inputs/embedder",
            "encode inputs/texts.txt out/encode/b --model inputs/last --stored int8 --dim 8 --role query",
        ),
        typed(
            "evaluate",
            f"evaluate {heads} {tasks} --head all --items --json out/evaluate/heads.json",
            f"evaluate inputs/embedder {more} --json out/evaluate/kinds.json",
            f"evaluate inputs/embedder {tasks} --dims 4 --dims 8 --json out/evaluate/widths.json",
        ),
        typed("compare", f"compare {parents} {tasks} --json out/compare/made.json"),
        typed(
            "geometry", f"geometry {parents.replace(' ', ' --against ')} -t inputs/texts.txt --json out/geometry/a.json"
        ),
        typed(
            "search",
            f"index {heads} inputs/docs.jsonl --to out/search/index",
            "search cat --index out/search/index --json --explain",
            "search tree --index out/search/index --json --rrf --filter lang=a",
            printed="json",
            unread=("*",),
        ),
        typed("export", *exported),
        typed("convert", *converted),
        typed(
            "curate",
            "curate inputs/raw.jsonl out/curate/a.jsonl input.on_error=skip --step exact_duplicates --step links",
        ),
    ]


# Shipped recipes.

FIRST_KEY = {"stages": "run", "parents": "merge", "searchers": "mine", "steps": "curate", "out": "tokenize"}


def shipped_jobs(side: Path, url: str) -> Iterator[Job]:
    """Every recipe in `recipes/`, two steps long."""
    for path in sorted([*side.glob("recipes/*.yaml"), *side.glob("recipes/decoder/*.yaml")]):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        verb = next((verb for key, verb in FIRST_KEY.items() if key in recipe), "train")
        shrink(recipe, verb, url)
        for key in ("output", "out"):
            recipe.pop(key, None)
        yield of_recipe(side, f"recipe.{path.stem}", verb, recipe)


def shrink(recipe: Tree, verb: str, url: str) -> None:
    """Make a recipe read the inputs instead of what it names, and take two steps."""
    if verb == "run":
        for stage in recipe["stages"]:
            shrink(stage["recipe"], stage["verb"], url)
    elif verb in ("train", "tokenize"):
        shrink_training(recipe, verb)
    elif verb == "merge":
        for place, parent in enumerate(recipe["parents"]):
            parent["path"] = own(parent["path"], f"inputs/parent-{'*' if '*' in parent['path'] else place}/model")
        recipe |= {"base": "inputs/embedder", "cache": None}
        recipe.pop("packaging", None)
        for source in recipe["method"].get("probe", {}).get("sources", ()):
            source["path"] = f"inputs/{source['task']}-0.jsonl"
            recipe["method"] |= POSITIONING
    elif verb == "mine":
        recipe["data"]["path"] = "inputs/retrieval-0.jsonl"
        recipe["candidates"], recipe["select"]["negatives"] = 20, min(recipe["select"]["negatives"], 14)
        for model in (*recipe["searchers"], recipe.get("teacher", {})):
            model |= {"model": "inputs/embedder"} if model else {}
    elif verb == "curate":
        long = recipe["input"].get("kind") == "documents"
        recipe["input"] |= {"path": f"inputs/{'articles' if long else 'raw'}.jsonl", "on_error": "skip"}
        for step in recipe["steps"]:
            step |= {"model": "inputs/embedder", "threshold": 0.0} if "model" in step else {}
            step |= {"tasks": ["inputs/sts.jsonl"]} if "tasks" in step else {}
            step |= {"generator": step["generator"] | {"base_url": url}} if "generator" in step else {}
    else:
        recipe["tasks"] = TASKS


def own(path: str, ours: str) -> str:
    """Our path in place of a recipe's, unless that is what an earlier stage makes."""
    return path if path.startswith("${") else ours


def shrink_training(recipe: Tree, verb: str) -> None:
    model = recipe["model"]
    decoder = any(family in model["path"] for family in ("Qwen", "SmolLM", "stage_a"))
    start = ("decoder" if "pooling" in model else "last") if decoder else "bert" if "pooling" in model else "embedder"
    model |= {"path": own(model["path"], f"inputs/{start}"), "max_length": 128 if decoder else 16}
    model |= {key: value for key, value in (("layers", 1), ("positions", 64)) if key in model}
    for place, source in enumerate(recipe["data"]):
        ending = "parquet" if source.get("streaming") else "jsonl"
        source |= {"path": own(source["path"], f"inputs/{source['task']}-{place}.{ending}"), "batch_size": 4}
        source |= {"teacher": "inputs/last"} if "teacher" in source else {}
        for loss in nested(source.get("loss")):
            loss |= {"dims": [4, 8, 12, 16][: len(loss["dims"])]} if "dims" in loss else {}
    if verb == "train":
        train = recipe.setdefault("train", {})
        train.pop("epochs", None)
        train |= TRAIN | ({"warmup": 1} if train.get("warmup", 0) >= 1 else {})
