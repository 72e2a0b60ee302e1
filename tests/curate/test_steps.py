"""Each curation step on records in memory: what leaves, why, and what must stay."""

import math
import random

import pytest
import torch

from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import curation_steps
from embedsmith.curate import (
    Boilerplate,
    CurateRecipe,
    Decontaminate,
    EvaluationText,
    ExactDuplicates,
    LabelsToPairs,
    Language,
    Length,
    Links,
    NearDuplicates,
    ScoreFilter,
    Symbols,
    Tools,
    Trivial,
    apply,
)
from embedsmith.curate.dedup import band_count
from embedsmith.curate.rules import guess_language, token_shingles, units
from embedsmith.data import Record

EN = "The quick brown fox jumps over the lazy dog near the old river bank"
ZH = "敏捷的棕色狐狸跳过了河边那只懒惰的狗"


def pair(query, *positives, **more):
    return Record(query, positives, **more)


def left(ledger):
    return {reason: departure.count for reason, departure in ledger.left.items()}


def test_units_count_both_languages_alike():
    assert units("It is fine weather today, isn't it?") == 8
    assert units("今天天气很好，不是吗？") == 9
    assert units("我想查询iPhone 15的价格") == 9


@pytest.mark.parametrize(("short", "good"), [("Yes.", EN), ("好的。", ZH)])
def test_length(short, good):
    kept, ledger = apply(Length(), [pair("a query", short), pair("问题是", good), pair("x", good)])
    assert [record.positives for record in kept] == [(good,)]
    assert left(ledger) == {"positive: shorter than 4 units": 1, "query: shorter than 2 units": 1}
    assert ledger.left["positive: shorter than 4 units"].examples[0]["positives"] == [short]


def test_a_bad_text_leaves_alone_and_takes_its_score_along():
    record = pair("what is it", EN, "no", ZH, positive_scores=(0.9, 0.5, 0.7), negatives=("x", EN + "!"))
    kept, ledger = apply(Length(), [record])
    assert kept[0].positives == (EN, ZH)
    assert kept[0].positive_scores == (0.9, 0.7)
    assert kept[0].negatives == (EN + "!",)
    assert not ledger.left
    assert sum(departure.count for departure in ledger.lost.values()) == 2


@pytest.mark.parametrize(
    ("step", "bad", "reason"),
    [
        (Symbols(), "### --- *** ///", "mostly symbols"),
        (Symbols(), "12345 67890 42", "mostly digits"),
        (Symbols(), "好" * 30, "one character repeated"),
        (Links(), "https://example.org/a?b=1", "nothing but addresses"),
        (Links(), "see https://example.org/a/very/long/path/to/some/page.html", "mostly addresses"),
        (Links(), "看 https://example.org/a/very/long/path/to/some/page.html", "mostly addresses"),
        (Boilerplate(), "We use cookies. Accept all cookies to continue.", "boilerplate"),
        (Boilerplate(), "版权所有，未经许可不得转载。点击查看更多", "boilerplate"),
        (Boilerplate(), "a line that repeats\n" * 5, "repeated lines"),
        (Language(), "Das Wetter ist heute sehr schön und wir gehen in den Park", "language de"),
        (Language(), "Сегодня", "script cyrillic"),
        (Language(keep=("zh",)), EN, "language en"),
        (Language(keep=("en",)), "狐狸", "language zh"),
        (Language(), "カードをなくしました", "language ja"),
    ],
)
def test_rules_drop(step, bad, reason):
    kept, ledger = apply(step, [pair("a query that stays", bad)] if step != Language(keep=("zh",)) else [pair(ZH, bad)])
    assert kept == []
    assert left(ledger) == {f"positive: {reason}": 1}


@pytest.mark.parametrize("step", [Length(), Symbols(), Links(), Boilerplate(), Language(), Trivial()])
def test_rules_keep_good_texts_of_both_languages(step):
    good = [
        pair("what does the fox jump over", EN),
        pair("狐狸跳过了什么", ZH),
        pair("C++ library for INI-style configuration files", f"{EN}. See https://example.org or write to a@b.org."),
        pair("我想查询iPhone 15的价格", "All rights reserved is a phrase. " + EN * 3),
    ]
    kept, ledger = apply(step, good)
    assert kept == good
    assert ledger.taken == ledger.given == 4


def test_short_latin_text_is_not_guessed():
    assert guess_language("Vitamin D").language is None
    assert guess_language("狐").language == "zh"
    assert guess_language("12 + 3").script == "none"
    assert guess_language("Привет, мир: abc").script == "cyrillic"
    assert guess_language("one two three, мир").script == "latin"


def test_trivial():
    record = Record("the query", ("The query", "the  query", "an answer", "an answer"), ("an answer", "other", "other"))
    given = [pair("same", "same", task="sts"), record, pair("same", "same"), pair("same", "same", task="sts")]
    alike, *kept = apply(Trivial(), given)[0]
    assert alike == given[0]
    assert kept[0].positives == ("The query", "an answer")
    assert kept[0].negatives == ("other",)
    assert [record.task for record in kept] == ["retrieval", "sts"]


def test_exact_duplicates():
    rows = [pair("q", "a b"), pair("q", "a  b"), pair("q", "other"), pair("r", "a b"), pair("q a", "b")]
    assert apply(ExactDuplicates(), rows)[0] == [rows[0], rows[2], rows[3], rows[4]]
    assert apply(ExactDuplicates(by="query"), rows)[0] == [rows[0], rows[3], rows[4]]
    assert apply(ExactDuplicates(by="positives", keep=2), rows)[0] == [rows[0], rows[1], rows[2], rows[4]]
    labelled = [Record("x", label=0), Record("y", label=0)]
    assert apply(ExactDuplicates(by="positives"), labelled)[0] == labelled


@pytest.mark.parametrize("text", [EN * 3, ZH * 3])
def test_near_duplicates(text):
    rows = [
        pair("first question about it", text),
        pair("first question about it!", text + "!?"),
        pair("an entirely other matter", text),
        pair("first question about it", "Something else that has nothing to do with foxes 或者狗"),
    ]
    kept, ledger = apply(NearDuplicates(), rows)
    assert kept == [rows[0], rows[2], rows[3]]
    assert "similarity about 1.00" in ledger.left["nearly the same record as an earlier one"].examples[0]["why"]
    assert apply(NearDuplicates(by="positives"), rows)[0] == [rows[0], rows[3]]


def test_near_duplicates_estimate_the_true_similarity():
    """Around the threshold: those well above leave, those well below stay; the truth is the shingles' Jaccard index."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    rows, truth = [], []
    for changed in (1, 2, 4, 10, 20, 30):
        for _ in range(20):
            base = chance.choices(words, k=60)
            other = [chance.choice(words) if place < changed else word for place, word in enumerate(base)]
            one, two = token_shingles(" ".join(base), 5), token_shingles(" ".join(other), 5)
            rows.append((" ".join(base), " ".join(other)))
            truth.append(len(one & two) / len(one | two))
    for (one, two), similarity in zip(rows, truth, strict=True):
        kept, _ = apply(NearDuplicates(by="positives", threshold=0.7), [pair("a", one), pair("b", two)])
        if abs(similarity - 0.7) > 0.13:
            assert len(kept) == (1 if similarity > 0.7 else 2), similarity


def test_bands_find_what_they_promise():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands = band_count(threshold, 128)
        assert 128 % bands == 0
        assert 1 - (1 - threshold ** (128 // bands)) ** bands >= 0.9


class Letters:
    """An encoder whose vectors count letters, and which counts what it encodes."""

    def __init__(self):
        self.seen = 0

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        self.seen += len(texts)
        rows = [[float(text.count(letter)) + 1e-3 for letter in "abcde"] for text in texts]
        return {"dense": Dense(torch.tensor(rows))}


def cosine(one, two):
    left, right = ([text.count(letter) + 1e-3 for letter in "abcde"] for text in (one, two))
    return sum(map(math.prod, zip(left, right))) / math.hypot(*left) / math.hypot(*right)


def test_score_filter(tmp_path):
    encoder = Letters()
    tools = Tools(folder=tmp_path, encoder=lambda name: (encoder, name))
    rows = [
        pair("aab", "ab", "ccc"),
        pair("c", "d"),
        pair("e", "e", task="sts", positive_scores=(0.1,)),
        pair("a", "a"),
    ]
    kept, ledger = apply(ScoreFilter("m", threshold=0.4), rows, tools)
    assert [record.query for record in kept] == ["aab", "e", "a"]
    assert kept[0].positives == ("ab",)
    assert kept[0].teacher_positive_scores == (pytest.approx(cosine("aab", "ab"), abs=1e-4),)
    assert kept[1].teacher_positive_scores is None
    assert sum(ledger.notes["histogram"].values()) == 4
    seen = encoder.seen
    assert apply(ScoreFilter("m", threshold=0.9), rows, tools)[1].notes["pairs scored anew"] == 0
    assert encoder.seen == seen
    apply(ScoreFilter("other", threshold=0.9), rows, tools)
    assert encoder.seen > seen


def test_score_exactly_at_the_threshold_stays():
    tools = Tools(encoder=lambda name: (Letters(), name))
    score = apply(ScoreFilter("m", threshold=-1), [pair("aab", "abb")], tools)[0][0].teacher_positive_scores[0]
    exact = round(cosine("aab", "abb"), 6)
    assert score == pytest.approx(exact, abs=1e-4)
    assert len(apply(ScoreFilter("m", threshold=exact), [pair("aab", "abb")], tools)[0]) == 1
    assert len(apply(ScoreFilter("m", threshold=exact + 1e-6), [pair("aab", "abb")], tools)[0]) == 0


def test_a_reranker_scores_in_the_place_of_an_embedding_model(tmp_path):
    class Lengths:
        read = 0

        def score(self, queries, documents):
            self.read += len(queries)
            return torch.tensor([4.0 * len(d) - len(q) for q, d in zip(queries, documents, strict=True)])

    model = Lengths()
    tools = Tools(folder=tmp_path, reranker=lambda name: (model, name))
    rows = [pair("aab", "ab", "c"), pair("c", "dd"), pair("aaaaaaaaa", "b")]
    kept, ledger = apply(ScoreFilter(reranker="m", threshold=5), rows, tools)
    assert [(r.query, r.positives, r.teacher_positive_scores) for r in kept] == [
        ("aab", ("ab",), (5.0,)),
        ("c", ("dd",), (7.0,)),
    ]
    assert sum(ledger.notes["histogram"].values()) == 4
    apply(ScoreFilter(reranker="m", threshold=1), rows, tools)
    assert model.read == 4
    with pytest.raises(RecipeError, match="one of model and reranker"):
        ScoreFilter("m", reranker="m", threshold=0.4)
    with pytest.raises(RecipeError, match="threshold is 5"):
        ScoreFilter("m", threshold=5)
    with pytest.raises(ModelError, match=r"no model(.|\n)*Tools\(reranker"):
        apply(ScoreFilter(reranker="m", threshold=5), rows, Tools(encoder=tools.encoder))


def test_score_quantile_takes_its_share():
    tools = Tools(encoder=lambda name: (Letters(), name))
    rows = [pair("a" * 20, "a" * place + "b" * (20 - place)) for place in range(20)]
    kept, _ = apply(ScoreFilter("m", quantile=0.25), rows, tools)
    assert [record.positives[0].count("a") for record in kept] == list(range(4, 20))


def test_score_filter_refuses():
    with pytest.raises(RecipeError, match="one of threshold and quantile"):
        ScoreFilter("m", threshold=0.4, quantile=0.1)
    with pytest.raises(ModelError, match="no model"):
        apply(ScoreFilter("m", threshold=0.4), [pair("a", "b")])


def evaluation(*texts):
    found = [EvaluationText(text, task, role) for task, role, text in texts]
    return Tools(evaluation=lambda names: (text for text in found if text.task in names))


def test_decontaminate():
    tools = evaluation(("t", "query", "What does the fox JUMP over?"), ("t", "document", EN), ("t", "document", ZH))
    rows = [
        pair("what does the fox jump over", "an answer"),
        pair("a new question", "So it is said: " + EN + ", and much more is said here after that."),
        pair("新的问题", "有人说，" + ZH + "。"),
        pair("a new question", "The quick brown fox likes rivers, and dogs are lazy in general as all of us know."),
        pair("新的问题", "狐狸跳过了小溪，懒惰的狗在睡觉，一切都很安静，没有什么特别的事情。"),
    ]
    step = Decontaminate(tasks=("t",))
    kept, ledger = apply(step, rows, tools)
    assert kept == rows[3:]
    assert left(ledger) == {
        "query: the same as in t, a query": 1,
        "positive: overlaps with a text of t, a document": 2,
    }
    assert len(apply(Decontaminate(tasks=("t",), against=("query",)), rows, tools)[0]) == 4


def test_decontaminate_without_texts_is_an_error():
    with pytest.raises(DataError, match="no texts in t"):
        apply(Decontaminate(tasks=("t",)), [pair("a", "b")], evaluation())


def test_labels_to_pairs():
    rows = [Record(f"text {place} of {place % 3}", label=place % 3, task="classification") for place in range(30)]
    kept, ledger = apply(LabelsToPairs(positives=2, negatives=4), [*rows, Record("alone", label=9)])
    assert left(ledger) == {"alone in its class": 1}
    for record in kept:
        own = f"of {record.label}"
        assert len(set(record.positives)) == 2
        assert all(text.endswith(own) and text != record.query for text in record.positives)
        assert len(set(record.negatives)) == 4
        assert not any(text.endswith(own) for text in record.negatives)
    assert kept == apply(LabelsToPairs(positives=2, negatives=4), [*rows, Record("alone", label=9)])[0]
    named, _ = apply(LabelsToPairs(with_names=True), rows[:3], Tools(labels=("x", "y", "z")))
    assert [record.positives for record in named] == [("x",), ("y",), ("z",)]
    assert all(record.negatives[0] != record.positives[0] for record in named)


def test_a_step_in_a_recipe_names_its_mistakes():
    tree = {"input": {"path": "x"}, "output": "y.jsonl", "steps": [{"type": "length", "query_mim": 3}]}
    with pytest.raises(RecipeError, match=r"steps\.0\.query_mim: unknown key"):
        parse(CurateRecipe, tree)
    with pytest.raises(RecipeError, match="did you mean 'exact_duplicates'"):
        parse(CurateRecipe, {**tree, "steps": ["exact_duplicate"]})
    with pytest.raises(RecipeError, match=r"output is 'y\.csv'"):
        parse(CurateRecipe, {**tree, "output": "y.csv", "steps": []})


def test_steps_stream():
    """A step yields before it has read everything (those that must look twice aside)."""
    for entry in curation_steps.entries():
        if entry.name not in ("length", "symbols", "links", "boilerplate", "language", "trivial", "exact_duplicates"):
            continue
        read = []

        def rows(read=read):
            for place in range(100):
                read.append(place)
                yield pair(f"question number {place} of them all", EN + f" {place}")

        from embedsmith.curate import Ledger

        next(iter(entry.thing()(rows(), Ledger(), Tools())))
        assert len(read) == 1, entry.name
