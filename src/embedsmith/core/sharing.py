"""How the work of a verb is shared: by the ranks of a launcher, or by shards, which a scheduler starts each by itself.

A work lies in parts, numbered from 0. What a part is depends on the work alone, never on how many share it, so that
whoever makes a part makes the same bytes. Part p is that of rank or shard p mod n:

    alone     one process makes all parts that are not there, and ends the work
    ranks     so do n ranks, each its share of what is left; the first ends the work
    shard     a process makes its share of the parts and leaves the end to a join; it waits for nobody
    join      a process makes no part; it ends the work, where every part is there

Finished parts lie on a disk that all share, each whole or not at all, where the verb keeps them; so they outlive
whoever made them, and the same command goes on. A command without shard and join uses the parts of shards too.

What shards agree on is a note beside the output, `NAME.shards.json`, which the first of them leaves and the end
removes: how many they are, and all that the parts depend on. While shards work nobody may end the work, and no shard
works twice at a time.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from embedsmith.core.collectives import (
    Group,
    join_ranks,
    lost_ranks,
    on_every_rank,
    on_first_rank,
    patient_ranks,
    rank,
    world_size,
)
from embedsmith.core.errors import CheckpointError, EmbedsmithError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json
from embedsmith.core.outputs import claimed, is_claimed, refuse_foreign_file
from embedsmith.core.progress import log

T = TypeVar("T")

_LOOK = 1.0
"""Seconds between two looks at what other shards have done."""

Shard = str | tuple[int, int]
"""Which of how many, counted from 0: `"0/4"` or `(0, 4)`."""


class OthersFirstError(EmbedsmithError):
    """What a shard would do next needs what other shards have not done yet."""


@dataclass(frozen=True)
class Sharing:
    """One process's part in a work. `index`, `count`: which rank or shard it is, of how many.
    `group`: the ranks, which wait for one another."""

    verb: str
    output: Path
    mode: Literal["alone", "ranks", "shard", "join"] = "alone"
    index: int = 0
    count: int = 1
    group: Group = None

    @staticmethod
    def asked(verb: str, output: str | Path, shard: Shard | None = None, join: bool = False) -> "Sharing":
        """What the options `--shard` and `--join`, or a launcher, ask for. Joins the ranks of a launcher.

        Errors: `RecipeError` for what is no shard, and for options that do not go together.
        """
        output = Path(output)
        join_ranks()
        if shard is None and not join:
            mode: Literal["ranks", "alone"] = "ranks" if world_size() > 1 else "alone"
            return Sharing(verb, output, mode, rank(), world_size(), patient_ranks())
        if shard is not None and join:
            raise RecipeError("a shard that joins", fix="give --join by itself, when all shards have ended")
        if world_size() > 1:
            raise RecipeError(
                f"{'--join' if join else '--shard'} under a launcher of {world_size()} ranks",
                fix="start it without the launcher; or leave the option out, and the ranks share the work",
            )
        return Sharing(verb, output, "join") if shard is None else Sharing(verb, output, "shard", *_parsed(shard))

    @property
    def note(self) -> Path:
        return self.output.with_name(f"{self.output.name}.shards.json")

    @property
    def name(self) -> str:
        """A name that no other process of this work has: 0 for one process, else the rank's number or the shard's."""
        return f"{self.index}-of-{self.count}" if self.mode == "shard" else str(self.index)

    @property
    def ends(self) -> bool:
        """Whether this process, or with it the first rank, ends the work."""
        return self.mode != "shard"

    @contextmanager
    def claim(self, *more: Path) -> Iterator[None]:
        """Claim the output (and more): shards share it, and each has its own number for itself. Errors: those of
        `claimed`."""
        with lost_ranks(), ExitStack() as claims:

            def act() -> None:
                shared = self.mode == "shard"
                named = f"{self.verb} --shard {self.index}/{self.count}" if shared else self.verb
                for place in (self.output, *more):
                    claims.enter_context(claimed(place, named, shared=shared))
                if shared:
                    claims.enter_context(claimed(self._place(self.index), named))

            self.first(act)
            yield

    def _place(self, index: int) -> Path:
        return self.output.with_name(f"{self.output.name}.shard-{index}-of-{self.count}")

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Let the first shard leave the note, and compare with it. `facts`: all that the parts depend on, for JSON.

        Errors: `CheckpointError` naming what differs, for a shard or a join of another work.
        """
        if self.mode not in ("shard", "join"):
            return
        refuse_foreign_file(self.note, '"shards":')
        mine = json.loads(json.dumps(facts))
        if self.mode == "shard":
            with atomic_file(self.note, replace=False) as file:
                json.dump({"shards": self.count, "facts": mine}, file, ensure_ascii=False)
        elif not self.note.exists():
            return
        known = read_json(self.note, CheckpointError, fix=f"delete {self.note}; finished parts stay")
        if different := list(_differing(known.get("facts"), mine)):
            raise CheckpointError(
                f"its shards were begun with another {', '.join(different[:5])}",
                where=self.output,
                fix="give the files, options and model that they were begun with, or choose another output",
            )
        if self.mode == "shard" and known.get("shards") != self.count:
            raise CheckpointError(
                f"this was begun in {known.get('shards')} shards, not in {self.count}",
                where=self.output,
                fix=f"give --shard I/{known.get('shards')}; or delete {self.note} to share what is left anew (finished "
                "parts stay)",
            )

    def share(self, parts: Iterable[int], done: Collection[int]) -> list[int]:
        """Those of the parts that this process makes, rising. On ranks a collective."""
        if self.mode == "join":
            return []
        if self.mode == "shard":
            return [part for part in parts if part % self.count == self.index and part not in done]
        return self.first(lambda: [part for part in parts if part not in done])[self.index :: self.count]

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives on the first rank, for all of them. What one process does is done as it is."""
        return on_first_rank(act, self.group)

    def every(self, act: Callable[[], T]) -> T:
        """What `act` gives on this rank, once all ranks are through; an error of one is an error on all."""
        return on_every_rank(act, self.verb, "see what it said; the same command goes on", self.group)

    def refuse_unbegun(self) -> NoReturn:
        """Errors: `CheckpointError`: there is nothing to join."""
        raise CheckpointError(
            "no shard has begun this",
            where=self.output,
            fix="give the command with --shard 0/2 and with --shard 1/2 first (or more); or without --shard and --join",
        )

    def refuse_missing(self, missing: Collection[int], total: int) -> None:
        """Errors: `CheckpointError` for parts that are not there when the work is to be ended, naming their shards."""
        if not missing:
            return
        what = f"{len(missing)} of {total} parts are not there"
        if self.mode == "ranks":
            fix = "name an output on a disk that all machines share, then run the same command again"
            raise CheckpointError(f"{what}; another rank wrote them elsewhere", where=self.output, fix=fix)
        count = read_json(self.note, CheckpointError)["shards"] if self.note.exists() else 1
        names = ", ".join(f"{index}/{count}" for index in sorted({part % count for part in missing}))
        raise CheckpointError(
            f"{what}: those of shard {names}",
            where=self.output,
            fix=f"give the command with --shard {names} again, if there are several each by itself; or without --shard "
            "and --join, which makes here what is missing and ends the work",
        )

    def meet(self, mark: Path) -> None:
        """Shards: leave a mark that this one is through with a step, and wait for those of all others, as long as those
        that lack it are at work. Errors: `OthersFirstError` where one is not."""
        if self.mode != "shard":
            return
        marks = [mark.with_name(f"{mark.name}-{n}-of-{self.count}") for n in range(self.count)]
        with atomic_file(marks[self.index]):
            pass
        told = False
        while missing := [n for n, other in enumerate(marks) if not other.exists()]:
            if absent := [n for n in missing if not is_claimed(self._place(n)) and not marks[n].exists()]:
                names = ", ".join(f"{n}/{self.count}" for n in absent)
                raise OthersFirstError(
                    f"this shard has encoded its share; what comes next needs those of shard {names}, which are not at "
                    "work",
                    where=self.output,
                    fix="start these; when they have ended, give the commands of all shards again",
                )
            if not told:
                log.info("waiting for the vectors of shard %s", ", ".join(f"{n}/{self.count}" for n in missing))
                told = True
            time.sleep(_LOOK)

    def tell(self, parts: int) -> None:
        """Say that this shard has made its share of so many parts."""
        log.info(
            "shard %d/%d: its %s of %s parts are done; when those of all shards are, the same command with --join in "
            "place of --shard ends the work",
            self.index,
            self.count,
            f"{len(range(self.index, parts, self.count)):,}",
            f"{parts:,}",
        )

    def end(self) -> None:
        """The work is ended: the note of its shards goes."""
        self.note.unlink(missing_ok=True)


def _parsed(shard: Shard) -> tuple[int, int]:
    expected = "I/N with I from 0 to N - 1: 0/4, 1/4, 2/4 and 3/4 (for Slurm: --array=0-3)"
    if isinstance(shard, str):
        found = re.fullmatch(r"(\d+)/(\d+)", shard)
        index, count = map(int, found.groups()) if found else (0, 0)
    else:
        index, count = shard
    if not 0 <= index < count:
        raise RecipeError(f"the shard {shard!r}", expected=expected)
    return index, count


def _differing(known: Any, mine: Any, name: str = "") -> Iterator[str]:
    """The names of the entries in which two trees differ."""
    if known == mine:
        return
    if isinstance(known, dict) and isinstance(mine, dict):
        for key in {**known, **mine}:
            yield from _differing(known.get(key), mine.get(key), f"{name}.{key}" if name else key)
    else:
        yield name
