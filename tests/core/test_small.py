"""Seeds, devices, encoders, Markdown, keys: small things that every room leans on."""

import random

import numpy as np
import pytest
import torch
from rich.table import Table

from embedsmith.core import device
from embedsmith.core.encoder import fingerprint, hash_of_model, hash_with_weights, represent
from embedsmith.core.errors import EmbedsmithError, MissingExtraError, ModelError, RecipeError, foreign_errors
from embedsmith.core.keys import checked_address, checked_variable, key_from
from embedsmith.core.markdown import block, code, in_line, row, without_folders
from embedsmith.core.seeds import TorchRandom, derive_seed, random_state, restore_random_state, seed_everything
from embedsmith.core.terminal import Terminal, show
from embedsmith.core.text_out import printable, remember_secret, remember_secrets_in, without_secrets

# ---------------------------------------------------------------------------------------------------------- seeds


def draw():
    return random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(1).item()


def test_a_seed_depends_on_every_key_and_is_the_same_everywhere():
    assert derive_seed(0, "plan", 3) == 6785927097819238937
    others = {derive_seed(0, "plan", 4), derive_seed(0, "plan"), derive_seed("0", "plan", 3), derive_seed("plan", 0, 3)}
    assert len(others | {derive_seed(0, "plan", 3)}) == 5
    assert all(0 <= derive_seed(n) < 2**63 for n in range(50))


def test_every_generator_is_seeded_captured_and_restored():
    seed_everything(2**40 + 7)
    first = draw()
    seed_everything(2**40 + 7)
    assert draw() == first
    for change in (random.random, np.random.rand, lambda: torch.rand(1), np.random.randn, lambda: random.gauss(0, 1)):
        state = random_state()
        expected = draw()
        restore_random_state(state)
        change()
        restore_random_state(state)
        assert draw() == expected
    state = TorchRandom.capture()
    expected = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), expected)


# --------------------------------------------------------------------------------------------------- the machine


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    assert 2**26 < device.memory() < 2**50
    assert device.cores() >= 1
    monkeypatch.setattr(device, "memory", lambda: 2 * 10**9)
    device.check_fits(2 * 10**9, "the table")
    with pytest.raises(ModelError, match=r"here: the table would take 3 GB, and this machine has 2 GB"):
        device.check_fits(3 * 10**9, "the table", where="here")
    monkeypatch.setattr(device, "memory", lambda: None)
    device.check_fits(10**18, "the table")


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1000000), ("max\n", None), (None, None)])
def test_memory_is_what_the_container_allows(monkeypatch, tmp_path, limit, expected):
    asked = []

    class FakePath:
        def __init__(self, path):
            asked.append(path)

        def read_text(self, encoding):
            if limit is None:
                raise FileNotFoundError
            return limit

    monkeypatch.setattr(device, "Path", FakePath)
    monkeypatch.setattr(device.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.__getitem__)
    assert device.memory() == (expected or 4096 * 10**6)
    assert asked == ["/sys/fs/cgroup/memory.max"]


# ------------------------------------------------------------------------------------------------------- encoders


class Plain:
    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        return (list(texts), role, task, tuple(outputs))


class Instructed(Plain):
    def represent(self, texts, *, role, task=None, outputs=("dense",), instruction=None):
        return (list(texts), role, task, tuple(outputs), instruction)

    def fingerprint(self):
        return "one"


def test_instructions_reach_only_encoders_that_take_them():
    asked = {"role": "query", "task": "t", "outputs": ["sparse"]}
    for instruction in (None, [None, None]):
        assert represent(Plain(), ["a", "b"], **asked, instruction=instruction) == (
            ["a", "b"],
            "query",
            "t",
            ("sparse",),
        )
    assert represent(Instructed(), ["a"], **asked, instruction=["i"]) == (["a"], "query", "t", ("sparse",), ["i"])
    with pytest.raises(ModelError, match="Plain cannot put"):
        represent(Plain(), ["a", "b"], **asked, instruction=[None, "i"])


def test_an_encoder_says_which_one_it_is():
    assert fingerprint(Instructed()) == "one"
    with pytest.raises(ModelError, match="Plain cannot say which model it is"):
        fingerprint(Plain())


def test_a_models_hash_counts_weights_names_types_shapes_and_settings():
    def of(build=lambda: torch.nn.Linear(2, 3), settings=("a",)):
        torch.manual_seed(0)
        return hash_of_model(build(), *settings)

    def changed(model):
        with torch.no_grad():
            model.bias[1] += 1
        return model

    wrapped = torch.nn.ModuleDict
    hashes = [
        of(),
        of(settings=("b",)),
        of(settings=("a", "b")),
        of(lambda: changed(torch.nn.Linear(2, 3))),
        of(lambda: torch.nn.Linear(2, 3).half()),
        of(lambda: wrapped({"x": torch.nn.Linear(2, 3)})),
        of(lambda: wrapped({"y": torch.nn.Linear(2, 3)})),
    ]
    assert len(set(hashes)) == len(hashes)
    assert of() == hashes[0]
    flat, square = torch.nn.ParameterDict({"w": torch.zeros(4)}), torch.nn.ParameterDict({"w": torch.zeros(2, 2)})
    assert hash_with_weights("", flat) != hash_with_weights("", square)


# ------------------------------------------------------------------------------------------------- text on its way out


def test_markdown_shows_text_as_text():
    assert in_line(" a\n *b* [c](d) <e> & `f` ~g~ \\") == r"a \*b\* \[c\](d) &lt;e&gt; &amp; \`f\` \~g\~ \\"
    assert (code("a\nb"), code("a`b"), code("``a"), code("")) == (r"`a\nb`", "`` a`b ``", "``` ``a ```", "``")
    assert row("a|b", "c") == "| a\\|b | c |"
    assert block("\nx = 1\n", "yaml") == "```yaml\nx = 1\n```"
    assert block("```\n````", "") == "`````\n```\n````\n`````"


def test_paths_lose_their_folders_and_nothing_else_does():
    tree = {"/home/me/a.jsonl": ["/data/x/y", "C:\\Users\\me\\b", "~/a/b", "org/model", "/tmp", "a/b/c", 3, "/a/b\nc"]}
    assert without_folders(tree) == {"a.jsonl": ["y", "b", "b", "org/model", "/tmp", "a/b/c", 3, "/a/b\nc"]}
    assert without_folders(("/data/x/y", None)) == ["y", None]
    assert without_folders("C:\\") == "C:\\"


def test_control_characters_are_shown():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x00\x1f\x7f\x80\x9f\xa0") == "\\u0000\\u001f\\u007f\\u0080\\u009f\xa0"
    assert printable("\u202a\u202e\u2066\u2069\u061c\ud800\udfff") == (
        "\\u202a\\u202e\\u2066\\u2069\\u061c\\ud800\\udfff"
    )
    assert printable("\u2029\u202f\u2065\u206a 中é") == "\u2029\u202f\u2065\u206a 中é"


def test_a_terminal_shows_controls_in_every_place(capsys):
    table = Table("[bold]\x1b", title="\x1bt")
    table.add_row("\x07 :smile:")
    show(table)
    show("[red]\x1b[31m")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    for part in ("[bold]\\", "\\u001bt", "\\u0007", ":smile:", "[red]\\u001b[31m"):
        assert part in shown
    assert Terminal(width=30).width == 30


def test_secrets_are_left_out_of_errors():
    remember_secret("short")
    assert without_secrets("short") == "short"
    assert remember_secret("abcdef") == "abcdef"
    remember_secret("abcdefgh")
    assert without_secrets("abcdefgh and abcdef") == "*** and ***"
    remember_secrets_in({"api_key": "key-one", "x": {"Authorization": "key-two", "monkey": "key-three"}, "token": 3})
    assert without_secrets("key-one key-two key-three") == "*** *** key-three"
    error = EmbedsmithError("abcdefgh", where="abcdefgh", expected="abcdefgh", fix="abcdefgh")
    assert str(error) == "***: ***\n  expected: ***\n  to fix: ***"
    assert without_secrets("http://me:pw@host/x?api_key=1&b=2") == "http://***@host/x?api_key=***&b=2"
    assert without_secrets("https://host/x?a=1&Access-Token=z") == "https://host/x?a=1&Access-Token=***"
    assert str(EmbedsmithError("what")) == "what"
    assert 'pip install "embedsmith[lora]"' in str(MissingExtraError("peft", "lora"))


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret-value \n")
    assert key_from("MY_KEY") == "secret-value"
    assert without_secrets("secret-value") == "***"
    assert key_from(None) is None
    for value in ("", "  "):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(ModelError, match="MY_KEY is not set"):
            key_from("MY_KEY", ModelError)
    for value in ("two\nlines-of", "schlüssel"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(RecipeError, match="line breaks or signs") as raised:
            key_from("MY_KEY")
        assert value not in str(raised.value)


def test_names_of_variables_and_addresses():
    assert checked_variable(None, "key_variable") is None
    assert checked_variable("MY_KEY1", "key_variable") == "MY_KEY1"
    for wrong in ("sk-123456789", "1KEY", "hf_abcdefghij", ""):
        with pytest.raises(RecipeError, match="key_variable is no name") as raised:
            checked_variable(wrong, "key_variable")
        assert not wrong or wrong not in str(raised.value)
    assert checked_address("https://host:1/v1", "url") == "https://host:1/v1"
    for wrong in ("ftp://host", "host:80", "http://", ""):
        with pytest.raises(RecipeError, match="url is"):
            checked_address(wrong, "url")
    for wrong in ("http://me@host", "http://host/?a=1", "http://host/#a"):
        with pytest.raises(RecipeError, match="with more than a server and a path"):
            checked_address(wrong, "url")


# ------------------------------------------------------------------------------------------------------- errors


class PanicException(BaseException):
    """As the native code of tokenizers raises it."""


@pytest.mark.parametrize("error", [ValueError("a\n b"), PanicException("a b")])
def test_what_foreign_code_raises_becomes_ours(error):
    with pytest.raises(ModelError, match=r"folder: cannot read it: a b\n"), foreign_errors("cannot read it", "folder"):
        raise error


def test_foreign_errors_are_short_and_ours_pass():
    with pytest.raises(ModelError, match=r": ValueError\n"), foreign_errors("x", None):
        raise ValueError
    with pytest.raises(ModelError) as raised, foreign_errors("x", None):
        raise ValueError("y" * 1000)
    assert "y" * 500 + "…" in str(raised.value)
    with pytest.raises(RecipeError, match="mine"), foreign_errors("x", None):
        raise RecipeError("mine")
    with pytest.raises(KeyboardInterrupt), foreign_errors("x", None):
        raise KeyboardInterrupt
