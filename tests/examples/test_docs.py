"""docs/extending.md shows the files of examples/plugin word for word, so what a reader copies is what is tested."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "plugin" / "src" / "embedsmith_example").glob("*.py"))
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def without_module_docstring(path: Path) -> str:
    """A file of the package as the page shows it: the page's own words stand in place of the file's first docstring."""
    return re.sub(r'\A""".*?"""\n+', "", path.read_text(encoding="utf-8"), flags=re.S).strip()


def test_the_page_shows_every_file_that_registers_something():
    shown = [path for path in FILES if path.name != "__init__.py"]
    assert len(BLOCKS) == len(shown) == 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"^(?:class|def) (\w+)", block, re.M)[-1])
def test_a_snippet_of_the_page_stands_in_a_file_of_the_package(block):
    assert block.strip() in [without_module_docstring(path) for path in FILES]
