"""Token caches: training on one equals training on the texts; what does not fit is refused; stopped work continues."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.api.tokenizing import TokenizeJob, adopt, tokenize
from embedsmith.calibrate.probe import Probe
from embedsmith.core.errors import CheckpointError, DataError, ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.curate import CurateRecipe, curate
from embedsmith.data import Source, read_source, row_facts, text_id
from embedsmith.data import token_cache as tokencache
from embedsmith.data.inspect import inspect_source
from embedsmith.data.token_cache import Manifest
from embedsmith.data.token_records import tokens_of
from embedsmith.mining.config import MineRecipe
from embedsmith.mining.offline import mine
from embedsmith.models import load
from tests.core.test_files import tiny_disk
from tests.models import tiny
from tests.tinybert import tiny_bert
from tests.train.test_loop import assert_equal_weights, run, weights

PROMPTS = {"query": "ask: ", "document": "text: "}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def job(tree, out, **changes):
    sources = [{key: value for key, value in one.items() if key != "batch_size"} for one in tree["data"]]
    return parse(TokenizeJob, {"model": tree["model"], "data": sources, "out": str(out)} | changes)


def cached(tree, out, **model):
    """The recipe of `tree`, its two sources read from a token cache."""
    data = [
        {"path": str(out), "split": "pairs", "batch_size": 8, "negatives": 1},
        {"path": str(out), "split": "scored", "batch_size": 8},
    ]
    return tree | {"data": data, "model": tree["model"] | model}


@pytest.mark.parametrize("layout", ["corpus", "inline"])
def test_training_on_tokens_equals_training_on_texts(tree, tmp_path, layout):
    tree["model"] |= {"prompts": PROMPTS}
    tokenize(job(tree, tmp_path / "tokens", layout=layout))
    run(tree)
    run(cached(tree, tmp_path / "tokens"), output=str(tmp_path / "from-tokens"))
    assert_equal_weights(weights(tree["output"]), weights(tmp_path / "from-tokens"))


def test_what_is_written_and_what_is_known_of_it(tree, tmp_path):
    tree["model"] |= {"prompts": PROMPTS}
    out = tmp_path / "tokens"
    manifest = tokenize(job(tree, out, keep_text=True))
    texts = read_source(Source(**tree["data"][0]))
    query, corpus = (pq.read_table(out / f"pairs_{kind}.parquet").to_pylist() for kind in ("query", "corpus"))
    model = load(tree["model"]["path"], pooling="mean", prompts=PROMPTS)
    tokens = model.tokenize([record.query for record in texts.records], "query", "retrieval")
    assert [row["query_input_ids"] for row in query] == [
        tokens.id_S[start:end].tolist() for start, end in zip(tokens.offset_P, tokens.offset_P[1:])
    ]
    assert [row["query_body_start"] for row in query] == tokens.body_N.tolist()
    assert min(tokens.body_N) > 0
    documents = {text for record in texts.records for text in (*record.positives, *record.negatives)}
    assert {row["text"] for row in corpus} == documents  # each once
    assert len(corpus) == len({text_id(text) for text in documents}) == manifest.datasets["pairs"].documents
    assert all(row["length"] == len(row["input_ids"]) for row in corpus)
    assert [int(row["passage_input_ids"]) for row in query] == [text_id(r.positives[0]) for r in texts.records]
    assert manifest.tokenizer.end_id == model.tokenizer.sep_token_id
    read = read_source(Source(path=str(out), split="pairs"))
    ours, theirs = row_facts(read.records), row_facts(texts.records)
    assert ours.query_id_N.tolist() == theirs.query_id_N.tolist()
    assert ours.positive_id_P.tolist() == theirs.positive_id_P.tolist()
    own = [model.tokenize([r.query], "query", "retrieval").length_N for r in texts.records]
    others = [model.tokenize([*r.positives, *r.negatives]).length_N for r in texts.records]
    assert ours.length_N.tolist() == [max(a.max(), b.max()) for a, b in zip(own, others)]


def test_both_layouts_hold_the_same_records(tree, tmp_path):
    for layout in ("corpus", "inline"):
        tokenize(job(tree, tmp_path / layout, layout=layout))
    one, other = (read_source(Source(path=str(tmp_path / name), split="pairs")) for name in ("corpus", "inline"))
    texts = read_source(Source(**tree["data"][0]))
    assert list(one.records) == list(other.records)
    assert one.fingerprint == other.fingerprint
    for record, text in zip(one.records, texts.records, strict=True):
        ids = (text_id(record.query), *map(text_id, record.positives), *map(text_id, record.negatives))
        assert ids == (text_id(text.query), *map(text_id, text.positives), *map(text_id, text.negatives))


def test_instructions_of_their_own_and_body_offsets_come_back(tree, tmp_path):
    rows = [{"query": f"cat {n}", "pos": [f"mat {n}"], "prompt": "the big " * (n % 3) or None} for n in range(9)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["model"] |= {"prompts": PROMPTS}
    tokenize(job({"model": tree["model"], "data": [{"path": str(path)}]}, tmp_path / "tokens"))
    model = load(tree["model"]["path"], pooling="mean", prompts=PROMPTS)
    records = read_source(Source(path=str(tmp_path / "tokens"))).records
    order = [4, 0, 8, 1]
    queries = [rows[n]["query"] for n in order]
    wanted = model.tokenize(queries, "query", "retrieval", [rows[n]["prompt"] for n in order])
    found = tokens_of(lambda *_: pytest.fail("all are known"), [records[n].query for n in order], "query", "retrieval")
    assert len(set(wanted.body_N.tolist())) > 1
    same_tokens(found, wanted)
    wanted = model.tokenize(["mat 2", "a text", "mat 7"])
    mixed = [records[2].positives[0], "a text", records[7].positives[0]]  # of a cache and of a file, put together
    same_tokens(tokens_of(model.tokenize, mixed, "document"), wanted)


def same_tokens(found, wanted):
    for name in ("id_S", "offset_P", "body_N", "is_query_N"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name


def test_another_tokenizer_is_refused_with_both_hashes(tree, tmp_path):
    other = tiny_bert(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"kat"'))
    made = tokenize(job(tree, tmp_path / "tokens")).tokenizer.sha256
    with pytest.raises(DataError) as caught:
        run(cached(tree, tmp_path / "tokens", path=str(other)))
    assert made in str(caught.value)
    assert str(caught.value).count("sha256") == 2
    with pytest.raises(DataError, match="sha256"):
        tokenize(job(cached(tree, tmp_path, path=str(other)), tmp_path / "tokens"))


@pytest.mark.parametrize(
    ("model", "message"),
    [({"prompts": {"query": "find: "}}, "other prompts"), ({"max_length": 8}, "up to 32 tokens, the model takes 8")],
)
def test_other_prompts_or_a_shorter_model_are_refused(tree, tmp_path, model, message):
    tokenize(job(tree, tmp_path / "tokens"))
    with pytest.raises(DataError, match=message):
        run(cached(tree, tmp_path / "tokens", **model))


def test_documents_in_another_role_and_options_that_need_texts_are_refused(tree, tmp_path):
    tokenize(job(tree, tmp_path / "tokens"))
    recipe = cached(tree, tmp_path / "tokens")
    as_retrieval = recipe["data"][1] | {"loss": "infonce"}
    with pytest.raises(DataError, match="tokenized as query, the loss reads them as document"):
        run(recipe | {"data": [as_retrieval]})
    with pytest.raises(RecipeError, match="shuffle needs texts"):
        run(recipe | {"data": [recipe["data"][0] | {"shuffle": 0.5}]})
    with pytest.raises(DataError, match=r"expected: .*pairs, scored"):
        run(recipe | {"data": [{"path": str(tmp_path / "tokens")}]})


@pytest.mark.parametrize("layout", ["corpus", "inline"])
def test_stopped_work_continues_and_gives_the_same_files(tree, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(tokencache, "PART_ROWS", 7)
    rows = [{"query": f"cat {n}", "pos": [f"mat {n % 11}"], "neg": [f"mat {n % 5}"]} for n in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"] = [{"path": str(path)}]
    whole = tmp_path / "whole"
    tokenize(job(tree, whole, layout=layout))
    write, calls = tokencache.TokenJob._write_part, []

    def failing(job_, shard, tables):
        calls.append(shard)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(job_, shard, tables)

    monkeypatch.setattr(tokencache.TokenJob, "_write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenize(job(tree, tmp_path / "tokens", layout=layout))
    assert not (tmp_path / "tokens" / "pairs_query.parquet").exists()
    tokenize(job(tree, tmp_path / "tokens", layout=layout))
    assert calls[:5] == [0, 1, 2, 3, 3]  # three shards were not done again
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "tokens").iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "tokens" / name).read_bytes(), name
    if layout == "corpus":
        assert pq.read_metadata(whole / "pairs_corpus.parquet").num_rows == 11  # each once over all shards
    calls.clear()
    tokenize(job(tree, tmp_path / "tokens", layout=layout))
    assert calls == []


def test_a_kill_while_shards_are_cleared_loses_nothing(tree, tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    whole = tokenize(job(tree, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("embedsmith.core.outputs._remove", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize(job(tree, tmp_path / "tokens"))
    assert tokenize(job(tree, tmp_path / "tokens")).datasets == whole.datasets
    left, right = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("tokens", "whole")
    )
    assert left == right


def test_a_kill_before_the_manifest_names_the_dataset_is_continued(tree, tmp_path, monkeypatch):
    save = Manifest.save

    def killed(self, out):
        if self.datasets:
            raise KeyboardInterrupt
        save(self, out)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize(job(tree, tmp_path / "tokens"))
    assert set(tokenize(job(tree, tmp_path / "tokens")).datasets) == {"pairs", "scored"}


def test_files_of_others_are_not_replaced(tree, tmp_path):
    theirs = tmp_path / "tokens" / "scored_query.parquet"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(CheckpointError, match="holds no token cache"):
        tokenize(job(tree, tmp_path / "tokens"))
    tokenize(job(tree | {"data": tree["data"][:1]}, tmp_path / "cache"))
    theirs.rename(tmp_path / "cache" / theirs.name)
    with pytest.raises(CheckpointError, match=r"scored_query.parquet: the file is there already"):
        tokenize(job(tree, tmp_path / "cache"))
    assert (tmp_path / "cache" / theirs.name).read_text() == "mine"


def test_a_full_disk_keeps_finished_shards(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(tokencache, "PART_ROWS", 7)
    with tiny_disk(tmp_path) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(2 * 2**20 - 40_000))
        with pytest.raises(CheckpointError, match="no space left"):
            tokenize(job(tree, disk / "tokens"))
        assert list((disk / "tokens" / ".parts" / "pairs").glob("query-*.arrow"))
        filler.unlink()
        tokenize(job(tree, disk / "tokens"))
    assert tmp_path.exists()


def f2llm(folder, tokens, layout):
    """Files as the released scripts of F2LLM write them: no manifest, nothing of our own, doc ids that are names."""
    folder.mkdir()
    texts = ["the cat", "a dog ran", "big tree", "old mat"]
    ids = {text: tokens([text]).id_S.tolist() for text in texts}
    rows = [("red cat", "the cat", "big tree"), ("blue dog", "a dog ran", "old mat"), ("new mat", "old mat", None)]
    columns = {"query_input_ids": [tokens([query]).id_S.tolist() for query, _, _ in rows]}
    place = ids if layout == "inline" else {text: f"doc{number}" for number, text in enumerate(texts)}
    columns["passage_input_ids"] = [place[positive] for _, positive, _ in rows]
    columns["negative_1_input_ids"] = [place.get(negative) for _, _, negative in rows]
    if layout == "inline":
        pq.write_table(pa.table(columns), folder / "set.parquet")
    else:
        pq.write_table(pa.table(columns), folder / "set_query.parquet")
        name = {"joined": "corpus.parquet"}.get(layout, "set_corpus.parquet")
        pq.write_table(pa.table({"doc_id": list(place.values()), "input_ids": list(ids.values())}), folder / name)
    return rows, ids


@pytest.mark.parametrize("layout", ["inline", "corpus", "joined"])
def test_caches_of_f2llm_are_read_once_somebody_vouches_for_their_tokenizer(tree, tmp_path, layout):
    model = load(tree["model"]["path"], pooling="mean")
    folder = tmp_path / "theirs"
    rows, ids = f2llm(folder, model.tokenize, layout)
    with pytest.raises(DataError, match=r"manifest(.|\n)*--adopt"):
        read_source(Source(path=str(folder)))
    adopt(folder, model, "bert", "retrieval")
    records = read_source(Source(path=str(folder))).records
    for record, (_, positive, negative) in zip(records, rows, strict=True):
        texts = [*record.positives, *record.negatives]
        found = [text.ids.tolist() for text in texts]
        assert found == [ids[text] for text in (positive, negative) if text is not None]
    assert text_id(records[1].negatives[0]) == text_id(records[2].positives[0]) != text_id(records[0].positives[0])
    recipe = tree | {"data": [{"path": str(folder), "batch_size": 2}]}
    run(recipe, train=tree["train"] | {"steps": 2})


def test_a_document_that_is_missing_or_named_twice_is_named(tree, tmp_path):
    model = load(tree["model"]["path"], pooling="mean")
    folder = tmp_path / "theirs"
    f2llm(folder, model.tokenize, "corpus")
    adopt(folder, model, "bert", "retrieval")
    path = folder / "set_corpus.parquet"
    corpus = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([*corpus, {"doc_id": "doc1", "input_ids": [2, 9, 3]}]), path)
    with pytest.raises(DataError, match=r"set_corpus.parquet:5: the doc_id of row 2 stands for another document"):
        read_source(Source(path=str(folder)))
    pq.write_table(pa.Table.from_pylist([*corpus, corpus[1]]), path)  # the same document twice does no harm
    assert len(read_source(Source(path=str(folder))).records) == 3
    pq.write_table(pa.Table.from_pylist(corpus[:2]), path)
    with pytest.raises(DataError, match="names the document doc2, which is not in the corpus"):
        read_source(Source(path=str(folder)))


def test_ids_that_the_tokenizer_does_not_have_are_not_vouched_for(tree, tmp_path):
    model = load(tree["model"]["path"], pooling="mean")
    (tmp_path / "theirs").mkdir()
    table = pa.table({"query_input_ids": [[2, 9999, 3]], "passage_input_ids": [[2, 3]]})
    pq.write_table(table, tmp_path / "theirs" / "set.parquet")
    with pytest.raises(DataError, match="an id is 9999"):
        adopt(tmp_path / "theirs", model, "bert", "retrieval")


def test_a_damaged_manifest_is_named(tree, tmp_path):
    tokenize(job(tree, tmp_path / "tokens"))
    path = tmp_path / "tokens" / "manifest.json"
    path.write_text(json.dumps({"tokenizer": 3}))
    with pytest.raises(DataError, match=r"manifest.json: not a readable manifest"):
        Manifest.load(tmp_path / "tokens")


def test_no_weights_are_needed_and_none_are_read(tree, tmp_path):
    """A cache for a model of many gigabytes is made on any machine."""
    tree["model"] |= {"prompts": PROMPTS, "max_length": 16}
    made = tokenize(job(tree, tmp_path / "tokens"))
    bare = tiny_bert(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    again = tokenize(job(tree, tmp_path / "others", model=tree["model"] | {"path": str(bare)}))
    assert (again.datasets, again.tokenizer.sha256) == (made.datasets, made.tokenizer.sha256)


def decoder(folder):
    tiny.backbone("llama").save_pretrained(folder)
    tokenizer = tiny.tokenizer(special=False)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_is_tokenized_as_it_is_pooled(tree, tmp_path, pooling):
    llama = decoder(tmp_path / "llama")
    tree |= {"model": {"path": str(llama), "pooling": pooling, "max_length": 16}}
    ends = tokenize(job(tree, tmp_path / "tokens")).tokenizer.end_id
    assert (ends is not None) == (pooling == "last")
    run(cached(tree, tmp_path / "tokens"), output=str(tmp_path / "run"), train={"steps": 2, "log_with": []})
    with pytest.raises(ModelError, match="last-token pooling puts an end token"):
        tokenize(job(tree | {"model": {"path": str(llama)}}, tmp_path / "other"))


def test_what_needs_texts_refuses_tokens(tree, tmp_path):
    tokenize(job(tree, tmp_path / "tokens"))
    source = {"path": str(tmp_path / "tokens"), "split": "pairs", "negatives": 1}
    with pytest.raises(DataError, match="tokens: tokenizing needs texts"):
        tokenize(job(tree | {"data": [source]}, tmp_path / "again"))
    with pytest.raises(DataError, match="tokens: mining needs texts"):
        mine(parse(MineRecipe, {"data": source, "searchers": [{"type": "bm25"}], "output": "m.jsonl"}), load)
    with pytest.raises(DataError, match="tokens: curating needs texts"):
        curate(
            parse(CurateRecipe, {"input": {"path": source["path"]}, "output": "c.jsonl", "steps": [{"type": "links"}]})
        )
    with pytest.raises(DataError, match="tokens: a merge that reads data needs texts"):
        Probe(sources=(Source(path=source["path"], split="pairs"),)).read()
    train = tree["train"] | {"mining": {"remine_every": 4}}
    with pytest.raises(DataError, match="pairs: mining anew while training needs texts"):
        run(tree | {"data": [source], "train": train})


def test_inspecting_a_cache_counts_tokens(tree, tmp_path):
    tokenize(job(tree, tmp_path / "tokens"))
    found = inspect_source(Source(path=str(tmp_path / "tokens"), split="pairs"))
    texts = read_source(Source(**tree["data"][0])).records
    lengths = load(tree["model"]["path"], pooling="mean").tokenize([record.query for record in texts], "query").length_N
    assert found.lengths["query"].percentiles == tuple(np.percentile(lengths, (0, 50, 90, 99, 100)).astype(int))
