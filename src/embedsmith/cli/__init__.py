"""The command line: every verb of the shelf as a command.

The tree's own verbs are light: each imports its room inside the function, so that `--help` costs no torch. A verb of a
user's package is looked for when it is called, so that installed packages do not slow down the others.
"""

import inspect
import io
import logging
import os
import sys
import traceback
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from embedsmith.cli.verbs import say
from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.settings import did_you_mean
from embedsmith.core.shelf import Entry, verbs
from embedsmith.core.text_out import PrintableLines, printable, without_secrets


class Verbs(TyperGroup):
    """The verbs of the tree, and of users' packages where the tree has none of that name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            if name not in verbs.names():
                ctx.fail(f"No such command {name!r}{did_you_mean(name, verbs.names())}.")
            self.add_command(command(verbs.entry(name)), name)
        if "" in args:  # a shell's unset variable; as a path it would be the current folder
            ctx.fail(
                f"Argument {args.index('')} of {name} is empty. Name a file, a folder (the current one is .) or text."
            )
        if name in _OF_ONE and "WORLD_SIZE" in os.environ:
            from embedsmith.core.collectives import refuse_launcher

            refuse_launcher(name, f"start it once, without the launcher, which is for {', '.join(_OF_SEVERAL)}")
        return super().resolve_command(ctx, args)


_HELP = {"help_option_names": ["-h", "--help"]}


def command(entry: Entry[Any]) -> Any:
    """A function on the shelf as a command by itself."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    _add(alone, entry)
    return typer.main.get_command(alone)


def _add(to: typer.Typer, entry: Entry[Any]) -> None:
    """A verb's help is its docstring; a last paragraph `Example: embedsmith ...` stands below its options, in one
    line however long, so that it can be copied."""
    text, _, example = inspect.cleandoc(entry.thing.__doc__ or "").partition("\n\nExample: ")
    epilog = f"\b\nExample:\n  {' '.join(example.split())}" if example else None
    to.command(entry.name, help=text, epilog=epilog, context_settings=_HELP)(entry.thing)


app = typer.Typer(
    name="embedsmith",
    cls=Verbs,
    help="Make a text-embedding model from start to finish.",
    no_args_is_help=True,
    context_settings=_HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around the help would double what it costs to show it
)
_OF_SEVERAL = ("train", "tokenize", "mine", "encode", "index", "evaluate", "run")
"""Verbs that share their work among the ranks of a launcher."""
_OF_ONE = set()
for _entry in verbs.entries(plugins=False):
    _add(app, _entry)
    _OF_ONE |= {_entry.name} - set(_OF_SEVERAL)


def _version(wanted: bool) -> None:
    if wanted:
        from embedsmith import __version__

        say(f"embedsmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make a text-embedding model from start to finish."""


def main() -> None:
    """Run the command line; an error a user can cause is one message and exit code 1, an interrupt exits with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal's encoding lacks is no reason to end
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableLines("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("embedsmith").setLevel(logging.INFO)
    sys.excepthook = _show_failure
    try:
        app()
    except EmbedsmithError as error:
        _end(error)
    except Exception as error:
        from embedsmith.core.files import full_disk

        if (full := full_disk(error)) is None:
            raise
        _end(full)


def _show_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A failure of the program itself, whose traceback may hold anything."""
    sys.stderr.write(printable(without_secrets("".join(traceback.format_exception(kind, error, trace)))))


def _end(error: EmbedsmithError) -> NoReturn:
    typer.secho(f"error: {printable(error)}", fg=typer.colors.RED, err=True)
    sys.exit(1)
