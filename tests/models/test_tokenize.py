"""Prompts, truncation, and where the body starts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerLegacy, PreTrainedTokenizerFast

from embedsmith.core.errors import ModelError
from embedsmith.models.config import Settings, derive_max_length
from embedsmith.models.tokenize import TextTokenizer
from tests.models import tiny
from tests.models.test_decoders import byte_tokenizer

PROMPTS = {"query": "query: ", "passage": "passage: ", "sts": "sts: ", "retrieval-query": "find: ", "empty-query": ""}


@pytest.mark.parametrize(
    ("role", "task", "expected"),
    [
        ("query", None, "query: "),
        ("document", None, "passage: "),
        ("query", "retrieval", "find: "),
        ("document", "retrieval", "passage: "),
        ("query", "sts", "sts: "),
        ("document", "sts", "sts: "),
        ("query", "empty", ""),
        ("query", "unheard-of", "query: "),
    ],
)
def test_the_most_exact_prompt_wins(role, task, expected):
    assert Settings("mean", 32, PROMPTS).prompt_for(role, task) == expected


def test_the_default_prompt_is_for_roles_without_one_and_an_unknown_role_is_an_error():
    settings = Settings("mean", 32, {"query": "", "base": "base: "}, default_prompt="base")
    assert settings.prompt_for("query") == ""
    assert settings.prompt_for("document") == "base: "
    with pytest.raises(ModelError, match="unknown role 'passage'"):
        settings.prompt_for("passage")


def rows(batch):
    return [batch.id_S[start:stop].tolist() for start, stop in zip(batch.offset_P, batch.offset_P[1:], strict=False)]


def test_ids_equal_the_tokenizer_s_own_with_prompt_and_truncation():
    tokenizer = tiny.tokenizer()
    settings = Settings("mean", 8, {"query": "query: "})
    ours = TextTokenizer(tokenizer)(tiny.TEXTS, settings, "query")
    theirs = tokenizer(["query: " + text for text in tiny.TEXTS], truncation=True, max_length=8)["input_ids"]
    assert rows(ours) == theirs
    assert all(row[0] == 2 and row[-1] == 3 for row in rows(ours)), "truncation must keep [CLS] and [SEP]"
    assert max(ours.length_N) == 8
    assert ours.is_query_N.all()


def test_body_starts_behind_the_prompt():
    text = TextTokenizer(tiny.tokenizer())
    batch = text(["late interaction", ""], Settings("mean", 32, {"query": "query: "}), "query")
    ids = text.tokenizer.convert_ids_to_tokens(rows(batch)[0])
    assert "".join(ids[1 : batch.body_N[0]]).replace("##", "") == "query:"
    assert ids[batch.body_N[0]].startswith("l")
    assert text.tokenizer.convert_ids_to_tokens(rows(batch)[1])[batch.body_N[1] :] == ["[SEP]"]
    assert text([" fox"], Settings("mean", 32, {"query": "the dog"}), "query").body_N.tolist() == [3], "no space before"
    assert text(["late"], Settings("mean", 32), "query").body_N.tolist() == [0], "without a prompt all is body"


def test_a_token_merged_across_the_seam_belongs_to_the_body():
    """Counting the prompt's own tokens would give 2 here, and drop the first body word's start."""
    native = Tokenizer(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.train_from_iterator(["find: body"] * 50, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    text = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=native, pad_token="!"))
    batch = text(["body"], Settings("last", 32, {"query": "find: "}), "query")
    tokens = text.tokenizer.convert_ids_to_tokens(rows(batch)[0])
    assert tokens[batch.body_N[0]] == "Ġbody"


@pytest.mark.parametrize("prompt", ["查询：", "find 🔎 ", "é: "])
@pytest.mark.parametrize("text", ["你好，世界", "👩‍🔬 studies", "ü"])
def test_body_of_characters_that_are_several_tokens(prompt, text):
    """Bytes as tokens: one character's offsets belong to up to four of them."""
    tokenizer = byte_tokenizer()
    batch = TextTokenizer(tokenizer)([text], Settings("last", 64, {"query": prompt}), "query")
    body = rows(batch)[0][batch.body_N[0] :]
    assert tokenizer.decode(body, skip_special_tokens=True) == text


def test_truncation_inside_the_prompt_leaves_the_end_token_as_body():
    text = TextTokenizer(tiny.tokenizer())
    batch = text(["fox"], Settings("mean", 6, {"query": "the quick brown fox jumps over the lazy dog "}), "query")
    assert batch.body_N.tolist() == [5]


def test_an_instruction_replaces_the_prompt_for_one_or_for_all():
    text, settings = TextTokenizer(tiny.tokenizer()), Settings("mean", 32, {"query": "query: "})
    bare = Settings("mean", 32)
    each = text(["fox", "dog", "dog"], settings, "query", instruction=["the ", None, ""])
    expected = text(["the fox", "query: dog", "dog"], bare, "query")
    assert rows(each) == rows(expected)
    assert rows(text(["fox"], settings, "query", instruction="lazy ")) == rows(text(["lazy fox"], bare, "query"))
    with pytest.raises(ModelError, match="2 instructions for 1 texts"):
        text(["fox"], settings, "query", instruction=["a", "b"])


def test_a_text_of_no_token_gets_one():
    batch = TextTokenizer(tiny.tokenizer(special=False))(["", "fox"], Settings("mean", 8), "query")
    assert batch.length_N[0] == 1


def test_tokenising_nothing():
    assert len(TextTokenizer(tiny.tokenizer())([], Settings("mean", 8), "query")) == 0


def test_slow_tokenizers_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*tiny.SPECIAL, "[MASK]", "fox"]), encoding="utf-8")
    with pytest.raises(ModelError, match="is a slow tokenizer"):
        TextTokenizer(BertTokenizerLegacy(str(tmp_path / "vocab.txt")))


@pytest.mark.parametrize(
    ("asked", "folder", "tokenizer", "positions", "expected"),
    [
        (64, 256, 512, 512, 64),
        (None, 256, 512, 512, 256),
        (None, None, 128, 512, 128),
        (None, None, 10**30, 512, 512),
        (None, 1024, None, 512, 512),
        (None, None, 10**30, None, 512),
        (9000, None, 512, None, 9000),
    ],
)
def test_maximum_length(asked, folder, tokenizer, positions, expected):
    assert derive_max_length(asked, folder, tokenizer, positions) == expected


@pytest.mark.parametrize("asked", [513, 2, -1])
def test_an_impossible_maximum_length_is_an_error(asked):
    with pytest.raises(ModelError, match=f"max_length={asked}"):
        derive_max_length(asked, None, None, 512)
