"""Text from outside on its way out: control characters are made visible, and secrets are left out.

Imported by the errors, and so by `--help`: nothing heavy.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

_HIDDEN = "***"
_SHORTEST_SECRET = 6
"""Shorter ones could be any word of a message."""

_CONTROLS = (
    *(code for code in range(0x20) if code not in (0x09, 0x0A)),
    *range(0x7F, 0xA0),
    0x061C,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)
"""C0 but tab and line feed, DEL and C1, bidi marks that turn text around, and lone surrogates, which no terminal can
be sent."""
_SHOWN = {code: f"\\u{code:04x}" for code in _CONTROLS}

_secrets: set[str] = set()


def printable(text: object) -> str:
    """The text as a terminal may get it: control characters as `\\u001b`, so that JSON stays the same JSON."""
    return str(text).translate(_SHOWN)


def remember_secret(value: str) -> str:
    """The value, which `without_secrets` leaves out from now on."""
    if len(value) >= _SHORTEST_SECRET:
        _secrets.add(value)
    return value


_SECRET_NAME = re.compile(r"(?:^|[_-])(?:api)?(?:key|token|secret|passw(?:or)?d|auth(?:orization)?)$", re.IGNORECASE)


def remember_secrets_in(tree: Mapping[str, Any]) -> None:
    """Remember the texts whose names say that they are secrets: `api_key`, `Authorization`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            remember_secrets_in(value)
        elif isinstance(value, str) and _SECRET_NAME.search(str(name)):
            remember_secret(value)


_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(r"([?&][\w.-]*(?:key|token|secret|passw(?:or)?d|signature|credential)=)[^&\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text without the secrets that were remembered, and without users, passwords and keys of addresses."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1{_HIDDEN}", _USER.sub(_HIDDEN, text))
    return text


class PrintableLines(logging.Formatter):
    """Log lines as a terminal may get them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().format(record)))
