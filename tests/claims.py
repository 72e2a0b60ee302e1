"""Whether an output is claimed while it is made: another process that wants it is refused then."""

from pathlib import Path

from embedsmith.core import outputs


def watch_claims(monkeypatch, module, output, name):
    """A list that gets, for each call of the function `name` of `module`, whether `output` was claimed."""
    seen, real = [], getattr(module, name)

    def watched(*given, **options):
        seen.append(Path(output).resolve() in outputs._held)
        return real(*given, **options)

    monkeypatch.setattr(module, name, watched)
    return seen
