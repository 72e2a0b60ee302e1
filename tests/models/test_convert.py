"""`embedsmith convert`: a decoder's folder to an embedder's, with what is missing derived."""

import pytest

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import load
from embedsmith.models.convert import convert
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny("llama", vocab_size=280).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_pooling_follows_the_attention(decoder, tmp_path):
    assert "last pooling, causal attention" in convert(decoder, tmp_path / "a")
    said = convert(decoder, tmp_path / "b", ["attention=bidirectional", "layers=1", "head.out=8"])
    assert "8 numbers a text, mean pooling, bidirectional attention" in said
    assert load(str(tmp_path / "b"), device="cpu").encode(TEXTS).shape == (5, 8)
    assert "mean pooling" in convert(str(tmp_path / "b"), tmp_path / "c", ["max_length=16"])


def test_mistakes_are_named(tmp_path, decoder):
    with pytest.raises(RecipeError, match="did you mean 'pooling'"):
        convert(decoder, tmp_path / "a", ["poolin=mean"])
    with pytest.raises(ModelError, match="no such file"):
        pytest.importorskip("gguf")
        convert(str(tmp_path / "absent.gguf"), tmp_path / "a")
