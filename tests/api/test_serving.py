"""What the server's application is made of: its models by name, keys, a reranker, and folders of indexes."""

import pytest
import torch

from embedsmith.api.serving import application, named_models, read_keys, reranker_named
from embedsmith.core.errors import RecipeError
from embedsmith.models import load, load_reranker
from tests.models.test_reranker import head

KEY = "a-key-of-16-sign"


def test_keys_are_read_from_a_file_or_a_variable(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {KEY[::-1]}\t\n")
    monkeypatch.setenv("SERVER_KEY", "k" * 20)
    assert read_keys(file, "SERVER_KEY") == [KEY, KEY[::-1], "k" * 20]
    assert read_keys(None, None) == []
    for text, words in (
        ("# none\n", "no key in this file"),
        (KEY[1:] + "\n", "key 1 is too short"),
        (f"{KEY}\nwith spaces in the key\n", "key 2 is"),
        ("signs beyond ASCII: é" * 2 + "\n", "ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_keys(file, None)


def test_models_are_named_by_their_folders(tmp_path):
    tiny, run = tmp_path / "tiny", tmp_path / "runs" / "mine" / "model"
    tiny.mkdir()
    run.mkdir(parents=True)
    assert named_models([str(tiny), str(run)]) == {"tiny": str(tiny), "mine": str(run)}
    assert named_models(["a=org/one", "org/two"]) == {"a": "org/one", "org/two": "org/two"}
    assert named_models({"x": tiny}) == {"x": tiny}
    with pytest.raises(RecipeError, match="two models are called"):
        named_models([str(run), f"mine={tiny}"])


def test_a_reranker_answers_before_its_activation_and_stays_as_it_is(tmp_path):
    folder = str(head(tmp_path / "judge"))
    whole = load_reranker(folder)  # through a sigmoid unless the folder says otherwise
    assert reranker_named(None) == ("", None)
    name, opened = reranker_named(whole)
    assert (name, opened() is whole) == ("reranker", False)
    pair = (["a cat"], ["the dog sat"])
    score = whole.score(*pair)
    torch.testing.assert_close(torch.as_tensor(opened().score(*pair)).sigmoid(), torch.as_tensor(score))
    torch.testing.assert_close(torch.as_tensor(whole.score(*pair)), torch.as_tensor(score))
    name, opened = reranker_named(f"mine={folder}")
    assert name == "mine"
    torch.testing.assert_close(torch.as_tensor(opened().score(*pair)).sigmoid(), torch.as_tensor(score))


def test_options_are_those_of_a_folder_that_is_opened(workplace):
    with pytest.raises(RecipeError, match="max_length of a model that is loaded"):
        application(load("my-model"), max_length=4)
    application("my-model", max_length=4)
