"""The store's small files: whole or not at all, read back defensively."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


def write(path: Path, data: bytes) -> None:
    """Replace ``path``. Not fsynced: what a power cut may leave is caught when it is read (see snapshots.py)."""
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write(path, msgspec.json.encode(value))


def read_json(path: Path, kind: type[T]) -> T | None:
    """The value, or None when there is no such file or it is not one of ours any more (cut short by a power failure)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
