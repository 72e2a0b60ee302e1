"""Checkpoints of a run: written whole or not at all, pruned, found again, resumed.

runs/a/recipe.yaml              the resolved recipe
runs/a/checkpoints/step-N/      model/ (loadable anywhere), training.pt, state.json, with live negatives mining.pt;
                                files.json with the hash of each of them, by which damage is seen before a resume
runs/a/metrics.jsonl
runs/a/model/                   the result, written last; `finished.json` beside it says the run is over
"""

import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from embedsmith.core.collectives import objects_of_all_ranks, on_first_rank, rank
from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import local_path
from embedsmith.core.outputs import Kind, atomic_folder, clear_left, discard, recover, refuse_no_folder
from embedsmith.core.progress import log
from embedsmith.core.recipe import parse, read_tree, save_recipe
from embedsmith.core.seeds import random_state, restore_random_state
from embedsmith.core.settings import Finite, Range, to_plain
from embedsmith.data.split import HELD_OUT
from embedsmith.models import Model
from embedsmith.models.lora import ADAPTER, UnmergedError
from embedsmith.models.write import refuse_not_finite, saved_model

FINISHED = "finished.json"
CHECKPOINT = Kind(
    "checkpoint", ("model/**", "training.pt", "mining.pt", "*.json"), ("state.json", "evaluations_without_gain")
)
_FILES = ("recipe.yaml", "manifest.json", "environment.json", "cut.json", "metrics.jsonl", "report.html", FINISHED)
_FOLDERS = (
    "checkpoints/**",
    "evaluation/*.json",
    "model/**",
    f"{HELD_OUT}/**",
    "embedsmith/**",
)  # the last is TensorBoard's
RUN = Kind("run", (*_FILES, *_FOLDERS), ("recipe.yaml", "train:"))
FILES = "files.json"
Steps = Annotated[int, Range(ge=0)]
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
"""The loss scale of a run's first step under fp16, and after how many steps without an overflow it doubles."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` optimizer steps. Everything else about its position is a function of this.

    `skipped_steps`: steps so far whose gradient was not finite, `skipped_in_a_row`: the last ones among them.
    `token_budget`: tokens encoded at once on `card`, as measured there or halved since; `None` where nothing was.
    `loss_scale`: by what the loss is multiplied under fp16, `scaled_steps`: steps since it changed, `overflowed_steps`:
    those that were left out because the scaled gradient was too large for fp16, which is how the scale is found.
    `start`: the fingerprint of the model at the start, where the run is held to it.
    """

    step: Steps = 0
    best_score: Finite | None = None
    best_step: Steps | None = None
    evaluations_without_gain: Steps = 0
    skipped_steps: Steps = 0
    skipped_in_a_row: Steps = 0
    token_budget: Annotated[int, Range(ge=1)] | None = None
    card: str | None = None
    loss_scale: Finite | None = None
    scaled_steps: Steps = 0
    overflowed_steps: Steps = 0
    start: str | None = None

    def after(self, norm: float) -> "RunState":
        """The state after one more step, whose gradient had that norm.

        The loss scale follows torch's GradScaler: halved after a norm that is not finite, doubled after 2,000 others.
        A norm that is not finite at a scale of 1 is a fault of the run and no overflow.
        """
        bad = not math.isfinite(norm)
        scale, scaled_steps = self.loss_scale, self.scaled_steps
        if scale is not None:
            if bad and scale > 1:
                overflowed = self.overflowed_steps + 1
                return replace(
                    self, step=self.step + 1, loss_scale=scale / 2, scaled_steps=0, overflowed_steps=overflowed
                )
            scaled_steps = 0 if bad else scaled_steps + 1
            if scaled_steps == GROWTH_STEPS:
                scale, scaled_steps = scale * 2, 0
        return replace(
            self,
            step=self.step + 1,
            skipped_steps=self.skipped_steps + bad,
            skipped_in_a_row=self.skipped_in_a_row + 1 if bad else 0,
            loss_scale=scale,
            scaled_steps=scaled_steps,
        )

    def summary(self) -> dict[str, Any]:
        """What is said of a run that is over."""
        said = {"steps": self.step, "best_step": self.best_step, "best_score": self.best_score}
        rare = {"skipped_steps": self.skipped_steps, "overflowed_steps": self.overflowed_steps}
        return said | {name: count for name, count in rare.items() if count}


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
            recover(self.output / "recipe.yaml")  # that file is the first; all else here may be somebody's
            return None
        saved_model().refuse_foreign(self.output / "model")  # now, and not after hours of training
        clear_left(self.output)
        last = max(self.steps(), default=None)
        if last is not None:
            self._verify(last)
        return last

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

    def finished(self, recipe: Any) -> bool:
        """Whether this very run is over. Errors: those of `check`; `CheckpointError` where its model has gone."""
        if not (self.output / FINISHED).exists():
            return False
        self.check(recipe)
        if not any((self.output / "model" / name).exists() for name in ("config.json", ADAPTER)):
            what, fix = "this run is finished, but its model is gone", "train it again with --overwrite"
            raise CheckpointError(what, where=self.output / "model", fix=fix)
        clear_left(self.output)  # of a kill after its end
        return True

    def claim(self, recipe: Any) -> None:
        """Write the resolved recipe into the folder, once everything is built: a recipe that failed claims nothing."""
        if rank() == 0:
            save_recipe(recipe, self.output / "recipe.yaml")

    def save(
        self,
        model: Model,
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
        training = {
            "optimizer": of_optimizer | {"state": state_of},
            "extras": extras.state_dict(),
            "random": random_states,
        }
        pieces = {"training.pt": training} | ({} if mining is None else {"mining.pt": mining})
        refuse_not_finite(extras)
        on_first_rank(lambda: self._write(model, pieces, state))

    def _write(self, model: Model, pieces: dict[str, Any], state: RunState) -> None:
        with atomic_folder(self.path(state.step), CHECKPOINT) as folder:
            model.save(folder / "model", merge=False)
            for name, piece in pieces.items():
                with (folder / name).open("wb") as file:
                    torch.save(piece, file)
            (folder / "state.json").write_text(json.dumps(to_plain(state, exact=True)), encoding="utf-8")
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            hashes = {str(path.relative_to(folder)): _hash(path) for path in files}
            (folder / FILES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for step in self.steps()[: -self.keep]:
            if step != state.best_step:
                discard(self.path(step))

    def load(self, step: int, extras: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Restore everything but the model, which is built from `model_folder(step)`."""
        with self._reading(step, "state.json") as path:
            state = TypeAdapter(RunState).validate_json(path.read_bytes(), strict=True)
            if state.step != step:
                raise ValueError(f"it says step {state.step}")
        if state.best_step is not None and not self.path(state.best_step).is_dir():
            log.warning("the best checkpoint so far, step %d, is gone: the best is chosen anew", state.best_step)
            state = replace(state, best_score=None, best_step=None)
        with self._reading(step, "training.pt") as path:
            training: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            optimizer.load_state_dict(training["optimizer"])
            for parameter, entry in optimizer.state.items():
                if isinstance(parameter, DTensor):  # its moments were saved whole, and go into shards as it is
                    for name, value in entry.items():
                        if value.shape == parameter.shape and not isinstance(value, DTensor):
                            entry[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            extras.load_state_dict(training["extras"])
            states = training["random"]
            if rank() < len(states):  # with more ranks than before the new ones keep their seed
                restore_random_state(states[rank()])
        return state

    def load_mining(self, step: int) -> dict[str, Any]:
        """The state of live negatives. Errors: `CheckpointError` where it is missing or cannot be read."""
        with self._reading(step, "mining.pt") as path:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _verify(self, step: int) -> None:
        """Errors: `CheckpointError` naming the first file of a checkpoint that is not as it was written."""
        with self._reading(step, FILES) as path:
            if not path.exists() and path.parent.is_dir():  # of an older version: what is read of it is checked alone
                return
            written = TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
        for name, digest in written.items():
            with self._reading(step, name) as path:
                if _hash(path) != digest:
                    raise ValueError(f"it is not as it was written; it has {path.stat().st_size:,} bytes")

    @contextmanager
    def _reading(self, step: int, name: str) -> Iterator[Path]:
        """Around the reading of a file of a checkpoint. Errors: `CheckpointError` for whatever a damaged file does."""
        path = self.path(step) / name
        try:
            yield local_path(path)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            before = max((other for other in self.steps() if other < step), default=None)
            what = "the state of live negatives" if name == "mining.pt" else "the checkpoint"
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{what} cannot be read ({reason})",
                where=path,
                fix=f"rm -r {shlex.quote(str(self.path(step)))}; the same command then "
                + ("starts anew" if before is None else f"goes on from step {before}"),
            ) from error

    def way_back(self) -> str:
        """What to do when training cannot go on."""
        calmer = "with a lower train.learning_rate or train.precision=fp32"
        last = max(self.steps(), default=None)
        if last is None:
            return f"no checkpoint was written yet: start anew in another output, {calmer}"
        return (
            f"go back to {self.path(last)}: the same command goes on from there; or start from its weights in another "
            f"output, model.path={self.model_folder(last)}, {calmer}"
        )

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def model_folder(self, step: int) -> Path:
        return self.path(step) / "model"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending. Half-written ones have another name and are not seen."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def finish(self, model: Model, summary: dict[str, Any]) -> Path:
        """Write the result and mark the run as over."""
        folder = self.output / "model"

        def write() -> None:
            try:
                model.save(folder)
            except UnmergedError as error:
                log.warning("%s; %s holds the adapter alone, beside its base %s", error.what, folder, base_of(model))
                model.save(folder, merge=False)
            with atomic_file(self.output / FINISHED) as file:
                json.dump(summary, file, indent=2, ensure_ascii=False)

        on_first_rank(write)
        return folder


def base_of(model: Model) -> str:
    """Where the base of a model's adapter lies."""
    return str((model.base or {}).get("path", ""))


def whole(tensor: Any) -> Any:
    """The full tensor of a shard, on the CPU; anything else as it is. Collective for a shard."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_empty(output: Path) -> bool:
    """Nothing there, or no more than what a run leaves that was killed at its very start."""
    return not output.exists() or all(path.name.startswith(".") or path.name == HELD_OUT for path in output.iterdir())


def _refuse_other_recipe(output: Path, recipe: Any) -> None:
    path = output / "recipe.yaml"
    before = flat(to_plain(parse(type(recipe), read_tree(path), where=str(path))))  # keys that are new since then too
    now = flat(to_plain(recipe))
    # a run that was moved, or brought from object storage, lies where it is
    changed = sorted(key for key in (before.keys() | now.keys()) - {"output"} if before.get(key) != now.get(key))
    if changed:
        listing = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:5])
        raise CheckpointError(
            f"the folder holds a run of another recipe ({listing})",
            where=output,
            fix="use the same recipe to continue it, another output to start anew, or --overwrite",
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a plain tree by their keys, as an override names them."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(place), value) for place, value in enumerate(tree)]
    else:
        return {prefix.rstrip("."): tree}
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}{key}.").items()}
