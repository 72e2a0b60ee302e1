"""Offline mining: the file it writes is what a plain loop over all pairs gives, whatever is stopped or shared."""

import gzip
import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from embedsmith.core.errors import DataError, ModelError, RecipeError, SearchError
from embedsmith.core.recipe import parse
from embedsmith.core.settings import Positive
from embedsmith.core.shelf import searchers
from embedsmith.data import Source, read_source
from embedsmith.mining import MineRecipe, mine
from embedsmith.mining import searchers as searchers_module
from embedsmith.mining.searchers import Searcher
from tests.mining.fakes import TOPICS, Words, rows
from tests.ranks import on_ranks


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return {
        "data": {"path": str(path)},
        "output": str(tmp_path / "mined.jsonl"),
        "searchers": [{"type": "embedding", "model": "words"}],
        "candidates": 12,
        "part": 7,
        "select": {"negatives": 4, "near_duplicate": None},
    }


def run(tree, encoder=None, **changes):
    encoders = encoder if isinstance(encoder, dict) else {"words": encoder or Words(), "other": Words("b", 8)}
    return mine(parse(MineRecipe, tree | changes), encoders.__getitem__)


def mined(tree, encoder=None, **changes):
    run(tree, encoder, **changes)
    return read_source(Source(path=(tree | changes)["output"])).records


def scores_of(tree, head="dense", encoder=None):
    """All scores of queries with all positives, and the texts."""
    records = read_source(Source(path=tree["data"]["path"])).records
    corpus = list(dict.fromkeys(text for record in records for text in record.positives))
    reps = [
        (encoder or Words()).represent(texts, role="query", outputs=(head,))[head]
        for texts in ([record.query for record in records], corpus)
    ]
    return records, corpus, reps[0].scores(reps[1])[0].numpy()


@pytest.mark.parametrize("head", ["dense", "sparse", "multivector"])
def test_top_negatives_of_a_plain_loop(tree, head, monkeypatch):
    monkeypatch.setattr(searchers_module, "PIECE", 8)
    tree["searchers"][0]["head"] = head
    records, corpus, score_QK = scores_of(tree, head)
    for record, found, score_K in zip(records, mined(tree), score_QK, strict=True):
        order = [k for k in np.argsort(-score_K, kind="stable") if corpus[k] not in record.positives][:4]
        assert found.negatives == tuple(corpus[k] for k in order)
        np.testing.assert_allclose(found.teacher_negative_scores, score_K[order], atol=1e-5)
        np.testing.assert_allclose(
            found.teacher_positive_scores, [score_K[corpus.index(text)] for text in record.positives], atol=1e-5
        )


def test_hybrid_scores_are_the_weighted_sum(tree):
    tree["searchers"] = [
        {"type": "embedding", "model": "words", "head": "hybrid", "weights": {"dense": 1.0, "sparse": 0.3}}
    ]
    _, corpus, dense_QK = scores_of(tree)
    _, _, sparse_QK = scores_of(tree, "sparse")
    for record, score_K in zip(mined(tree), dense_QK + 0.3 * sparse_QK, strict=True):
        expected = [score_K[corpus.index(text)] for text in record.negatives]
        np.testing.assert_allclose(record.teacher_negative_scores, expected, atol=1e-5)
        assert expected == sorted(expected, reverse=True)


def test_limits_keep_what_is_below_the_weakest_positive(tree):
    tree["select"] |= {"negatives": 8, "limits": {"relative_margin": 0.05, "max_score": 0.8, "min_score": 0.1}}
    tree["candidates"] = 30
    records = mined(tree)
    assert any(record.negatives for record in records)
    for record in records:
        weakest = min(record.teacher_positive_scores)
        for score in record.teacher_negative_scores or ():
            assert 0.1 <= score <= min(0.8, 0.95 * weakest) + 1e-6


def test_skip_leaves_out_the_first_ranks(tree):
    whole = mined(tree, select={"negatives": 6, "near_duplicate": None})
    later = mined(tree, select={"negatives": 4, "skip": 2, "near_duplicate": None}, output=tree["output"] + "2.jsonl")
    for all_, some in zip(whole, later, strict=True):
        assert all_.negatives[2:6] == some.negatives


def test_union_ranks_by_both_and_scores_by_the_first(tree):
    tree["searchers"] = [{"type": "embedding", "model": "words"}, {"type": "bm25"}]
    _, corpus, score_QK = scores_of(tree)
    for record, score_K in zip(mined(tree), score_QK, strict=True):
        expected = [score_K[corpus.index(text)] for text in record.negatives]
        np.testing.assert_allclose(record.teacher_negative_scores, expected, atol=1e-5)


def test_a_teacher_of_another_dimension_scores_and_filters(tree):
    tree |= {"teacher": {"type": "embedding", "model": "other"}}
    tree["select"] |= {"teacher_limits": {"absolute_margin": 0.05}}
    _, corpus, score_QK = scores_of(tree, encoder=Words("b", 8))
    for record, score_K in zip(mined(tree), score_QK, strict=True):
        expected = [score_K[corpus.index(text)] for text in record.negatives]
        np.testing.assert_allclose(record.teacher_negative_scores or (), expected, atol=1e-5)
        assert max(expected, default=-1) <= min(record.teacher_positive_scores) - 0.05 + 1e-6


class Told(Words):
    """The instruction is part of the text."""

    def represent(self, texts, *, role, task=None, outputs=("dense",), instruction=None):
        own = instruction or [None] * len(texts)
        told = [text if one is None else f"{one} {text}" for one, text in zip(own, texts, strict=True)]
        return super().represent(told, role=role, task=task, outputs=outputs)


def test_queries_are_encoded_under_their_own_instructions(tree, tmp_path, monkeypatch):
    """The same query twice, with and without an instruction; pieces cut between them."""
    monkeypatch.setattr(searchers_module, "PIECE", 4)
    pairs = [row | ({"prompt": f"find {n} stars"} if n % 3 else {}) for n, row in enumerate(rows() * 2)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    found = mined(tree, Told(), teacher={"type": "embedding", "model": "words"})
    plain = mined(
        tree | {"searchers": [tree["searchers"][0] | {"instructions": False}]}, output=str(tmp_path / "plain.jsonl")
    )
    for row, one, without in zip(pairs, found, plain, strict=True):
        assert one.instruction == without.instruction == row.get("prompt")
        for record, query in ((one, " ".join([*filter(None, [one.instruction]), one.query])), (without, one.query)):
            texts = [*record.positives, *record.negatives]
            expected = (Words()._dense([query]).scores(Words()._dense(texts))[0])[0]
            np.testing.assert_allclose(
                [*record.teacher_positive_scores, *record.teacher_negative_scores], expected, atol=1e-5
            )
    assert [r.negatives for r in found] != [r.negatives for r in plain]
    with pytest.raises(ModelError, match="Words cannot put a record's own instruction before its query"):
        run(tree, output=str(tmp_path / "other.jsonl"))


def test_several_positives_and_records_of_one_query_are_known(tree, tmp_path):
    path = tmp_path / "pairs.jsonl"
    more = [{"query": "about cats number 0", "pos": ["text on cats number 5 of many", "another answer"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), *more]), encoding="utf-8")
    records = mined(tree, candidates=40, select={"negatives": 40, "near_duplicate": None})
    known = {"text on cats number 0 of many", "text on cats number 5 of many", "another answer"}
    for record in (records[0], records[-1]):
        assert not known & set(record.negatives)
        assert len(record.negatives) == 31 - 3
    assert records[-1].teacher_positive_scores is not None
    assert len(records[-1].teacher_positive_scores) == 2


def test_candidates_that_are_positives_under_normalisation_never_come(tree, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    texts = ["TEXT on  cats, number 0 of many!", "ＴＥＸＴ on cats number 0 of many", "something else about cats"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    record = mined(tree, corpus=[{"path": str(corpus)}], candidates=40, select={"negatives": 40})[0]
    assert not set(texts[:2]) & set(record.negatives)
    assert texts[2] in record.negatives


def test_near_duplicates_of_positives_and_of_each_other_are_left_out(tree, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    long = "a long and winding description of the very same thing, told once more in all its detail"
    texts = [f"{long} today", f"{long} today x", "short and unlike"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    changes = {"corpus": [{"path": str(corpus)}], "candidates": 40}
    strict = mined(tree, select={"negatives": 40, "near_duplicate": 0.9}, **changes)[0].negatives
    assert len([text for text in strict if text.startswith(long)]) == 1
    loose = mined(tree, select={"negatives": 40, "near_duplicate": None}, **changes)[0].negatives
    assert len(loose) > len(strict)


@pytest.mark.parametrize("strategy", ["random", "proportional", "stepped"])
def test_draws_are_seeded(tree, strategy):
    select = {"negatives": 3, "strategy": strategy, "offset": 3, "round": 1, "near_duplicate": None}
    first = mined(tree, select=select)
    again = mined(tree, select=select, output=tree["output"] + "2.jsonl", part=30)
    other = mined(tree, select=select | {"seed": 1, "round": 2}, output=tree["output"] + "3.jsonl")
    assert [r.negatives for r in first] == [r.negatives for r in again]
    assert [r.negatives for r in first] != [r.negatives for r in other]
    assert all(list(r.teacher_negative_scores) == sorted(r.teacher_negative_scores, reverse=True) for r in first)


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(searchers_module, "PIECE", 8)
    run(tree)
    whole = (tmp_path / "mined.jsonl").read_bytes()
    for path in (tmp_path / "mined.jsonl", tmp_path / "mined.report.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "mined.jsonl.work")
    with pytest.raises(KeyboardInterrupt):
        run(tree, Words(fail_after=40))
    assert not (tmp_path / "mined.jsonl").exists()
    second = Words()
    report = run(tree, second)
    assert (tmp_path / "mined.jsonl").read_bytes() == whole
    assert 0 < len(second.encoded) <= 60 - 40
    third = Words()
    assert run(tree, third) == report
    assert third.encoded == []


def test_parts_that_are_there_are_not_mined_again(tree, monkeypatch):
    from embedsmith.mining import offline as module

    calls = []
    plain = module.mine_rows

    def stopping(*arguments):
        calls.append(arguments[-2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "mine_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    run(tree)
    assert calls == [0, 7, 14, 14, 21, 28]


def test_another_checkpoint_never_sees_the_vectors_of_the_first(tree):
    first = mined(tree, {"words": Words("a")})
    second = mined(tree, {"words": Words("b")})
    fresh = mined(tree, {"words": Words("b")}, work=tree["output"] + ".fresh", output=tree["output"] + "2.jsonl")
    assert [r.negatives for r in second] == [r.negatives for r in fresh] != [r.negatives for r in first]


def test_half_written_vectors_are_made_again(tree, tmp_path, caplog):
    expected = mined(tree)
    files = sorted((tmp_path / "mined.jsonl.work" / "vectors").rglob("*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "mined.report.json").unlink()
    assert [r.negatives for r in mined(tree)] == [r.negatives for r in expected]
    assert "encoded again" in caplog.text


@pytest.fixture
def varied(tree, tmp_path):
    """Records of several positives with far scores; every query's own text, and texts near it, are in the corpus."""
    pairs = [
        row | {"pos": [f"other {TOPICS[n % 5]} answers wholly unlike {n}", *row["pos"], f"{row['query']} exactly"]}
        for n, row in enumerate(rows(10))
    ]
    for name, rows_ in (("pairs", pairs), ("corpus", [{"text": row["query"]} for row in pairs] + [{"text": "about"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_), encoding="utf-8")
    return tree | {"corpus": [{"path": str(tmp_path / "corpus.jsonl")}], "candidates": 40}


@pytest.mark.parametrize("searcher", [{"type": "embedding", "model": "words"}, {"type": "bm25"}])
def test_the_query_itself_is_no_negative(varied, searcher):
    select = {"negatives": 40, "near_duplicate": None}
    for record in mined(varied, searchers=[searcher], select=select):
        assert record.negatives
        assert record.query not in record.negatives
        assert not set(record.positives) & set(record.negatives)


@pytest.mark.parametrize("limit", ["relative_margin", "absolute_margin"])
@pytest.mark.parametrize("by", ["limits", "teacher_limits"])
def test_margins_are_taken_from_the_weakest_positive_of_a_record(varied, limit, by):
    select = {"negatives": 40, "near_duplicate": None, by: {limit: 0.01}}
    teacher = {"type": "embedding", "model": "other"} if by == "teacher_limits" else None
    loose = mined(varied, select=select | {by: {}}, teacher=teacher)
    strict = mined(varied, select=select, teacher=teacher, output=varied["output"] + "2.jsonl")
    between = 0
    for all_, some in zip(loose, strict, strict=True):
        weakest, strongest = min(all_.teacher_positive_scores), max(all_.teacher_positive_scores)
        highest = weakest - 0.01 * (abs(weakest) if limit == "relative_margin" else 1)
        scored = zip(all_.negatives, all_.teacher_negative_scores, strict=True)
        expected = {text: score for text, score in scored if score <= highest + 1e-6}
        assert set(some.negatives) == set(expected)
        between += sum(highest < score <= strongest for score in all_.teacher_negative_scores)
    assert between > 10, "scores between the weakest and the strongest positive tell the two apart"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("part-000000007.jsonl", None),
        ("part-000000007.jsonl", lambda content: b""),
        ("part-000000007.jsonl", lambda content: content[:-5]),
        ("part-000000007.jsonl", lambda content: content + b"{}\n"),
        *(("part-000000007.json", lambda content, new=new: new) for new in (b"", b"[]", b"3", b"{}", b'["1", {}]')),
        ("part-000000007.json", lambda content: content.replace(b'"records": 7', b'"records": "7"')),
    ],
)
def test_parts_that_are_not_whole_are_mined_again(tree, tmp_path, monkeypatch, name, change):
    from embedsmith.mining import offline as module

    whole = run(tree | {"output": str(tmp_path / "whole.jsonl")})
    monkeypatch.setattr(module._Work, "finish", lambda *arguments: None)
    run(tree)
    monkeypatch.undo()
    (path,) = (tmp_path / "mined.jsonl.work").rglob(name)
    content = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(content))
    assert run(tree).negatives == whole.negatives
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("content", ["", "lying"])
def test_a_report_that_is_none_is_not_believed(tree, tmp_path, content):
    expected = run(tree)
    path = tmp_path / "mined.report.json"
    lying = json.dumps(json.loads(path.read_text()) | {"records": "many"})
    path.write_text(lying if content == "lying" else content)
    assert run(tree, work=str(tmp_path / "mined.jsonl.work")).records == expected.records


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_corpus_is_named(tree, tmp_path, content):
    (tmp_path / "corpus.txt").write_text(content)
    with pytest.raises(DataError, match=r"corpus\.txt: no text in this corpus"):
        run(tree, corpus=[{"path": str(tmp_path / "corpus.txt")}])


def test_two_models_have_an_approximate_index_each_and_a_damaged_one_is_built_again(tree, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from embedsmith.mining import offline as module

    both = [{"type": "embedding", "model": name, "index": "Flat"} for name in ("words", "other")]
    exact = [searcher | {"index": "exact"} for searcher in both]
    expected = [record.negatives for record in mined(tree, searchers=exact, output=str(tmp_path / "exact.jsonl"))]
    monkeypatch.setattr(module._Work, "finish", lambda *arguments: None)
    run(tree, searchers=both)
    monkeypatch.undo()
    indexes = list((tmp_path / "mined.jsonl.work").rglob("block-*.faiss"))
    assert len(indexes) == 2
    indexes[0].write_bytes(b"")
    indexes[1].write_bytes(indexes[1].read_bytes()[:-7])
    for path in (tmp_path / "mined.jsonl.work").rglob("part-*"):
        path.unlink()
    assert [record.negatives for record in mined(tree, searchers=both)] == expected
    told = json.loads((tmp_path / "mined.report.json").read_text())["recall"]
    assert told == {"Flat of other": 1.0, "Flat of words": 1.0}


def test_bm25_gives_only_documents_that_share_a_word_and_counts_what_is_short(tree, tmp_path):
    pairs = [{"query": "zzz yyy", "pos": ["xxx"]}, {"query": "quick", "pos": ["quick god"]}]
    texts = [*(f"text {n}" for n in range(5)), "quick fox"]
    for name, rows_ in (("pairs", pairs), ("corpus", [{"text": text} for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_), encoding="utf-8")
    tree |= {"corpus": [{"path": str(tmp_path / "corpus.jsonl")}], "searchers": [{"type": "bm25"}]}
    report = run(tree, select={"negatives": 3})
    assert (report.short, report.empty, report.negatives) == (2, 1, 1)
    records = read_source(Source(path=tree["output"])).records
    assert [record.negatives for record in records] == [(), ("quick fox",)]
    both = [{"type": "embedding", "model": "words"}, {"type": "bm25"}]
    (tmp_path / "corpus.jsonl").write_text('{"text": "other"}\n{"text": "quick fox"}\n')
    found = mined(
        tree, searchers=both, select={"negatives": 9, "near_duplicate": None}, output=tree["output"] + "2.jsonl"
    )
    assert sorted(found[0].negatives) == ["other", "quick fox", "quick god"]  # from the embedding


def test_gzipped_output(tree, tmp_path):
    tree["output"] = str(tmp_path / "mined.jsonl.gz")
    run(tree)
    assert len(gzip.decompress((tmp_path / "mined.jsonl.gz").read_bytes()).splitlines()) == 30


def test_a_query_whose_positives_are_all_the_corpus_gets_none(tree, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": ["a b", "c d"]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no record got a negative"):
        run(tree)
    more = [{"query": "q", "pos": ["a b", "c d", "e f"]}, {"query": "other", "pos": ["a b"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in more), encoding="utf-8")
    report = run(tree)
    assert (report.empty, report.short, report.records) == (1, 2, 2)
    dropped = run(tree, short="drop", output=tree["output"] + "2.jsonl", select={"negatives": 2})
    assert (dropped.dropped, dropped.records) == (1, 1)


def test_what_cannot_be_mined_is_refused(tree, tmp_path):
    with pytest.raises(DataError, match="the corpus has 30 texts, and the first 40 ranks"):
        run(tree, candidates=60, select={"skip": 40, "negatives": 4})
    with pytest.raises(RecipeError, match="do not reach rank"):
        run(tree, candidates=5, select={"negatives": 6})
    with pytest.raises(RecipeError, match="which is read from"):
        run(tree, output=tree["data"]["path"])
    with pytest.raises(RecipeError, match="needs a teacher"):
        run(tree, select={"negatives": 2, "teacher_limits": {"max_score": 1.0}})
    scored = tmp_path / "scored.jsonl"
    scored.write_text(json.dumps({"text1": "a", "text2": "b", "score": 1.0}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="records of task sts"):
        run(tree, data={"path": str(scored), "task": "sts"})


def test_vectors_of_two_dimensions_are_an_error(tree):
    class Odd(Words):
        def represent(self, texts, *, role, task=None, outputs=("dense",)):
            self.width = 16 if role == "query" else 8
            return super().represent(texts, role=role, task=task, outputs=outputs)

        def fingerprint(self):
            return "odd"

    with pytest.raises(SearchError, match="vectors of 16 and 8 numbers"):
        run(tree, Odd())


def test_an_encoder_that_cannot_say_who_it_is_is_refused(tree):
    class Nameless:
        represent = Words.represent

    with pytest.raises(ModelError, match="cannot say which model"):
        run(tree, {"words": Nameless()})


def work(tree, other):
    from embedsmith.core.collectives import rank

    encoder = Words("b" if other and rank() == 1 else "a")
    try:
        mine(parse(MineRecipe, tree), {"words": encoder}.__getitem__)
    except DataError as error:
        return str(error)
    return sorted(encoder.encoded)


@pytest.mark.dist
def test_two_ranks_give_the_file_of_one_and_share_the_encoding(tree, tmp_path, monkeypatch):
    run(tree)
    alone = (tmp_path / "mined.jsonl").read_bytes()
    shared = tree | {"output": str(tmp_path / "two.jsonl")}
    encoded = on_ranks(2, work, tmp_path, shared, False)
    assert (tmp_path / "two.jsonl").read_bytes() == alone
    assert sum(map(len, encoded)) == 60
    messages = on_ranks(2, work, tmp_path, tree | {"output": str(tmp_path / "three.jsonl")}, True)
    assert "rank 1 has another models than rank 0" in messages[0]


def test_a_searcher_of_ones_own_stands_in_a_recipe(tree, monkeypatch):
    searchers.names()
    monkeypatch.setattr(searchers, "_entries", dict(searchers._entries))

    @searchers.register("overlap")
    @dataclass(frozen=True)
    class Overlap:
        """Candidates by the words they share with the query. `power`: of that number."""

        power: Positive = 1.0

        def open(self, texts):
            return SharedWords(self.power, texts)

    class SharedWords(Searcher):
        def __init__(self, power, texts):
            self.power, self.texts = power, texts

        def top(self, start, stop, k):
            score_QK = np.stack([self._row(query) for query in self.texts.queries[start:stop]])
            index_Qk = np.argsort(-score_QK, kind="stable")[:, :k]
            return np.take_along_axis(score_QK, index_Qk, 1), index_Qk

        def pairs(self, row_E, index_E):
            return np.array([self._row(self.texts.queries[r])[i] for r, i in zip(row_E, index_E)], np.float32)

        def _row(self, query):
            words = set(query.split())
            return np.array([len(words & set(t.split())) ** self.power for t in self.texts.corpus], np.float32)

    found = mined(tree | {"searchers": [{"type": "overlap", "power": 2}]})
    assert all(len(record.negatives) == 4 for record in found)
    assert found[0].teacher_positive_scores[0] > 1
    with pytest.raises(RecipeError, match=r"unknown searcher 'overlay' \(did you mean 'overlap'"):
        parse(MineRecipe, tree | {"searchers": ["overlay"]})
    with pytest.raises(RecipeError, match="power"):
        parse(MineRecipe, tree | {"searchers": [{"type": "overlap", "power": -1}]})
