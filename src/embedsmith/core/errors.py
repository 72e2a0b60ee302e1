"""The error tree. A message says where, what came, what was expected, and what to do about it.
Secrets are left out of it, whoever put them there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedsmith.core.text_out import without_secrets


class EmbedsmithError(Exception):
    """Base of every error a user can cause or meet. The CLI prints it without a traceback and exits with 1."""

    def __init__(self, what: str, *, where: object = None, expected: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        message = what if where is None else f"{where}: {what}"
        message += "" if expected is None else f"\n  expected: {expected}"
        message += "" if fix is None else f"\n  to fix: {fix}"
        super().__init__(without_secrets(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of other processes arrive as they were raised, whatever their class is made of."""
        return _as_raised, (type(self), self.args, vars(self))


def _as_raised(cls: type[EmbedsmithError], said: tuple[str], parts: dict[str, Any]) -> EmbedsmithError:
    error = cls.__new__(cls, *said)
    error.__dict__.update(parts)
    return error


class RecipeError(EmbedsmithError, ValueError):
    """A recipe, an override or a component's arguments are wrong."""


class DataError(EmbedsmithError):
    """A data file or a row in it is wrong; `where` names the file and the line."""


class ModelError(EmbedsmithError):
    """A model folder or id cannot be loaded, or cannot do what is asked of it."""


class DeviceMemoryError(ModelError):
    """A device has too little memory for the least that can be computed at once."""


class CheckpointError(EmbedsmithError):
    """A checkpoint or an output folder is incomplete, incompatible or cannot be written."""


class TrainingError(EmbedsmithError):
    """Training cannot go on: a value that is not finite, ranks that disagree."""


class SearchError(EmbedsmithError):
    """Vectors that cannot be compared, or an index that cannot be read."""


class EvaluationError(EmbedsmithError):
    """An evaluation task is unknown or cannot be scored."""


class EngineError(EmbedsmithError):
    """What the work is divided among (processes, a Ray cluster) cannot be reached, or lost a worker for good."""


class MissingExtraError(EmbedsmithError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}", fix=f'pip install "embedsmith[{extra}]"')


@contextmanager
def foreign_errors(what: str, where: object) -> Iterator[None]:
    """Around what transformers, tokenizers or a folder's own code make of files: they raise anything, and the native
    code of tokenizers a panic that is no `Exception`. Errors: `ModelError` in place of all that."""
    try:
        yield
    except EmbedsmithError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= 500 else f"{said[:500]}…"
        raise ModelError(f"{what}: {said}", where=where, fix="copy or download the folder again, as a whole") from error
