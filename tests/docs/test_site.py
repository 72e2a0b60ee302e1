"""The site: every page is in its navigation and links lead somewhere; built, it fetches nothing."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)")
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_is_in_the_navigation_and_its_links_lead_somewhere(page):
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert page.relative_to(DOCS).as_posix() in listed, "a new page goes into the nav of mkdocs.yml"
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    assert [link for link in _LINK.findall(text) if not (page.parent / link).exists()] == []
    assert "/embedsmith/embedsmith" not in text, "no public address is known: link to files of the repository"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_links_of_the_first_pages_lead_somewhere(page):
    links = _LINK.findall(_FENCED.sub("", (ROOT / page).read_text(encoding="utf-8")))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (DOCS / "versions.md").read_text(encoding="utf-8").partition("## Extras")[2]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in page.splitlines() if line[:1] == "|")))
    assert named == set(project["optional-dependencies"]) - {"dev", "docs"}


@pytest.mark.slow
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material: pip install 'embedsmith[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install 'embedsmith[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    fetched = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]+"|<link[^>]+href="(?:https?:)?//[^"]+"'
    )
    assert {found for page in pages for found in fetched.findall(page.read_text(encoding="utf-8"))} == set()
    assert (tmp_path / "site" / "recipes" / "merge-soup.yaml").is_file()
    assert (tmp_path / "site" / "zh" / "tutorial.html").is_file()
