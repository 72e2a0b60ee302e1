"""What `freeze.py` runs: command lines of `embedsmith` on tiny random models and small texts, in relative paths.

Every side has a folder: `recipes/` of its own commit, the same `inputs/`, and `jobs/` (recipes as they are run) and
`out/` (a folder a job) that are filled here and by the jobs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "by", "mat", "tree", "red", "blue", "big", "old", "new", "far"]
TASKS = ["inputs/sts.jsonl", "inputs/beir"]
TRAIN = {"steps": 2, "log_with": [], "log_every": 1, "precision": "fp32", "batch_size": 4}


@dataclass(frozen=True)
class Job:
    """`commands`: run one after the other, each in a process of its own; the words after `embedsmith`, or `remove` and
    `copy` with paths. `printed`: what the commands print, if that is compared too. `names`: registered names without
    which the job cannot run. `unread`: patterns of files that are not compared. `same`: pairs of files that have to
    be equal within the tree."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    printed: str = ""
    names: tuple[str, ...] = ()
    unread: tuple[str, ...] = ("*.html",)
    same: tuple[tuple[str, str], ...] = ()


SETUP = {
    "inputs/embedder": "convert inputs/bert inputs/embedder pooling=mean",
    "inputs/last": "convert inputs/decoder inputs/last pooling=last max_length=128",
    "inputs/parent-0": "train jobs/parent-0.yaml",
    "inputs/parent-1": "train jobs/parent-1.yaml",
    "inputs/heads": "train jobs/heads.yaml",
}
"""Models that the base makes for both sides: what depends on a saved embedder starts from the same one."""


def write_inputs(folder: Path) -> None:
    """Random backbones with their tokenizers, and texts."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shape |= {"initializer_range": 0.3, "pad_token_id": 0}
    words, letters = bert_tokenizer(), byte_tokenizer()
    bert = BertConfig(vocab_size=len(words), max_position_embeddings=40, **shape)
    qwen = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, **shape}
    for name, model, tokenizer in (
        ("bert", BertForMaskedLM(bert), words),
        ("decoder", Qwen3Model(Qwen3Config(vocab_size=280, max_position_embeddings=256, **qwen)), letters),
    ):
        with torch.no_grad():  # biases that are zero show nothing
            for parameter in (p for key, p in model.named_parameters() if key.endswith("bias")):
                parameter.normal_(0, 0.3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_texts(folder, random.Random(0))


def bert_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    marks = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    vocabulary = {token: number for number, token in enumerate([*marks.values(), *dict.fromkeys(WORDS + letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(*((mark, vocabulary[mark]) for mark in ("[SEP]", "[CLS]")))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **marks)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("d", "o"), ("do", "g"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    pieces = [*marks.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def write_texts(folder: Path, chance: random.Random) -> None:
    """Files of every kind that a job reads; sentences of a few words that mean little."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def text() -> str:
        adjective, noun = WORDS[10:15], [*WORDS[2:4], *WORDS[8:10]]
        words = ["the", chance.choice(adjective), chance.choice(noun), chance.choice(WORDS[4:6])]
        return " ".join([*words, chance.choice(WORDS[6:8]), "the", chance.choice(adjective), chance.choice(noun)])

    def write(name: str, rows: list[Tree]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")

    for place in range(3):
        pairs = [{"query": text()[4:], "pos": [text(), text()], "neg": [text() for _ in range(16)]} for _ in range(24)]
        scored = [{"text1": text(), "text2": text(), "score": number / 24} for number in range(24)]
        write(f"retrieval-{place}.jsonl", pairs)
        write(f"sts-{place}.jsonl", scored)
        pq.write_table(pa.Table.from_pylist(pairs), folder / f"retrieval-{place}.parquet")
    write("sts.jsonl", [{"text1": text(), "text2": text(), "score": chance.random()} for _ in range(24)])
    corpus = [
        {"_id": f"d{number}", "title": text()[4:11], "text": text(), "lang": WORDS[number % 2]} for number in range(30)
    ]
    write("beir/corpus.jsonl", corpus)
    write("docs.jsonl", corpus)
    write("beir/queries.jsonl", [{"_id": f"q{number}", "text": text()} for number in range(10)])
    for split in ("test", "dev"):
        rows = [f"q{query}\td{chance.randrange(30)}\t1" for query in range(10)]
        (folder / "beir/qrels").mkdir(exist_ok=True)
        (folder / f"beir/qrels/{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows, ""]))
    for split in ("train", "test"):
        write(f"topics-{split}.jsonl", [{"text": text(), "label": WORDS[10 + number % 3]} for number in range(18)])
    raw = [{"query": text(), "pos": [text()]} for _ in range(24)]
    raw += [*raw[:3], {"query": "https://a.example/b", "pos": [text()]}, {"query": "", "pos": [text()]}]
    raw += [
        {"query": "猫坐在红色的垫子上面看着老树", "pos": ["那只大狗在蓝色的树旁边跑来跑去"]},
        {"query": "!!! ???", "pos": ["..."]},
    ]
    raw += [{"query": raw[5]["query"] + " now", "pos": [raw[5]["pos"][0] + " now"]}]
    write("raw.jsonl", raw)
    write("articles.jsonl", [{"text": "\n\n".join(f"{text()}. {text()}." for _ in range(25))} for _ in range(4)])
    (folder / "texts.txt").write_text("".join(f"{text()}\n" for _ in range(40)))


def verb_of(recipe: Tree) -> str:
    marks = {"stages": "run", "parents": "merge", "searchers": "mine", "steps": "curate", "out": "tokenize"}
    return next((verb for key, verb in marks.items() if key in recipe), "train")


def shrink(recipe: Tree, verb: str, url: str = "") -> None:
    """Make a shipped recipe read the inputs, and take two steps. `url`: of a language model's endpoint."""
    if verb == "run":
        for stage in recipe["stages"]:
            shrink(stage["recipe"], stage["verb"], url)
    elif verb in ("train", "tokenize"):
        shrink_training(recipe)
    elif verb == "merge":
        shrink_merge(recipe)
    elif verb == "mine":
        recipe["data"]["path"] = own(recipe["data"]["path"], "inputs/retrieval-0.jsonl")
        recipe |= {"candidates": 20}
        recipe["select"]["negatives"] = min(recipe["select"].get("negatives", 7), 14)
        for searcher in (*recipe["searchers"], *([recipe["teacher"]] if "teacher" in recipe else [])):
            searcher["model"] = own(searcher["model"], "inputs/embedder")
    elif verb == "evaluate":
        recipe["tasks"] = TASKS
    elif verb == "curate":
        documents = recipe["input"].get("kind") == "documents"
        recipe["input"]["path"] = own(
            recipe["input"]["path"], "inputs/articles.jsonl" if documents else "inputs/raw.jsonl"
        )
        for step in recipe["steps"]:
            step |= {"model": "inputs/embedder", "threshold": 0.0} if "model" in step else {}
            step |= {"tasks": ["inputs/sts.jsonl"]} if "tasks" in step else {}
            step |= {"article_min": 300} if "article_min" in step else {}
            if "generator" in step:
                step["generator"]["base_url"] = url


def own(path: str, ours: str) -> str:
    """A path of a recipe, unless it is what an earlier stage makes."""
    return path if path.startswith("${") else ours


def shrink_training(recipe: Tree) -> None:
    model = recipe["model"]
    decoder = any(family in model["path"] for family in ("Qwen", "SmolLM"))
    plain = "decoder" if decoder else "bert" if "pooling" in model else "embedder"
    model["path"] = own(
        model["path"], f"inputs/{plain}" if not model["path"].startswith("runs/stage_a") else "inputs/last"
    )
    model["max_length"] = 128 if decoder or "last" in model["path"] else 16
    model |= {key: value for key, value in (("layers", 1), ("positions", 64)) if key in model}
    for place, source in enumerate(recipe["data"]):
        ending = "parquet" if source.get("streaming") else "jsonl"
        source["path"] = own(source["path"], f"inputs/{source['task']}-{place}.{ending}")
        source |= {"batch_size": 4} | ({"teacher": "inputs/last"} if "teacher" in source else {})
        for loss in nested(source.get("loss", {})):
            if "dims" in loss:
                loss["dims"] = [4, 8, 12, 16][: len(loss["dims"])]
    if "train" in recipe or "out" not in recipe:
        train = recipe.setdefault("train", {})
        train.pop("epochs", None)
        train |= TRAIN | ({"warmup": 1} if train.get("warmup", 0) >= 1 else {})


def nested(tree: Any) -> Iterator[Tree]:
    """Every mapping inside a tree, the tree itself first."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nested(child)


def shrink_merge(recipe: Tree) -> None:
    for place, parent in enumerate(recipe["parents"]):
        parent["path"] = own(
            parent["path"], "inputs/parent-*/model" if "*" in parent["path"] else f"inputs/parent-{place}/model"
        )
    recipe |= {"base": own(recipe["base"], "inputs/embedder"), "cache": None}
    recipe.pop("packaging", None)
    if probe := recipe["method"].get("probe"):
        for source in probe["sources"]:
            source["path"] = f"inputs/{source['task']}-0.jsonl"
        recipe["method"] |= POSITIONING


POSITIONING = {"steps": 2, "check_every": 1, "batch_size": 4, "held_out": 0.5}
PROBE = {"sources": [{"path": f"inputs/{task}-0.jsonl", "task": task} for task in ("retrieval", "sts")], "examples": 12}
GOAL = {"tasks": TASKS, "items": 8, "documents": 20}
METHODS: dict[str, Tree] = {
    "average": {"restore_norm": True},
    "task_arithmetic": {},
    "slerp": {"scale": 0.9},
    "warp": {},
    "karcher": {},
    "normalised_mean": {},
    "model_stock": {},
    "nan": {},
    "ties": {"density": 0.4, "rescale": "norm"},
    "dare": {"density": 0.6},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "sce": {"density": 0.5},
    "magmax": {},
    "codiemb": {},
    "fisher": {"probe": PROBE},
    "regmean": {"probe": PROBE},
    "regmean_plus": {"type": "regmean", "probe": PROBE, "sequential": True},
    "self_positioning": {"probe": PROBE, **POSITIONING},
    "parent_matching": {"probe": PROBE, **POSITIONING},
    "lm_cocktail": {"probe": PROBE, "batch_size": 4},
    "search": {"goal": GOAL, "steps": 2, "lengths": [0.8, 1.0]},
    "greedy_soup": {"goal": GOAL},
}
PARENTS = [
    {"path": f"inputs/parent-{place}/model", "id": f"parent{place}", "trajectory": f"run{place}"} for place in (0, 1)
]
MERGE: Tree = {"parents": PARENTS, "base": "inputs/embedder", "cache": None}
SOURCES = [
    {"path": "inputs/retrieval-0.jsonl", "task": "retrieval", "negatives": 3, "batch_size": 4},
    {"path": "inputs/sts-0.jsonl", "task": "sts", "batch_size": 4},
]
JOINT: Tree = {"model": {"path": "inputs/embedder", "max_length": 16}, "data": SOURCES, "train": TRAIN}
LIVE: Tree = {
    "model": {"path": "inputs/embedder"},
    "data": [SOURCES[0] | {"batch_size": 8, "name": "pools"}],
    "train": TRAIN | {"steps": 12, "checkpoint_every": 5},
}
MINE: Tree = {
    "data": {"path": "inputs/retrieval-0.jsonl"},
    "corpus": [{"path": "inputs/docs.jsonl"}],
    "searchers": [{"type": "embedding", "model": "inputs/embedder"}, {"type": "bm25"}],
    "candidates": 12,
    "select": {"negatives": 5, "strategy": "random", "skip": 1, "limits": {"relative_margin": 0.01}},
    "teacher": {"type": "embedding", "model": "inputs/parent-0/model"},
}


def setup_recipes() -> dict[str, Tree]:
    """The recipes that `SETUP` names."""
    heads = {"path": "inputs/bert", "pooling": "mean", "max_length": 16, "heads": ["dense", "sparse", "multivector"]}
    parents = {
        f"parent-{n}": JOINT
        | {"data": [SOURCES[n]], "train": TRAIN | {"steps": 4, "learning_rate": 1e-2}, "output": f"inputs/parent-{n}"}
        for n in (0, 1)
    }
    return parents | {"heads": JOINT | {"model": heads, "data": SOURCES[:1], "output": "inputs/heads"}}


def own_recipes() -> dict[str, tuple[str, Tree]]:
    """Jobs that are a recipe of ours: name to verb and recipe."""
    every = {"tasks": TASKS, "every": 2, "geometry": 12, "dims": [4, 8], "validation": [SOURCES[1]]}
    changing = {"factor": 0.97, "ceiling": 2.0, "too_easy": -1.0}
    live = {
        "each_loss": changing,
        "scheduled": {"rule": "scheduled", "every": 4, "rescored": 6, **changing},
        "remine": {"guard": 0.9, "remine_every": 5, "pool": 12, **changing},
    }
    made = {
        f"live.{name}": ("train", LIVE | {"train": LIVE["train"] | {"mining": mining}}) for name, mining in live.items()
    }
    made |= {
        f"merge.{name}": ("merge", MERGE | {"method": {"type": name} | method}) for name, method in METHODS.items()
    }
    hybrid = {"type": "embedding", "model": "inputs/heads/model", "head": "hybrid"}
    nearest = {"type": "embedding", "model": "inputs/embedder", "index": "HNSW8,Flat"}
    return made | {
        "train.evaluated": ("train", JOINT | {"evaluate": every, "train": TRAIN | {"steps": 4, "final": "best"}}),
        "train.budget": ("train", JOINT | {"train": TRAIN | {"batch_size": 12, "token_budget": 64}}),
        "train.micro": ("train", JOINT | {"train": TRAIN | {"micro_batch": 2, "plan": {"batches": "mixed"}}}),
        "merge.adapter": ("merge", MERGE | {"method": {"type": "slerp"}, "adapter": {"rank": 2}}),
        "mine.both": ("mine", MINE),
        "mine.hybrid": ("mine", MINE | {"searchers": [hybrid], "teacher": None}),
        "mine.approximate": ("mine", MINE | {"searchers": [nearest]}),
    }


def jobs_of(side: Path, verbs: list[str], url: str) -> list[Job]:
    """All jobs of a side, after writing their recipes to `jobs/`."""
    made = [*recipe_jobs(side, url), *command_jobs(verbs)]
    for name, (verb, recipe) in own_recipes().items():
        made.append(recipe_job(side, name, verb, recipe))
    return [*made, cut_job(side)]


def recipe_jobs(side: Path, url: str) -> Iterator[Job]:
    """Every shipped recipe."""
    for path in sorted([*side.glob("recipes/*.yaml"), *side.glob("recipes/decoder/*.yaml")]):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        verb = verb_of(recipe)
        shrink(recipe, verb, url)
        yield recipe_job(side, f"recipe.{path.stem}", verb, recipe)


def recipe_job(side: Path, name: str, verb: str, recipe: Tree) -> Job:
    files = {"mine": f"out/{name}/mined.jsonl", "curate": f"out/{name}/curated.jsonl"}
    recipe = recipe | {"out" if verb == "tokenize" else "output": files.get(verb, f"out/{name}/made")}
    save(side, name, recipe)
    kinds = (tree["type"] for tree in nested(recipe) if isinstance(tree.get("type"), str))
    return Job(name, ((verb, f"jobs/{name}.yaml"),), names=(name.rsplit(".", 1)[-1], *dict.fromkeys(kinds)))


def save(side: Path, name: str, recipe: Tree) -> None:
    (side / "jobs").mkdir(exist_ok=True)
    (side / f"jobs/{name}.yaml").write_text(
        yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )


def cut_job(side: Path) -> Job:
    """A run that was cut off behind its second step, and continued: all as in the run that was not."""
    recipe = JOINT | {"train": TRAIN | {"steps": 4, "checkpoint_every": 2}, "output": "out/train.cut/made"}
    save(side, "train.cut", recipe)
    made, run = "out/train.cut/made", ("train", "jobs/train.cut.yaml")
    lost = ("remove", f"{made}/finished.json", f"{made}/model", f"{made}/checkpoints/step-4")
    files = ("model/model.safetensors", "metrics.jsonl", "checkpoints/step-4/training.pt")
    commands = (run, ("copy", made, "out/train.cut/whole"), lost, run)
    return Job("train.cut", commands, same=tuple((f"whole/{file}", f"made/{file}") for file in files))


def command_jobs(verbs: list[str]) -> list[Job]:
    """Jobs that are command lines without a recipe."""

    def job(name: str, *commands: str, **more: Any) -> Job:
        return Job(name, tuple(tuple(command.split()) for command in commands), **more)

    heads, out = "inputs/heads/model", "out/{}"
    probes = "--probe inputs/retrieval-0.jsonl --probe inputs/sts-0.jsonl"
    tasks = "-t inputs/beir -t inputs/sts.jsonl"
    labels = "-t inputs/topics-test.jsonl -t clustering:inputs/topics-test.jsonl"
    parents = "inputs/parent-0/model inputs/parent-1/model"
    return [
        job("schema", "schema", printed="schema"),
        job("help", "--help", *(f"{verb} --help" for verb in verbs), printed="help"),
        job("losses", "losses", printed="table"),
        job("curate.list", "curate --list", printed="table"),
        job(
            "inspect.data",
            "inspect inputs/retrieval-0.jsonl --json",
            "inspect inputs/sts-0.jsonl --json",
            printed="json",
        ),
        job("inspect.recipe", "inspect jobs/recipe.joint.yaml --no-time --json", printed="json"),
        job(
            "encode",
            f"encode inputs/texts.txt {out.format('encode/a')} --model inputs/embedder",
            f"encode inputs/texts.txt {out.format('encode/b')} --model inputs/last --stored int8 --dim 8 --role query",
        ),
        job(
            "evaluate",
            f"evaluate {heads} {tasks} --head all --items --json out/evaluate/heads.json",
            f"evaluate inputs/embedder {tasks} {labels} --dims 4 --dims 8 --json out/evaluate/dims.json",
        ),
        job("compare", f"compare {parents} {tasks} --json out/compare/compared.json"),
        job(
            "geometry",
            "geometry inputs/parent-0/model -t inputs/texts.txt --against inputs/parent-1/model "
            "--json out/geometry/looks.json",
        ),
        job(
            "search",
            f"index {heads} inputs/docs.jsonl --to out/search/index",
            "search cat --index out/search/index --json --explain",
            "search tree -i out/search/index --json --rrf --filter lang=a",
            printed="json",
            unread=("*",),
        ),
        job(
            "export",
            *(
                f"export {heads} {out.format('export')}/{head} --head {head}"
                for head in ("dense", "sparse", "multivector", "pylate")
            ),
        ),
        job(
            "convert",
            "convert inputs/decoder out/convert/both attention=bidirectional",
            "convert inputs/bert out/convert/bert",
        ),
        job(
            "curate.steps", "curate inputs/raw.jsonl out/curate.steps/kept.jsonl --step exact_duplicates --step length"
        ),
        job(
            "tokenize",
            "tokenize inputs/retrieval-0.jsonl inputs/sts-0.jsonl --model inputs/last --out out/tokenize/tokens "
            "--max-length 64",
            "train jobs/recipe.f2llm.yaml model.path=inputs/last data.0.path=out/tokenize/tokens/retrieval-0 "
            "model.max_length=64 model.template=null output=out/tokenize/made",
        ),
        job("merge.explain", f"merge jobs/merge.slerp.yaml --explain out/merge.explain {probes}"),
        job("merge.verify", f"merge jobs/merge.slerp.yaml --verify {probes} output=out/merge.verify"),
    ]
