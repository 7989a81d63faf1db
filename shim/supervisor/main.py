"""The supervisor's start: become independent of the daemon, warm up everything a child will need, adopt, serve.

Run by ``shim.client`` as ``python -I -S -c … <json>`` from a read-only clone of the interpreter.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from shim import cgroups
from shim.cgroups.names import is_scope
from shim.errors import Failure
from shim.linux import libc, process
from shim.oci import codec
from shim.oci.bundle import ExitRecord, Recipe
from shim.oci.sandbox import Sandbox
from shim.oci.spec import Process, Resources, Spec
from shim.rootfs import lean
from shim.runtime import bare, pins
from shim.runtime.channel import Channel
from shim.runtime.context import Context
from shim.runtime.launch import Job
from shim.runtime.slots import PidSlots
from shim.supervisor import adopt, place, upgrade
from shim.supervisor.agents import Agents
from shim.supervisor.children import Children, watch_signals
from shim.supervisor.helpers import Helpers
from shim.supervisor.logs import Logs
from shim.supervisor.loop import Loop
from shim.supervisor.server import Server
from shim.supervisor.table import Core, Table

_OOM_SCORE = -999  # the kernel takes us last but one: -1000 would exempt us, and then children that forget to reset it
_LOG_LIMIT = 1 << 20  # bytes of supervisor.log
_NR_SIGNALFD4 = 289 if libc.MACHINE == "x86_64" else 74
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1)
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True, slots=True)
class Settings:
    state: str
    runtime_cgroup: str  # "" leaves us where we are
    socket: int  # fd of the first connection
    files: tuple[int, int]  # RLIMIT_NOFILE for containers: the daemon that starts us may have raised its own
    systemd: str = ""  # directory with the library that the systemd cgroup driver takes
    build: str = ""  # what this version is, for the daemon to compare
    preflight: bool = False  # read the records and exit
    handed: int = -1  # memfd of ``upgrade``: fds that an earlier version of this very process left open

    @classmethod
    def parse(cls, text: str) -> Settings:
        fields: dict[str, Any] = json.loads(text)
        soft, hard = fields["files"]
        more = {name: fields[name] for name in ("build", "preflight", "handed", "systemd") if name in fields}
        return cls(str(fields["state"]), str(fields["runtime_cgroup"]), int(fields["socket"]), (int(soft), int(hard)), **more)


def log(message: str) -> None:
    """To supervisor.log, which stderr is; a tmpfs, and bounded."""
    now = time.time()
    year, month, day, hour, minute, second = time.gmtime(now)[:6]
    stamp = f"{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{int(now % 1 * 1000):03}Z"
    try:
        if os.fstat(2).st_size > _LOG_LIMIT:
            os.ftruncate(2, 0)
        os.write(2, f"{stamp} {message}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return  # there is nowhere left to say it


class Lean:
    """The job that makes the lean mount namespace."""

    keep: tuple[int, ...] = ()

    def __call__(self, channel: Channel) -> None:
        channel.send({"ok": {"fds": ["lean"]}}, (lean.lean_namespace(),))


def main() -> None:
    """Never returns normally before a shutdown. A start that fails is told on the first connection."""
    settings = Settings.parse(sys.argv[1])
    if settings.preflight:
        adopt.check(settings.state)
        return
    first = socket.socket(fileno=settings.socket) if settings.socket >= 0 else None
    if first is not None:
        first.set_inheritable(False)  # it came to us through execve, and must not outlive an upgrade
    try:
        core = prepare(settings, first)
    except (Failure, OSError) as error:
        failure = error if isinstance(error, Failure) else Failure.wrap("start supervisor", "system call", error)
        log(str(failure))
        if first is not None:
            first.send(json.dumps({"event": "fatal", "error": failure.to_json()}).encode())
        sys.exit(1)
    core.loop.run()
    if core.context.pins is not None and not core.table.containers:
        pins.close(core.state_path)


def prepare(settings: Settings, first: socket.socket | None) -> Core:
    """Everything up to the first request."""
    libc.prlimit(0, 7, settings.files)
    inherited = process.save_inherited()
    signals = take_signals()
    state = os.open(settings.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    handed = upgrade.Handed.read(settings.handed) if settings.handed >= 0 else None
    lock = only_one(state) if handed is None else handed.lock
    verify_interpreter()
    process.locate_title()
    process.set_title("cri-shim: supervisor")
    process.set_dumpable(False)
    process.set_subreaper()
    raise_nofile()
    proc = lean.private_proc()
    score = process.set_oom_score_adj(proc, _OOM_SCORE)
    if score != _OOM_SCORE:
        log(f"oom_score_adj stays {score}: lowering it takes CAP_SYS_RESOURCE")
    layout = cgroups.detect()
    if is_scope(settings.runtime_cgroup):
        use_systemd(settings.systemd)
    if settings.runtime_cgroup:
        place.enter(layout, settings.runtime_cgroup)
    bare.load()
    warm_up()

    loop = Loop()
    slots = PidSlots()
    children = Children(loop, slots)
    children.adopting = True
    watch_signals(loop, signals, lambda number: on_signal(number, loop, children))
    context = Context(
        layout=layout,
        host_mntns=os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC),
        lean_mntns=made(loop, children, Lean(), "lean namespace")["lean"],
        proc=proc,
        pins=made(loop, children, pins.Open(os.path.realpath(settings.state)), "pins namespace").get("pins"),
        seccomp_cache=seccomp_cache(state),
        inherited=inherited,
        slots=slots,
    )
    server, table = Server(loop), Table()
    listener = server.listen(state) if handed is None else handed.listener
    path, agents = os.path.realpath(settings.state), Agents(children, context)
    core = Core(loop, children, context, table, state, path, process.boot_id(), settings.build, lock, listener, agents, server.publish, log)
    logs = Logs(children, table, state, server.publish, log)
    gc.collect()
    gc.freeze()  # forked children then share these pages for good
    logs.start()
    children.helpers = Helpers(children, context)
    adopt.adopt(core, logs)
    if adopt.has_scopes(core) and not is_scope(settings.runtime_cgroup):
        use_systemd(settings.systemd)  # containers of the time before the driver was changed
    if handed is not None:
        handed.give(core)
    children.adopting = False
    children.reap_strays()
    loop.start(adopt.watch_groups(core))
    loop.start(adopt.sweep_pins(core))
    server.open(core, logs)
    if first is not None:
        server.join(first)
    return core


def take_signals() -> int:
    """A signalfd: no handler then interrupts anything. Children get default dispositions and an empty mask back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    mask = sum(1 << (number - 1) for number in _SIGNALS).to_bytes(8, "little")
    return libc.syscall(_NR_SIGNALFD4, -1, mask, 8, os.O_NONBLOCK | os.O_CLOEXEC)


def on_signal(number: int, loop: Loop, children: Children) -> None:
    if number == signal.SIGCHLD:
        children.reap_strays()
    elif number == signal.SIGUSR1:
        for task in list(loop.tasks):
            log(f"task {task.where()}")
    elif number == signal.SIGTERM:
        log("SIGTERM: ending, containers go on")
        loop.stopped = True


def only_one(state: int) -> int:
    """One supervisor per state directory: the lock, an fd, goes with the process."""
    fd = os.open("supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=state)
    deadline = time.monotonic() + 2
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Failure("start supervisor", path="supervisor.lock", message="another supervisor has this state directory") from None
            time.sleep(0.01)  # one that was killed is still being torn down


def verify_interpreter() -> None:
    """CVE-2019-5736: nobody may write to the file we run from, not even by way of /proc/PID/exe.

    While it runs every open for writing is ETXTBSY; an attacker keeps an O_PATH fd and opens that later, and then the mount that the fd
    lies on decides. So that mount has to be read-only.
    """
    fd = os.open("/proc/self/exe", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EROFS, errno.ETXTBSY) and os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            return
    finally:
        os.close(fd)
    raise Failure("start supervisor", "open", path="/proc/self/exe", message="the interpreter could be written to through this path")


def raise_nofile() -> None:
    """Soft to hard; where we may, hard to fs.nr_open: a container costs seven fds here."""
    _, hard = libc.prlimit(0, 7)
    try:
        with open("/proc/sys/fs/nr_open", "rb") as file:
            most = int(file.read())
        libc.prlimit(0, 7, (max(hard, most), max(hard, most)))
    except OSError:
        libc.prlimit(0, 7, (hard, hard))


def warm_up() -> None:
    """Build decoders and run through code that children will use, on samples: they inherit it ready."""
    import shim.runtime.create
    import shim.runtime.exec
    import shim.runtime.hooks  # noqa: F401

    for cls, sample in (
        (Spec, b'{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"args":["a"]},"linux":{"resources":{}}}'),
        (Process, b'{"args":["a"],"user":{}}'),
        (Recipe, b'{"type":"overlay","lower":["/"]}'),
        (Sandbox, b'{"id":"a","namespaces":["network"]}'),
        (Resources, b'{"memory":{"limit":1},"cpu":{"shares":2}}'),
        (ExitRecord, b'{"exitCode":0,"finishedAt":1}'),
    ):
        codec.encode(codec.decode(cls, sample))


def use_systemd(library: str) -> None:
    """Only this import may find what is in ``library``."""
    if not library:
        raise Failure("start supervisor", message="the systemd cgroup driver needs the Python package jeepney", hint="pip install jeepney")
    sys.path.append(library)
    try:
        cgroups.use_systemd()
    finally:
        sys.path.remove(library)


def made(loop: Loop, children: Children, job: Job, title: str) -> dict[str, int]:
    """The fds of a namespace that is made in a child, because its maker ends up in it."""
    task = loop.start(children.call(job, title))
    while not task.done:
        loop.turn(5.0)
    return task.result()[1]


def seccomp_cache(state: int) -> int:
    try:
        os.mkdir("seccomp", 0o700, dir_fd=state)
    except FileExistsError:
        pass  # the usual case
    return os.open("seccomp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=state)
