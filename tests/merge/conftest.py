"""Fixtures of this room."""

from tests.merge.fixtures import folders

__all__ = ["folders"]
