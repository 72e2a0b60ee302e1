"""`--pooling`, `--prompt` and `--max-length` wherever the command line names a model; what a model would cut."""

import json

import numpy as np
import pytest

from embedsmith.models import Embedder, load

OPTIONS = ["--pooling", "mean", "--prompt", "query=cat cat ", "--prompt=document=dog = ", "--max-length", "9"]


@pytest.fixture(scope="module")
def texts(files):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()[:6]]
    (files / "texts.jsonl").write_text(
        "".join(json.dumps({"_id": n, "text": r["query"]}) + "\n" for n, r in enumerate(rows))
    )
    return files / "texts.jsonl"


@pytest.fixture(scope="module")
def asked(bert):
    return load(str(bert), pooling="mean", prompts={"query": "cat cat ", "document": "dog = "}, max_length=9)


def test_encode_reads_the_model_as_asked(typed, bert, texts, asked, tmp_path):
    _, err, code = typed("encode", texts, tmp_path / "vectors", "--model", bert, *OPTIONS)
    assert (code, err) == (0, "")
    words = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    np.testing.assert_allclose(np.load(tmp_path / "vectors" / "vectors.npy"), asked.encode(words), atol=1e-6)


def test_an_index_and_its_search_are_of_the_same_model(typed, bert, texts, tmp_path):
    place = tmp_path / "index"
    assert typed("index", bert, texts, "--to", place, *OPTIONS)[2] == 0
    out, err, code = typed("search", "the cat", "--index", place, "--json", *OPTIONS)
    assert (code, len(json.loads(out)["hits"])) == (0, 6), err
    assert "other prompts" in typed("search", "the cat", "--index", place, "--pooling", "mean")[1]


@pytest.mark.parametrize("verb", ["evaluate", "compare", "geometry", "export", "convert"])
def test_every_other_verb_reads_it_so_too(verb, typed, bert, files, asked, tmp_path, monkeypatch):
    seen = []
    plain_init = Embedder.__init__

    def watched(self, *parts, **more):
        plain_init(self, *parts, **more)
        seen.append(self.settings)

    monkeypatch.setattr(Embedder, "__init__", watched)
    made = tmp_path / "made"
    arguments = {
        "evaluate": [bert, "--tasks", files / "scored.jsonl"],
        "compare": [bert, f"{bert}/", "--tasks", files / "scored.jsonl"],
        "geometry": [bert, "--task", files / "scored.jsonl"],
        "export": [bert, made],
        "convert": [bert, made],
    }[verb]
    _, err, code = typed(verb, *arguments, *OPTIONS)
    assert code == 0, err
    assert len(seen) == (2 if verb == "compare" else 1)
    assert all(settings == asked.settings for settings in seen)


def test_a_prompt_without_a_role_is_refused(typed, bert, files):
    out, err, code = typed("evaluate", bert, "--tasks", files / "scored.jsonl", "--pooling=mean", "--prompt", "query:")
    assert (out, code) == ("", 1)
    assert "--prompt 'query:'" in err
    assert "ROLE=TEXT" in err


@pytest.mark.parametrize(
    ("length", "words"), [(32, "no text is longer than the 32 tokens"), (6, "of all tokens are not read")]
)
def test_inspect_tells_what_a_model_would_cut(length, words, typed, bert, files):
    command = ["inspect", files / "pairs.jsonl", "--samples", 0, "--model", bert, "--max-length", length]
    out, err, code = typed(*command)
    assert (code, words in out) == (0, True), err
    cut = json.loads(typed(*command, "--json")[0])["cut"]
    assert (cut["rows"], cut["of_rows"], cut["texts"]) == (40, 40, 160)
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    tokenizer = load(str(bert), pooling="mean").tokenizer
    lengths = [len(tokenizer(text).input_ids) for row in rows for text in (row["query"], *row["pos"], *row["neg"])]
    over = [max(each - length, 0) for each in lengths]
    assert (cut["tokens"], cut["longest"]) == (sum(lengths), max(lengths))
    assert (cut["cut"], cut["lost"]) == (sum(each > 0 for each in over), sum(over))


@pytest.mark.parametrize(
    "verb", ["train", "mine", "distil", "run", "sweep", "encode", "index", "search", "evaluate", "compare", "geometry"]
)
def test_a_device_is_named_wherever_a_model_computes(verb, typed):
    needed = {"encode": ["a", "b", "--model", "c"], "geometry": ["a", "--task", "b"]}
    needed |= {"distil": ["a", "b"], "index": ["a", "b"]}
    _, err, code = typed(verb, *needed.get(verb, ["a"]), "--device", "tpu")
    assert code == 1
    assert "no device is called 'tpu'" in err
