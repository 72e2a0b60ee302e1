"""The examples of docs/frameworks.md, run in an environment with LangChain, LlamaIndex and Haystack: the same vectors
as model.encode?

    python -m bench.frameworks

MiniLM with E5's prompts is saved and served. The libraries are installed under bench/out, over this environment, with
what they want besides (a minute or two, once). What each example leaves in `query` and `documents` is compared with
`model.encode` of the page's texts under both roles.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tests.docs.blocks import blocks_of

from bench.common import ROOT, WORK, minilm, write_json
from bench.mergekit_env import installed

PAGE = "docs/frameworks.md"
PACKAGES = (
    *("langchain-core", "langchain-huggingface", "langchain-openai"),
    *("llama-index-core", "llama-index-embeddings-huggingface"),
    *("haystack-ai", "sentence-transformers-haystack"),
)
PROMPTS = {"query": "query: ", "document": "passage: "}
FOLDER, ADDRESS = "runs/mine/model", "http://127.0.0.1:8080"
LIMIT = 1e-5
_SHOWN = ("langchain-core", "llama-index-core", "haystack-ai", "openai", "sentence-transformers")


def main() -> None:
    if len(sys.argv) > 1:
        vectors_of_examples(Path(sys.argv[1]))
        return
    # langchain-huggingface wants an older one
    python = installed("frameworks", PACKAGES, with_dependencies=True, apart_from=("huggingface-hub",))
    from embedsmith.models import load

    model = load(minilm(), device="cpu", prompts=PROMPTS)
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        place = Path(work)
        model.save(place / FOLDER)
        texts = _prepared(place)
        with served(place / FOLDER) as port:
            for example in (place / "examples").glob("*.py"):
                code = example.read_text(encoding="utf-8").replace(ADDRESS, f"http://127.0.0.1:{port}")
                example.write_text(code, encoding="utf-8")
            paths = {
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
                "HAYSTACK_TELEMETRY_ENABLED": "False",
            }
            subprocess.run([python, "-m", "bench.frameworks", work], check=True, cwd=ROOT, env=paths)
        found = json.loads((place / "found.json").read_text(encoding="utf-8"))
    print("  ".join(f"{name} {version}" for name, version in found.pop("versions").items()))
    expected = {"query": model.encode(texts["question"], "query"), "documents": model.encode(texts["passages"])}
    plain = np.abs(model.encode(texts["question"], prompt="") - expected["query"]).max()
    print(f"{'without a prompt, for comparison':40s} query {plain:.1e}")
    wrong = []
    for name, vectors in found.items():
        far = apart(vectors, expected)
        print(f"{name:40s} query {far['query']:.1e}  documents {far['documents']:.1e}")
        wrong += [name] if not max(far.values()) <= LIMIT else []
    if wrong:
        sys.exit(f"other vectors than model.encode: {', '.join(wrong)}")


def apart(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """The largest difference of a number, by side."""
    for side, vectors in expected.items():
        if np.shape(found[side]) != vectors.shape:
            sys.exit(f"{side} have the shape {np.shape(found[side])}, not {vectors.shape}")
    return {side: float(np.abs(np.asarray(found[side]) - vectors).max()) for side, vectors in expected.items()}


def _prepared(place: Path) -> dict[str, object]:
    """The page's blocks as files: texts.py, and the examples by their titles. Gives what texts.py holds."""
    (place / "examples").mkdir()
    texts: dict[str, object] = {}
    for block in blocks_of(PAGE):
        if block.file == "texts.py":
            (place / block.file).write_text(block.text, encoding="utf-8")
            exec(block.text, texts)  # noqa: S102  (the page's own)
        else:
            (place / "examples" / f"{block.file}.py").write_text(block.text, encoding="utf-8")
    return texts


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """`embedsmith serve` of the folder; its port."""
    command = [sys.executable, "-m", "embedsmith", "serve", f"model={folder}", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if address := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                    yield int(address[1])
                    break
            else:
                sys.exit(f"the server did not start:\n{said}")
        finally:
            process.terminate()
            process.stderr.close()


def vectors_of_examples(place: Path) -> None:
    """In the libraries' environment: run every example where the page's reader would."""
    from importlib.metadata import version

    sys.path.insert(0, str(place))
    os.chdir(place)
    found: dict[str, object] = {"versions": {name: version(name) for name in _SHOWN}}
    for example in sorted((place / "examples").glob("*.py")):
        scope: dict[str, object] = {}
        exec(compile(example.read_text(encoding="utf-8"), example.name, "exec"), scope)  # noqa: S102  (the page's own)
        sides = {side: np.asarray(scope[side], np.float64).tolist() for side in ("query", "documents")}
        found[example.stem] = sides
    write_json(place / "found.json", found)


if __name__ == "__main__":
    main()
