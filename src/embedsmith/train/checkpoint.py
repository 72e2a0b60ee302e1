"""Checkpoints of a run: written whole or not at all, pruned, found again, resumed.

runs/a/recipe.yaml              the resolved recipe
runs/a/checkpoints/step-N/      model/ (loadable anywhere), training.pt, state.json, with live negatives mining.pt
runs/a/metrics.jsonl
runs/a/model/                   the result, written last; `finished.json` beside it says the run is over
"""

import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from embedsmith.core.collectives import objects_of_all_ranks, rank
from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import Kind, atomic_folder, discard, refuse_no_folder, sweep
from embedsmith.core.recipe import read_tree, save_recipe
from embedsmith.core.seeds import random_state, restore_random_state
from embedsmith.core.settings import to_plain
from embedsmith.models import Embedder
from embedsmith.models.write import saved_model

FINISHED = "finished.json"
CHECKPOINT = Kind(
    "checkpoint", ("model/**", "training.pt", "mining.pt", "*.json"), ("state.json", "evaluations_without_gain")
)
_FILES = ("recipe.yaml", "manifest.json", "environment.json", "metrics.jsonl", "report.html", FINISHED)
_FOLDERS = ("checkpoints/**", "evaluation/*.json", "model/**", "embedsmith/**")  # the last is TensorBoard's
RUN = Kind("run", (*_FILES, *_FOLDERS), ("recipe.yaml", "train:"))


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` optimizer steps. Everything else about its position is a function of this."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0


class Checkpoints:
    """The checkpoints of one output folder, and the folder's beginning and end."""

    def __init__(self, output: Path, keep: int) -> None:
        self.output, self.folder, self.keep = output, output / "checkpoints", keep

    def open(self, recipe: Any, overwrite: bool) -> int | None:
        """Look at the output folder before anything is built; returns the step to resume from, or None to start.

        Errors: those of `check`.
        """
        self.check(recipe, overwrite)
        if overwrite:
            discard(self.output)
        if _is_empty(self.output):
            return None
        sweep(self.output)
        return max(self.steps(), default=None)

    def check(self, recipe: Any, overwrite: bool = False) -> None:
        """Errors: `CheckpointError` if the folder holds a run of another recipe, or something else entirely."""
        if overwrite:
            RUN.refuse_foreign(self.output)
            return
        refuse_no_folder(Path(os.path.realpath(self.output)))
        if not _is_empty(self.output):
            if not RUN.marked(self.output):
                what = "the folder is not empty and holds no run"
                raise CheckpointError(what, where=self.output, fix="choose another output")
            _refuse_other_recipe(self.output, recipe)
            saved_model().refuse_foreign(self.output / "model")  # now, and not after hours of training

    def finished(self, recipe: Any) -> bool:
        """Whether this very run is over. Errors: those of `check`; `CheckpointError` where its model has gone."""
        if not (self.output / FINISHED).exists():
            return False
        self.check(recipe)
        if not (self.output / "model" / "config.json").exists():
            what, fix = "this run is finished, but its model is gone", "train it again with --overwrite"
            raise CheckpointError(what, where=self.output / "model", fix=fix)
        return True

    def claim(self, recipe: Any) -> None:
        """Write the resolved recipe into the folder, once everything is built: a recipe that failed claims nothing."""
        if rank() == 0:
            save_recipe(recipe, self.output / "recipe.yaml")

    def save(
        self,
        model: Embedder,
        extras: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        mining: dict[str, Any] | None = None,
    ) -> None:
        """Write `step-N`, then drop older ones (never the best). Collective: every rank's random state goes in, and the
        optimizer's state with full tensors, for any number of ranks."""
        random_states, of_optimizer = objects_of_all_ranks(random_state()), optimizer.state_dict()
        state_of = {
            key: {n: whole(value) for n, value in entry.items()} for key, entry in of_optimizer["state"].items()
        }
        if rank() != 0:
            return
        with atomic_folder(self.path(state.step), CHECKPOINT) as folder:
            model.save(folder / "model", merge=False)
            training = {
                "optimizer": of_optimizer | {"state": state_of},
                "extras": extras.state_dict(),
                "random": random_states,
            }
            with (folder / "training.pt").open("wb") as file:
                torch.save(training, file)
            if mining is not None:
                with (folder / "mining.pt").open("wb") as file:
                    torch.save(mining, file)
            (folder / "state.json").write_text(json.dumps(to_plain(state)), encoding="utf-8")
        for step in self.steps()[: -self.keep]:
            if step != state.best_step:
                discard(self.path(step))

    def load(self, step: int, extras: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Restore everything but the model, which is built from `model_folder(step)`."""
        folder = self.path(step)
        try:
            training: dict[str, Any] = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
            state = RunState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
            optimizer.load_state_dict(training["optimizer"])
            for parameter, entry in optimizer.state.items():
                if isinstance(parameter, DTensor):  # its moments were saved whole, and go into shards as it is
                    for name, value in entry.items():
                        if value.shape == parameter.shape and not isinstance(value, DTensor):
                            entry[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            extras.load_state_dict(training["extras"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be read ({error})",
                where=folder,
                fix="delete this folder to go on from the one before",
            ) from error
        states = training["random"]
        if rank() < len(states):  # with more ranks than before the new ones keep their seed
            restore_random_state(states[rank()])
        return state

    def load_mining(self, step: int) -> dict[str, Any]:
        """The state of live negatives. Errors: `CheckpointError` where it is missing or cannot be read."""
        path = self.path(step) / "mining.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the state of live negatives cannot be read ({error})",
                where=path,
                fix="delete this checkpoint to go on from the one before",
            ) from error
        return state

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def model_folder(self, step: int) -> Path:
        return self.path(step) / "model"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending. Half-written ones have another name and are not seen."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def finish(self, model: Embedder, summary: dict[str, Any]) -> Path:
        """Write the result and mark the run as over."""
        folder = self.output / "model"
        if rank() == 0:
            model.save(folder)
            with atomic_file(self.output / FINISHED) as file:
                json.dump(summary, file, indent=2, ensure_ascii=False)
        return folder


def whole(tensor: Any) -> Any:
    """The full tensor of a shard, on the CPU; anything else as it is. Collective for a shard."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _is_empty(output: Path) -> bool:
    """Nothing there, or no more than the temporary files of a run that was killed at its very start."""
    return not output.exists() or all(path.name.startswith(".") for path in output.iterdir())


def _refuse_other_recipe(output: Path, recipe: Any) -> None:
    before, now = _flat(read_tree(output / "recipe.yaml")), _flat(to_plain(recipe))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listing = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:5])
        raise CheckpointError(
            f"the folder holds a run of another recipe ({listing})",
            where=output,
            fix="use the same recipe to continue it, another output to start anew, or --overwrite",
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(place), value) for place, value in enumerate(tree)]
    else:
        return {prefix.rstrip("."): tree}
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}{key}.").items()}
