"""Things of a user's own package are found by its entry point, named in full where they are wrong, and looked for only
when they are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedsmith.core.errors import RecipeError
from embedsmith.core.shelf import load_plugins, losses

LOSS = """
from dataclasses import dataclass
from embedsmith.core.batch import Loss, LossOutput, RetrievalBatch
from embedsmith.core.settings import Positive
from embedsmith.core.shelf import losses

@losses.register({name!r}, formula="0", source="nobody")
@dataclass(frozen=True)
class Third(Loss):
    \"\"\"A loss of another package.

    scale: how large it is.
    \"\"\"

    batches = (RetrievalBatch,)
    scale: Positive = 1.0

    def __call__(self, batch):
        return LossOutput(batch.query.local["dense"].vector_ND.sum()[None] * 0 + self.scale)
"""


def install(folder: Path, code: str) -> None:
    """What an installer leaves of a package `third-losses` whose module is `third_losses`."""
    information = folder / "third_losses-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-losses\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[embedsmith]\nthird = third_losses\n")
    (folder / "third_losses.py").write_text(code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place that Python looks into for packages; what they put on the shelf is taken away again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    losses.entries()
    monkeypatch.setattr(losses, "_entries", dict(losses._entries))
    load_plugins.cache_clear()
    yield tmp_path
    sys.modules.pop("third_losses", None)
    load_plugins.cache_clear()


def test_a_loss_of_another_package_is_built_and_listed(folder):
    install(folder, LOSS.format(name="third"))
    assert losses.build({"type": "third", "scale": 2.0}).scale == 2.0
    assert {entry.name: entry.package for entry in losses.entries()}["third"] == "third_losses"
    with pytest.raises(RecipeError, match="did you mean 'third'"):
        losses.get("thirt")
    with pytest.raises(RecipeError, match=r"third: scale is 0\.0"):
        losses.get("third")(scale=0.0)


def test_a_name_of_the_tree_is_found_without_looking_at_packages(folder):
    install(folder, "raise OSError('looked')")
    assert losses.build("infonce").temperature == 0.02


def test_a_package_that_cannot_be_imported_is_named_with_the_fix(folder):
    install(folder, "import a_module_that_is_not_there")
    with pytest.raises(RecipeError) as error:
        losses.get("third")
    for word in ("third-losses", "a_module_that_is_not_there", "third = third_losses", "pip uninstall third-losses"):
        assert word in str(error.value)


def test_a_name_that_is_taken_is_refused(folder):
    install(folder, LOSS.format(name="infonce"))
    with pytest.raises(RecipeError) as error:
        losses.entries()
    for word in ("'infonce'", "embedsmith.losses.retrieval.InfoNCE", "third_losses.Third", "another name"):
        assert word in str(error.value)


@pytest.mark.parametrize("code", ["import embedsmith", "from embedsmith.cli import main; main()"])
def test_starting_looks_for_no_packages(code, tmp_path):
    install(tmp_path, "print('LOOKED')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = f"import sys; sys.argv = ['embedsmith', '--help']; {code}"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert "LOOKED" not in done.stdout
