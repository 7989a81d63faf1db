"""What the supervisor knows: pods, containers and exec sessions, and the records from which a successor adopts them.

Facts only. A container is creating while it has no ``user``, created until ``started_at``, running until ``exit``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shim import cgroups
from shim.cgroups import oom
from shim.errors import Failure
from shim.linux import path
from shim.oci.bundle import ExitRecord
from shim.runtime.context import Context, PodHandles
from shim.supervisor.agents import Agents, Program
from shim.supervisor.children import Children, Job, Line, Process
from shim.supervisor.loop import Future, Loop, Task

RECORD = "runtime.json"
RECORD_VERSION = 1


@dataclass(slots=True, eq=False)
class Pod:
    id: str
    directory: int  # fd
    fds: dict[str, int] = field(default_factory=dict)  # namespaces by name
    init: Process | None = None  # PID 1 of a shared PID namespace
    starttime: int = 0
    group: cgroups.Group | None = None  # of PID 1
    ready: bool = False

    def handles(self) -> PodHandles:
        if "mount" not in self.fds:
            raise Failure("pod", path=self.id, message="its namespaces are gone", hint="remove the pod and run it again")
        return PodHandles.from_fds(self.fds)

    @property
    def pid(self) -> int:
        return self.init.pid if self.init is not None else 0

    def facts(self) -> dict[str, Any]:
        """For the daemon."""
        return {"id": self.id, "pid": self.pid, "starttime": self.starttime, "ready": self.ready}

    def record(self, boot_id: str) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "boot_id": boot_id,
            "pid": self.pid,
            "starttime": self.starttime,
            "names": sorted(self.fds),
            "cgroup": self.group.to_json() if self.group else None,
        }

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        if self.init is not None:
            self.init.close()
        os.close(self.directory)


@dataclass(slots=True, eq=False)
class Container:
    id: str
    pod: str
    bundle: int  # directory fd
    path: str
    tty: bool
    stdin: bool
    stdin_once: bool
    log_path: str
    over: Future[None]  # done when the exit has been recorded and reported
    ends: dict[str, int] = field(default_factory=dict)  # our ends of its FIFOs, and "console"
    job: Job | None = None  # until there is a process, whose place it takes
    line: Line | None = None  # until the program runs
    slot: int | None = None  # of the process that will be forked at start
    process: Process | None = None
    starttime: int = 0
    pinned: bool = False  # its launch has bound its pidfd, see ``shim.runtime.pins``
    own_pids: bool = False  # has a PID namespace of its own, so that its first process takes all others with it
    user: dict[str, Any] | None = None
    hooks: tuple[str, ...] = ()
    group: cgroups.Group | None = None
    group_fd: int | None = None
    programs: dict[tuple[str, frozenset[int]], Program] = field(default_factory=dict)  # of exec sessions, see ``agents``
    oom: oom.OomWatch | None = None
    oom_kills: int = 0
    kills_before: int | None = None  # in the slice of its scope, when it was created
    started_at: int = 0  # ns since the epoch
    exit: ExitRecord | None = None
    starting: Future[None] | None = None
    launch: Future[None] | None = None  # done when create has ended, either way
    start_error: Failure | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def record(self, boot_id: str) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "boot_id": boot_id,
            "pod": self.pod,
            "pid": self.pid,
            "starttime": self.starttime,
            "own_pids": self.own_pids,
            "tty": self.tty,
            "stdin": self.stdin,
            "stdin_once": self.stdin_once,
            "log_path": self.log_path,
            "user": self.user,
            "hooks": self.hooks,
            "cgroup": self.group.to_json() if self.group else None,
            "started_at": self.started_at,
            "kills_before": self.kills_before,
        }

    def close(self) -> None:
        """Everything that is held of it."""
        if self.line is not None:
            self.line.close()
            self.line = None
        if self.job is not None:
            self.job.close()
            self.job = None
        if self.process is not None:
            self.process.close()
        for fd in self.ends.values():
            os.close(fd)
        self.ends.clear()
        if self.group_fd is not None:
            os.close(self.group_fd)
            self.group_fd = None
        for program in self.programs.values():
            os.close(program.fd)
        self.programs.clear()
        os.close(self.bundle)


@dataclass(slots=True, eq=False)
class Session:
    """An exec'd process."""

    id: str
    container: Container
    process: Process
    console: int | None = None


class Table:
    """Look-ups that raise what the caller's caller reads."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.containers: dict[str, Container] = {}
        self.sessions: dict[str, Session] = {}
        self.kills_above: dict[str, int] = {}  # OOM kills in a slice with containers of ours, as far as they are accounted for
        self.deleting: dict[Any, Task[None]] = {}  # by object: a second delete joins the first

    def pod(self, name: str) -> Pod:
        pod = self.pods.get(name)
        if pod is None or not pod.ready:
            raise Failure("pod", path=name, message="unknown to the supervisor")
        return pod

    def container(self, name: str) -> Container:
        container = self.containers.get(name)
        if container is None:
            raise Failure("container", path=name, message="unknown to the supervisor")
        return container

    def running(self, name: str) -> Container:
        container = self.container(name)
        if container.process is None or not container.started_at or container.exit is not None:
            raise Failure("container", path=name, message="is not running")
        return container

    def session(self, name: str) -> Session:
        session = self.sessions.get(name)
        if session is None:
            raise Failure("exec", path=name, message="has ended")
        return session


@dataclass(frozen=True, slots=True)
class Core:
    """What the operations work on."""

    loop: Loop
    children: Children
    context: Context
    table: Table
    state: int  # fd of the state directory
    state_path: str
    boot_id: str
    build: str  # what version of the program this is
    lock: int  # fd, of the state directory
    listener: int  # fd of the socket that daemons connect to
    agents: Agents
    publish: Callable[[dict[str, Any]], None]  # an event to the daemon
    log: Callable[[str], None]


def save(core: Core, directory: int, subject: Pod | Container) -> None:
    """Write the adoption record; ``state`` is a tmpfs, so this does not block."""
    path.write_atomic(directory, RECORD, json.dumps(subject.record(core.boot_id), separators=(",", ":")).encode())


def forget(directory: int) -> None:
    try:
        os.unlink(RECORD, dir_fd=directory)
    except FileNotFoundError:
        return
