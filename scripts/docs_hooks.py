"""What mkdocs is told about this repository: pages link to recipes and examples, which stand outside docs/.

A link such as `../recipes/joint.yaml` works where the repository is read; for the site the files it names are copied
beside the pages, and the link goes there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>(?:recipes|examples)/[^)#\s]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/. Errors: `FileNotFoundError` for a link to nothing."""
    for page in list(files.documentation_pages()):
        text = Path(page.abs_src_path).read_text(encoding="utf-8")
        for link in _OUTSIDE.finditer(text):
            path = _target(page.src_uri, link)
            if files.get_file_from_path(path) is None:
                copied = (ROOT / path).read_text(encoding="utf-8").replace("/docs/", "/")  # pages stand at the top
                files.append(File.generated(config, path, content=copied))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ in a repository go to the copies."""

    def inside(link: re.Match[str]) -> str:
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(_target(page.file.src_uri, link), start)})"

    return _OUTSIDE.sub(inside, markdown)


def _target(page: str, link: re.Match[str]) -> str:
    """The path in the repository, of a folder that of its README. Pages stand below docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link["up"] + link["path"]))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path
