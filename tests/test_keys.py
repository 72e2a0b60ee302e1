"""Every key of what is kept, and every fingerprint: each part of it counts."""

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import normalizers

from embedsmith.calibrate.fisher import Fisher
from embedsmith.curate.keeper import key_of
from embedsmith.evaluate.encoding import SentenceTransformersEncoder
from embedsmith.evaluate.run import ResultCache, digest
from embedsmith.evaluate.tasks.pairs import STSTask
from embedsmith.evaluate.variants import NarrowEncoder
from embedsmith.index import Document
from embedsmith.mining import Selection
from embedsmith.mining.offline import Texts, _agreed_key, _facts
from embedsmith.mining.searchers import CrossEncoderScorer
from embedsmith.models import load_reranker
from embedsmith.search.hybrid import HybridEncoder
from tests.mining.fakes import Words
from tests.models import tiny
from tests.models.test_reranker import head


def test_fingerprint_of_a_model(tmp_path):
    model = tiny.embedder(tmp_path / "base", prompts={"query": "q: "})
    seen = {model.fingerprint()}
    other = {"bool": lambda old: not old, "int": lambda old: old + 1, "float": lambda old: old + 1}
    plain = model.settings
    apart = ("form", "main", "heads_include_prompt")  # how it is saved; what counts where a head reads prompts
    counted = [f for f in dataclasses.fields(plain) if f.name not in apart]
    for f in counted:
        old = getattr(plain, f.name)
        new = other.get(type(old).__name__, lambda old: {"another": "value"} if isinstance(old, dict) else "another")(
            old
        )
        model.settings = object.__new__(type(plain))
        vars(model.settings).update(vars(plain) | {f.name: new})
        assert model.fingerprint() not in seen, f.name
        seen.add(model.fingerprint())
    model.settings = plain
    model.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    seen.add(model.fingerprint())
    next(model.backbone.parameters()).data[0] += 1
    seen.add(model.fingerprint())
    assert len(seen) == 3 + len(counted)
    before = model.fingerprint()
    model.tokenizer.backend_tokenizer.enable_truncation(5)
    assert model.fingerprint() == before, "what use leaves in a tokenizer is none"


def differ(keys):
    """As many as there are."""
    keys = list(keys)
    return len(set(map(repr, keys))) == len(keys)


def test_fingerprints_of_encoders_around_another():
    weights = (
        {"dense": 1.0},
        {"dense": 0.5},
        {"sparse": 1.0},
        {"dense": 1.0, "sparse": 0.3},
        {"dense": 0.3, "sparse": 1.0},
    )
    models = (Words("a"), Words("b"))
    assert differ(HybridEncoder(model, each).fingerprint() for model in models for each in weights)
    assert differ(NarrowEncoder(model, width).fingerprint() for model in models for width in (4, 8))
    assert HybridEncoder(Words(), {"a": 1.0, "b": 2.0}).fingerprint() == (
        HybridEncoder(Words(), {"b": 2.0, "a": 1.0}).fingerprint()
    )


class Library(torch.nn.Linear):
    """What sentence-transformers' models say of themselves."""

    def __init__(self, **changes):
        super().__init__(2, 1)
        self.weight.data.fill_(changes.pop("weight", 1.0))
        self.bias.data.zero_()
        told = {"prompts": {"query": "q"}, "default_prompt_name": None, "max_seq_length": 8, "max_length": 8}
        told |= {"similarity_fn_name": "cosine", "activation_fn": torch.nn.Sigmoid(), "tokenizer": "words"}
        for name, value in (told | changes).items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 2.0},
        {"prompts": {"query": "p"}},
        {"prompts": {"title": "q"}},
        {"default_prompt_name": "query"},
        {"max_seq_length": 9},
        {"similarity_fn_name": "dot"},
        {"tokenizer": "other words"},
    ],
)
def test_fingerprint_of_a_model_of_sentence_transformers(changes):
    assert SentenceTransformersEncoder(Library()).fingerprint() == SentenceTransformersEncoder(Library()).fingerprint()
    assert SentenceTransformersEncoder(Library(**changes)).fingerprint() != (
        SentenceTransformersEncoder(Library()).fingerprint()
    )


def test_fingerprint_of_a_cross_encoder(tmp_path):
    model = load_reranker(str(head(tmp_path / "head")))
    seen, plain = {model.fingerprint()}, model.settings
    for f in dataclasses.fields(plain):
        old = getattr(plain, f.name)
        new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else "another"
        model.settings = dataclasses.replace(plain, **{f.name: new})
        seen.add(model.fingerprint())
    model.settings = plain
    model.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    seen.add(model.fingerprint())
    model.tokenizer.chat_template = "another"
    seen.add(model.fingerprint())
    next(model.backbone.parameters()).data[0] += 1
    seen.add(model.fingerprint())
    assert len(seen) == 4 + len(dataclasses.fields(plain))
    assert CrossEncoderScorer(model, [], []).models() == {"teacher": model.fingerprint()}


def test_key_of_mining(tmp_path):
    """The recipe's parts but for where it writes, the texts and the models."""
    from embedsmith.core.recipe import parse
    from embedsmith.mining import MineRecipe

    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["d"]}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["e"]}\n')
    tree = {"data": {"path": str(path)}, "output": str(tmp_path / "o.jsonl"), "searchers": [{"type": "bm25"}]}
    recipe = parse(MineRecipe, tree)
    texts = Texts.read(recipe)
    searcher = {"type": "embedding", "model": "m", "head": "hybrid"}
    searchers = [searcher | {"weights": {"dense": weight}} for weight in (1.0, 0.5)]
    searchers += [
        searcher,
        searcher | {"task": "sts"},
        searcher | {"instructions": False},
        searcher | {"head": "sparse"},
    ]
    changes = [
        {"data": {"path": str(path), "negatives": 3}},
        *({"searchers": [each]} for each in searchers),
        {"searchers": [{"type": "bm25", "k1": 1.0}]},
        {"searchers": [{"type": "bm25", "b": 0.5}]},
        {"searchers": [{"type": "bm25", "tokens": "words"}]},
        {"candidates": 99},
        *({"select": {name: value}} for name, value in _changed_select().items()),
        {"teacher": {"type": "embedding", "model": "m"}},
        {"short": "drop"},
        {"corpus": [{"path": "c.txt"}]},
        {"corpus": [{"path": "c.txt", "column": "x"}]},
        {"part": 5},
    ]
    keys = [_facts(parse(MineRecipe, tree | change), texts, {}) for change in [{}, *changes]]
    keys += [_facts(recipe, texts, {"m": "1"}), _facts(recipe, texts, {"m": "2"})]
    keys += [_facts(recipe, replace(texts, corpus=[*texts.corpus, "x"]), {})]
    keys += [_facts(recipe, Texts.read(parse(MineRecipe, tree | {"data": {"path": str(other)}})), {})]
    keys = [_agreed_key(facts) for facts in keys]
    assert differ(keys)
    covered = {name for change in changes for name in change} | {"output", "work", "vectors"}
    assert covered == {f.name for f in dataclasses.fields(MineRecipe)}
    elsewhere = {"output": str(tmp_path / "p.jsonl"), "work": "w", "vectors": "v"}
    assert _agreed_key(_facts(parse(MineRecipe, tree | elsewhere), texts, {})) == keys[0]


def _changed_select():
    numbers = {"negatives": 3, "skip": 1, "window": 50, "near_duplicate": 0.5, "round": 1, "offset": 11, "seed": 1}
    changed = numbers | {"strategy": "random", "temperature": 0.1, "limits": {"max_score": 1}}
    assert {*changed, "teacher_limits"} == {f.name for f in dataclasses.fields(Selection)}
    return changed


def test_key_of_a_document():
    assert differ(
        Document("1", text, metadata).hash for text in ("a", "b") for metadata in ({}, {"a": 1}, {"a": "1"}, {"b": 1})
    )


def test_key_of_a_result(tmp_path, monkeypatch):
    from embedsmith.evaluate import run as module

    task = STSTask("t", ["a", "b"], ["c", "d"], [0.0, 1.0])
    changes = ({"name": "u"}, {"text1": ["a", "x"]}, {"text2": ["c", "x"]}, {"score": [0.5, 1.0]})
    tasks = [task, *(replace(task, **change) for change in changes)]
    models = [digest(model, head) for model in ("m", "n") for head in ("dense", "sparse")]
    keys = [ResultCache(tmp_path, model).path(task) for model in models for task in tasks]
    monkeypatch.setattr(module, "added_metrics", lambda: ("mine",))
    assert differ([*keys, ResultCache(tmp_path, models[0]).path(task)])


def test_keys_of_curated_texts():
    assert differ(key_of(*parts) for parts in (("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("a",), (["a", "b"],)))


def test_key_of_fisher_information():
    records, *more = (
        SimpleNamespace(records=[SimpleNamespace(query=query, positives=positives, negatives=negatives)])
        for query, positives, negatives in (
            ("q", ("p",), ()),
            ("q", ("p",), ("n",)),
            ("q", ("r",), ()),
            ("s", ("p",), ()),
        )
    )
    settings = {"definition": "isolated", "expectation": "sampled", "temperature": 0.05, "batch_size": 16, "draws": 1}
    settings |= {"seed": 0, "probe": SimpleNamespace(negatives=7, max_length=None)}
    others = {name: "other" for name in settings} | {"probe": SimpleNamespace(negatives=8, max_length=None)}
    plain, *changed = (
        SimpleNamespace(**settings | {name: others[name]} if name else settings) for name in ("", *settings)
    )
    keys = [Fisher._measured_from(each, "hash", records) for each in (plain, *changed)]
    shorter = SimpleNamespace(**settings | {"probe": SimpleNamespace(negatives=7, max_length=64)})
    keys += [Fisher._measured_from(shorter, "hash", records)]
    keys += [Fisher._measured_from(plain, "other", records)]
    keys += [Fisher._measured_from(plain, "hash", each) for each in more]
    assert differ(keys)
