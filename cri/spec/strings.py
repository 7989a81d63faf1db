"""Checks of strings that a client or an image chose. Every refusal is InvalidArgument and names the field.

CVE-2022-4318, CVE-2022-0811 and their kin are one bug: a separator in a value that later becomes a line, a list item or a path.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping

from cri.errors import InvalidArgument

# Also what str.splitlines() takes for the end of a line: next line, line separator, paragraph separator.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def text(value: str, field: str) -> str:
    """What can be an argument or a value of execve(2): no NUL, no lone surrogate."""
    if "\0" in value:
        raise InvalidArgument("contains a NUL", field=field)
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidArgument("is not valid Unicode", field=field)
    return value


def texts(values: Iterable[str], field: str) -> tuple[str, ...]:
    """``text`` for each."""
    return tuple(text(value, f"{field}[{i}]") for i, value in enumerate(values))


def line(value: str, field: str) -> str:
    """What can be part of a line of a file: no control characters."""
    text(value, field)
    if _CONTROL.search(value):
        raise InvalidArgument("contains a newline or another control character", field=field)
    return value


def word(value: str, field: str) -> str:
    """A line without white space, and not empty."""
    line(value, field)
    if not value or any(c.isspace() for c in value):
        raise InvalidArgument("is empty or contains white space", field=field)
    return value


def absolute(value: str, field: str) -> str:
    """An absolute path, cleaned."""
    line(value, field)
    if not value.startswith("/"):
        raise InvalidArgument(f"{value!r:.200} is not an absolute path", field=field)
    return clean(value)


def clean(path: str) -> str:
    """An absolute path without ``.``, ``..``, doubled and trailing slashes."""
    return posixpath.normpath("/" + path.lstrip("/"))  # normpath alone keeps a leading "//", as POSIX allows


def string_map(values: Mapping[str, str], field: str) -> dict[str, str]:
    """A map of strings for JSON."""
    return {text(key, field): text(value, f"{field}[{key!r:.80}]") for key, value in values.items()}
