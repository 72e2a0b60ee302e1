"""The command line: a file a group of verbs, and what only the command line needs. The top floor of the house."""

from embedsmith.cli.app import app, main

__all__ = ["app", "main"]
