"""Words added to a vocabulary: where their embeddings start, that they train and travel, and what is refused."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedsmith.core.errors import ModelError
from embedsmith.models.config import ModelConfig
from embedsmith.models.load import without_weights
from tests.models.families import tiny
from tests.models.test_decoders import byte_tokenizer, embed

NEW = ["COVID-19", "麻黄汤"]
TEXTS = ["a COVID-19 test", "麻黄汤 is old", "none of them"]


@pytest.fixture(scope="module", params=[267, 280], ids=["as many rows as tokens", "more rows"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("qwen3", vocab_size=request.param, tie_word_embeddings=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def move(model):
    """As if it had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "embed_tokens" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)


def test_a_new_token_starts_as_the_mean_of_its_pieces_and_changes_no_other_text(base):
    plain, model = embed(base, pooling="mean"), embed(base, pooling="mean", new_tokens=NEW)
    table, rows = (one.backbone.get_input_embeddings().weight.detach() for one in (plain, model))
    ids = model.tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [267, 268]
    for token, number in zip(NEW, ids):
        pieces = plain.tokenizer(token, add_special_tokens=False).input_ids
        assert len(pieces) > 2
        torch.testing.assert_close(rows[number], table[pieces].mean(0))
        assert number in model.tokenize([f"the {token}."]).id_S
    assert torch.equal(rows[:267], table[:267])
    np.testing.assert_array_equal(model.encode([TEXTS[2]]), plain.encode([TEXTS[2]]))
    config = ModelConfig(path=str(base), pooling="mean", max_length=48, new_tokens=tuple(NEW))
    assert without_weights(config).tokenize(TEXTS).id_S.tolist() == model.tokenize(TEXTS).id_S.tolist()


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["weights", "adapter"])
def test_new_tokens_are_trained_saved_and_read_everywhere(base, tmp_path, lora):
    model = embed(base, pooling="mean", new_tokens=NEW, lora=lora)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" in name]
    assert trained == [
        "backbone.embed_tokens." + ("token_adapter.trainable_tokens_delta.default" if lora else "weight")
    ]
    move(model)
    vectors = model.encode(TEXTS)
    assert np.abs(vectors - embed(base, pooling="mean", new_tokens=NEW).encode(TEXTS)).max() > 1e-2
    model.save(tmp_path / "whole")
    np.testing.assert_allclose(embed(tmp_path / "whole").encode(TEXTS), vectors, atol=2e-6)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "whole")).encode(TEXTS), vectors, atol=2e-6)
    assert json.loads((tmp_path / "whole/config.json").read_text())["vocab_size"] >= 269
    model.save(tmp_path / "apart", merge=False)
    again = embed(tmp_path / "apart", lora=lora)
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    if lora:
        again.save(tmp_path / "again", merge=False)
        np.testing.assert_array_equal(embed(tmp_path / "again", lora=lora).encode(TEXTS), vectors)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["dog"], "'dog' is a token of this model already"),
        (["new", "new"], "has 'new' twice"),
        (["  "], "new_tokens has '  '"),
    ],
)
def test_what_cannot_be_a_new_token_is_refused(base, tokens, words):
    with pytest.raises(ModelError, match=words):
        embed(base, pooling="mean", new_tokens=tokens)


def test_tokens_are_added_once(base, tmp_path):
    embed(base, pooling="mean", new_tokens=NEW).save(tmp_path / "model")
    with pytest.raises(ModelError, match="'COVID-19' is a token of this model already"):
        embed(tmp_path / "model", new_tokens=NEW)
    embed(base, pooling="mean", lora={"r": 2}).save(tmp_path / "apart", merge=False)
    with pytest.raises(ModelError, match="new_tokens of a model with an adapter"):
        embed(tmp_path / "apart", new_tokens=NEW)
