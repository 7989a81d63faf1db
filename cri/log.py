"""Log lines on standard error, as ``key=value`` text or as JSON. Structured fields: ``log.info("…", extra={"fields": {…}})``."""

from __future__ import annotations

import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar

import msgspec

#: Id of the RPC that the current task serves; empty outside of one. Lines logged while it is set carry it.
request_id: ContextVar[str] = ContextVar("request_id", default="")

Render = Callable[[float, str, str, Mapping[str, object]], str]

_PLAIN = re.compile(r"[\w./:@+,%\[\]-]+")


def setup(level: str, form: str) -> None:
    """Sends everything of this process to standard error. Replaces what was there."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(RENDER[form]))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("grpc", "asyncio"):
        # At debug level they write a line per call of their own.
        logging.getLogger(chatty).setLevel(logging.INFO)


def text(when: float, level: str, message: str, fields: Mapping[str, object]) -> str:
    """One line for people: time, level, message, then ``key=value``; values are quoted where they must be."""
    parts = [_timestamp(when), level.ljust(7), _oneline(message)]
    parts += [f"{key}={_value(value)}" for key, value in fields.items() if value != ""]
    return " ".join(parts)


def json(when: float, level: str, message: str, fields: Mapping[str, object]) -> str:
    """One JSON object; empty fields are left out."""
    line: dict[str, object] = {"time": _timestamp(when), "level": level.lower(), "message": _clean(message)}
    line.update({k: _clean(v) if isinstance(v, str) else v for k, v in fields.items() if v != ""})
    return msgspec.json.encode(line, enc_hook=str).decode()


RENDER: dict[str, Render] = {"text": text, "json": json}


class _Formatter(logging.Formatter):
    def __init__(self, render: Render) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {"logger": record.name, "request": request_id.get()}
        fields.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1]:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return self._render(record.created, record.levelname, record.getMessage(), fields)


def _timestamp(when: float) -> str:
    whole = int(when)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((when - whole) * 1e6):06d}Z"


def _value(value: object) -> str:
    word = f"{value:.3f}" if isinstance(value, float) else str(value)
    return word if _PLAIN.fullmatch(word) else f'"{_oneline(word)}"'


def _oneline(word: str) -> str:
    """Nothing that a client sends may start a line of its own or move a terminal's cursor."""
    if word.isprintable() and '"' not in word and "\\" not in word:
        return word
    return "".join(c if c.isprintable() and c not in '"\\' else c.encode("unicode_escape").decode() if c != '"' else '\\"' for c in word)


def _clean(word: str) -> str:
    return word.encode("utf-8", "backslashreplace").decode()
