"""What an operation gets and gives: the fields, the fds (closed for it unless taken), and the fds of the reply."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from shim.supervisor.logs import Logs
from shim.supervisor.table import Core


@dataclass(slots=True)
class Request:
    body: dict[str, Any]
    fds: list[int]
    taken: set[int] = field(default_factory=set)
    lent: dict[str, int] = field(default_factory=dict)  # fds of the reply, that stay the supervisor's
    given: dict[str, int] = field(default_factory=dict)  # fds of the reply, closed once it is sent

    @property
    def id(self) -> str:
        name: str = self.body["id"]
        return name

    def take(self, index: int) -> int:
        """Keep a request's fd."""
        fd = self.fds[index]
        self.taken.add(fd)
        return fd

    def close(self) -> None:
        for fd in (*(fd for fd in self.fds if fd not in self.taken), *self.given.values()):
            os.close(fd)


Handler: TypeAlias = Callable[[Core, Logs, Request], Awaitable[dict[str, Any]]]
