"""A pooling and a head from a user's own package: in a recipe at the command line, saved, and read again."""

import json
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core import shelf
from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import load
from tests.models import tiny

CODE = '''
import torch
from torch import Tensor, nn

from embedsmith.core.reps import Sparse
from embedsmith.core.shelf import heads, poolings
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource


@poolings.register("cubic")
def cubic(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t m_t h_t^3 / sum_t m_t."""
    return (hidden_NTH**3 * pool_NT[..., None]).sum(1) / pool_NT.sum(1, keepdim=True)


@poolings.register("gated")
class Gated(nn.Module):
    """A mean with a learned weight of each coordinate."""

    def __init__(self, hidden_size: int, config) -> None:
        super().__init__()
        self.width = hidden_size
        self.gate_H = nn.Parameter(torch.linspace(0.1, 2.0, hidden_size))

    def forward(self, hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
        return self.gate_H * (hidden_NTH * pool_NT[..., None]).sum(1) / pool_NT.sum(1, keepdim=True)


@heads.register("importance")
class Importance(Head):
    """exp(a . h_t) of every token that takes part."""

    file = "importance.safetensors"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    @classmethod
    def build(cls, source: HeadSource) -> "Importance":
        head = cls(source.hidden_size)
        if cls.is_in(source.folder):
            head.read(source.folder)
        return head

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        return Sparse(padded.id_NT, self.linear(hidden_NTH)[..., 0].exp() * part_NT)
'''
ENTRY_POINTS = "[embedsmith]\nown = own_parts\n"
METADATA = "Metadata-Version: 2.1\nName: own-parts\nVersion: 1.0\n"


def forget():
    """As in a process that has not seen the package."""
    for one in (shelf.poolings, shelf.heads):
        for entry in [entry for entry in one._entries.values() if entry.package == "own_parts"]:
            del one._entries[entry.name]
    sys.modules.pop("own_parts", None)
    shelf.load_plugins.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "own_parts-1.0.dist-info").mkdir(parents=True)
    (site / "own_parts.py").write_text(CODE)
    (site / "own_parts-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "own_parts-1.0.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(site)
    forget()
    yield site
    forget()


def train(tmp_path, **model):
    """Two steps at the command line; the folder of the model."""
    pairs = [{"query": text, "pos": [text + " vector"]} for text in tiny.TEXTS[:3] + tiny.TEXTS[4:]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "model": {"path": str(tiny.folder(tmp_path / "base")), **model},
        "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "train": {"steps": 2, "batch_size": 4, "precision": "fp32", "log_with": []},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    return tmp_path / "run" / "model"


@pytest.mark.parametrize("pooling", ["cubic", "gated"])
def test_a_pooling_is_trained_saved_and_read_again(tmp_path, package, pooling):
    folder = train(tmp_path, pooling=pooling)
    forget()  # reading the folder alone has to find the package
    model = load(str(folder), device="cpu")
    assert model.settings.pooling == pooling
    vectors = model.encode(tiny.TEXTS)
    peer = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(vectors, peer.encode(tiny.TEXTS), atol=1e-6)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    peer.save(str(tmp_path / "theirs"))  # adds to the folder, and takes nothing away
    assert (tmp_path / "theirs" / "thesis.tex").exists()
    again = SentenceTransformer(str(tmp_path / "theirs"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(tiny.TEXTS), peer.encode(tiny.TEXTS))
    padded = model.tokenize(tiny.TEXTS).pad(model.pad_id)
    with torch.no_grad():
        states_NTH = model.states(padded).last_hidden_state
        gate_H = model.pooler.gate_H if pooling == "gated" else 1.0
    powered_NTH = states_NTH if pooling == "gated" else states_NTH**3
    by_hand_NH = gate_H * (powered_NTH * padded.mask_NT[..., None]).sum(1)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(by_hand_NH, dim=-1).detach(), atol=1e-5)
    assert f"`{pooling}`, comes with the Python package `own_parts`" in (folder / "README.md").read_text()
    model.save(tmp_path / "again")
    np.testing.assert_array_equal(load(str(tmp_path / "again"), device="cpu").encode(tiny.TEXTS), vectors)


def test_a_folder_whose_package_is_gone(tmp_path, package, monkeypatch):
    tiny.embedder(tmp_path / "base", pooling="cubic").save(tmp_path / "saved")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(package)])
    forget()
    with pytest.raises(ModelError, match=r"pools by 'cubic', which no installed package has(.|\n)*README\.md"):
        load(str(tmp_path / "saved"), device="cpu")
    with pytest.raises(RecipeError, match="unknown pooling 'cubic'"):
        tiny.embedder(tmp_path / "other", pooling="cubic")


def test_a_misspelt_name_finds_the_package(tmp_path, package):
    with pytest.raises(RecipeError, match="did you mean 'cubic'"):
        tiny.embedder(tmp_path, pooling="cubik")


def test_a_head_is_an_output_and_comes_back(tmp_path, package):
    model = tiny.embedder(tmp_path / "base", heads=("importance",))
    assert model.outputs == ("dense", "middle", "importance")
    weight_NT = model.represent(tiny.TEXTS, role="document", outputs=("importance",))["importance"].weight_NT
    model.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    made_NT = again.represent(tiny.TEXTS, role="document", outputs=("importance",))["importance"].weight_NT
    torch.testing.assert_close(made_NT, weight_NT)
    assert "`importance`" in (tmp_path / "saved" / "README.md").read_text()
    assert set(load(str(tmp_path / "saved"), device="cpu", heads=()).outputs) == {"dense", "middle"}
