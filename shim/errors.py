"""The one error type that crosses process boundaries below the gRPC edge."""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

_LONGEST = 1000  # characters of a path or message that cross a process boundary: an error must fit into one datagram


def _clipped(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]}… ({len(value)} characters)"
    return value


class Failure(Exception):
    """Something the kernel or the runtime core refused, with where and why.

    ``phase`` is what was being attempted ("create container"), ``operation`` the step ("mount", "openat2", "exec"), ``errno`` the
    kernel's number or None, ``path`` what it was about, ``message`` anything more, ``hint`` what a person can do. Reads as
    ``create container: mount /proc: EPERM (Operation not permitted)``. Secrets never get in: build it from redacted strings.
    """

    def __init__(
        self, phase: str, operation: str = "", *, errno: int | None = None, path: str = "", message: str = "", hint: str = ""
    ) -> None:
        super().__init__(phase, operation, errno, path, message, hint)
        self.phase, self.operation, self.errno, self.path, self.message, self.hint = phase, operation, errno, path, message, hint

    def __str__(self) -> str:
        step = " ".join(p for p in (self.operation, self.path) if p)
        why = self.message
        if self.errno is not None:
            name = f"{_errno.errorcode.get(self.errno, self.errno)} ({os.strerror(self.errno)})"
            why = f"{name}: {why}" if why else name
        text = ": ".join(p for p in (self.phase, step, why) if p)
        return f"{text} (hint: {self.hint})" if self.hint else text

    @classmethod
    def wrap(cls, phase: str, operation: str, error: OSError, path: str = "") -> Failure:
        """The Failure for an OSError raised by a system call wrapper."""
        name = error.filename if isinstance(error.filename, str) else ""
        return cls(phase, operation, errno=error.errno, path=path or name)

    def to_json(self) -> dict[str, Any]:
        """Fields that are set, for the wire."""
        fields = {
            "phase": self.phase,
            "operation": self.operation,
            "errno": self.errno,
            "path": self.path,
            "message": self.message,
            "hint": self.hint,
        }
        return {k: _clipped(v) for k, v in fields.items() if v not in ("", None)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Failure:
        """The inverse of ``to_json``; unknown fields of a newer peer are ignored."""
        known = {k: fields[k] for k in ("operation", "errno", "path", "message", "hint") if k in fields}
        return cls(str(fields.get("phase", "runtime")), **known)
