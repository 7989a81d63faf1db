"""What the supervisor answers with: plain facts about pods, containers and exec sessions, and the fds that come along."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from shim.oci.bundle import ExitRecord
from shim.oci.spec import User


@dataclass(frozen=True, slots=True)
class PodHandles:
    pid: int  # PID 1 of a shared PID namespace, else 0
    netlink: int | None  # a rtnetlink socket in the pod's network namespace, the caller's to close


@dataclass(frozen=True, slots=True)
class Created:
    pid: int  # 0 where the process is forked at start (shared PID namespaces)
    user: User


@dataclass(frozen=True, slots=True)
class Started:
    pid: int
    started_at: int  # ns since the epoch


@dataclass(frozen=True, slots=True)
class PodFacts:
    pid: int  # of PID 1, 0 without one
    starttime: int
    ready: bool  # False: its namespaces are gone

    @classmethod
    def from_hello(cls, fields: dict[str, Any]) -> PodFacts:
        return cls(fields["pid"], fields["starttime"], fields["ready"])


@dataclass(slots=True)
class ContainerFacts:
    pod: str
    pid: int
    starttime: int
    started_at: int
    tty: bool = False
    user: User = field(default_factory=User)
    exit: ExitRecord | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the supervisor has, for recovery."""

    pods: dict[str, PodFacts]
    containers: dict[str, ContainerFacts]


@dataclass(slots=True, eq=False)
class ExecSession:
    """A running exec'd process. ``exited`` gives its exit code (128 + n after signal n); ``console`` is the caller's to close."""

    id: str
    container: str
    pid: int
    pidfd: int
    console: int | None
    exited: asyncio.Future[int]
