"""The verbs of the command line, a file a group. Rooms are imported inside the functions, so that `--help` costs no
torch; what they print passes through `print_table` and `say`."""

import os
import sys
from typing import Annotated, Any

import typer

from embedsmith.core.errors import ModelError
from embedsmith.core.text_out import printable

# How a model is read, wherever the command line names one.

Pooling = Annotated[
    str | None, typer.Option(help="How token states become a vector, where the folder does not say: mean, cls, last.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "--prompts", help="Text before every text of a role: 'query=query: '")
]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens a text is cut to.")]

Backend = Annotated[
    str | None, typer.Option(help="What computes: torch, or a folder's graph on onnx or openvino (see export).")
]


def _use(device: str | None) -> str | None:
    if device is not None:
        from embedsmith.core.device import use_device

        use_device(device)
    return device


Device = Annotated[
    str | None,
    typer.Option(callback=_use, help="cpu, cuda, cuda:1 (or 1) or mps; by default a GPU where there is one."),
]
"""Where everything runs: its callback has seen to it before the verb begins."""


ShardOf = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Make only this share of the work, counted from 0: 0/4.")
]
Join = Annotated[bool, typer.Option("--join", help="End the work of shards, when all of them are done.")]


def model_options(
    pooling: str | None, prompts: list[str] | None, max_length: int | None, backend: str | None = None
) -> dict[str, Any]:
    """These options as `embedsmith.load` has them; what was not given is left out. Errors: `ModelError`."""
    if wrong := [text for text in prompts or () if not text.partition("=")[1]]:
        raise ModelError(f"--prompt {wrong[0]!r}", expected="ROLE=TEXT, such as --prompt 'query=query: '")
    given: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "backend": backend}
    given["prompts"] = dict(text.split("=", 1) for text in prompts) if prompts else None
    return {name: value for name, value in given.items() if value is not None}


def print_table(what: Any, **options: Any) -> None:
    """Print a table or another thing of rich on the terminal."""
    from embedsmith.core.terminal import show

    show(what, **options)


def first_rank() -> bool:
    """Whether this process prints: of a launcher's ranks the first."""
    return os.environ.get("RANK", "0") == "0"


def say(text: object) -> None:
    """Print a line."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()
