"""Addresses of servers and keys for them: a key comes from the environment, and is never shown or written."""

import os
import re
from urllib.parse import urlsplit

from embedsmith.core.errors import EmbedsmithError, RecipeError
from embedsmith.core.text_out import remember_secret, without_secrets


def checked_variable(variable: str | None, name: str) -> str | None:
    """The name of an environment variable; `name` is what the setting is called.

    Errors: `RecipeError` for anything else, which may be the key itself and is not repeated.
    """
    if variable is not None and (not re.fullmatch(r"[A-Za-z_]\w*", variable) or variable.startswith("hf_")):
        remember_secret(variable)
        raise RecipeError(f"{name} is no name of an environment variable", fix="put the key into one, and name that")
    return variable


def key_from(variable: str | None, error: type[EmbedsmithError] = RecipeError) -> str | None:
    """The key in an environment variable, without white space around it; `None` for no variable.

    Errors: `error` where it is not set, or holds what no header can carry. The key is in no message.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise error(f"the environment variable {variable} is not set", fix=f"export {variable}=KEY")
    remember_secret(key)
    if not (key.isascii() and key.isprintable()):
        raise error(
            f"the environment variable {variable} holds line breaks or signs that are not ASCII",
            expected="a key of one line",
            fix="put the server's key in it, and nothing else",
        )
    return key


def checked_address(address: str, name: str) -> str:
    """An http address; `name` is what the setting is called.

    Errors: `RecipeError` for another, and for one with a user, a password or a query: they would not be sent, but
    written into reports.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise RecipeError(f"{name} is {address!r}", expected="an address such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(
            f"{name} is {without_secrets(address)!r}, with more than a server and a path",
            expected="an address without user, password and ?key=...",
            fix="put the key into an environment variable, and name that one",
        )
    return address
