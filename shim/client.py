"""Getting a supervisor: connect to the one that is there, or start one that outlives us.

``ensure`` is synchronous and imports nothing heavy: the daemon calls it before it imports grpc, and later, when a supervisor has
died, from a worker thread. It forks only to exec (vfork through subprocess), which is safe in a threaded process.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim import wire
from shim.cgroups.names import is_scope
from shim.errors import Failure
from shim.linux import libc, mount, process

log = logging.getLogger(__name__)

SOCKET = "supervisor.sock"
LOG = "supervisor.log"
_PATIENCE = 10.0  # s for a supervisor that runs to answer its first message; then it counts as hung
_BIRTH = 90.0  # s for one that has just been started: an emulated or overloaded machine takes its time, and death is seen at once
FILES = libc.prlimit(0, 7)  # RLIMIT_NOFILE before the daemon raises it: that of every supervisor, and so of containers
_ENTRY = "import sys; sys.path.append(sys.argv[2]); from shim.supervisor.boot import main; main()"
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    # stdio handles blocks of some 100 KiB: by default each would be mapped, faulted in page by page and unmapped again.
    # Restartable sequences: see ``shim.runtime.lastfork``.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4194304:glibc.pthread.rseq=0",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A connection that has said hello; ``spawned``: the supervisor is our own child."""

    socket: socket.socket
    pid: int
    pidfd: int
    spawned: bool
    hello: dict[str, Any]


def ensure(state: Path, python: Path, *, runtime_cgroup: str = "") -> Link:
    """A link to the supervisor of ``state``, which must exist. Makes this process a subreaper, so that it becomes the parent of
    containers whose supervisor dies. ``runtime_cgroup`` of the form ``slice:prefix:name`` has it use the systemd driver. Raises Failure."""
    process.set_subreaper()
    link = _connect(state)
    if link is None:
        return _spawn(state, python, runtime_cgroup)
    if link.hello.get("build") == _build(runtime_cgroup):
        return link
    return _upgraded(link, state, python, runtime_cgroup)


def build() -> str:
    """What version of the runtime core this is: a digest of its sources and the interpreter's version."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(runtime_cgroup: str) -> str:
    """The version with the cgroup driver in it: a supervisor that was started for another driver is upgraded like an old one."""
    return f"{build()}-systemd" if is_scope(runtime_cgroup) else build()


def _systemd_library() -> str:
    """The directory with the package that the systemd driver takes; empty without it."""
    found = importlib.util.find_spec("jeepney")
    return str(Path(found.origin).parent.parent) if found is not None and found.origin else ""


def _upgraded(link: Link, state: Path, python: Path, runtime_cgroup: str) -> Link:
    """The same supervisor as the version that we belong to, or as it is: one that refuses is of use, too, and says why."""
    image = read_only_image(python)
    try:
        os.set_inheritable(image, True)
        argv = _arguments(state, python, runtime_cgroup, -1)
        body = {"v": wire.VERSION, "n": 1, "op": "upgrade", "argv": argv, "env": _environment()}
        connection = wire.Connection(link.socket)
        connection.send(body, (image,))
        try:
            _receive(link.socket, _BIRTH)
        except EOFError:
            pass  # it has become another program, and has let go of us
        except Failure as failure:
            log.warning("the supervisor goes on as it is: %s", failure)
            return link
    finally:
        os.close(image)
    link.socket.close()
    os.close(link.pidfd)
    deadline = time.monotonic() + _BIRTH
    while time.monotonic() < deadline:
        again = _connect(state)
        if again is not None:
            return again
        time.sleep(0.02)
    return _spawn(state, python, runtime_cgroup)


def shutdown(state: Path, *, force: bool = False) -> bool:
    """Ask the supervisor to end, with stdio; False if there is none. Containers are not touched. Raises Failure if it refuses."""
    link = _connect(state)
    if link is None:
        return False
    with link.socket:
        link.socket.send(wire.encode({"v": wire.VERSION, "n": 1, "op": "shutdown", "force": force}))
        _receive(link.socket)
        poll = select.poll()
        poll.register(link.pidfd, select.POLLIN)
        poll.poll(_PATIENCE * 1000)
    os.close(link.pidfd)
    return True


def _connect(state: Path) -> Link | None:
    """None if nobody listens. One that listens and does not answer is hung: it is killed, since containers survive that."""
    directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{SOCKET}")
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return None
        raise Failure.wrap("connect to supervisor", "connect", error, f"{state}/{SOCKET}") from error
    finally:
        os.close(directory)
    pid, uid, _ = wire.peer(sock)
    if uid not in (0, os.geteuid()):
        sock.close()
        raise Failure("connect to supervisor", path=f"{state}/{SOCKET}", message=f"it belongs to uid {uid}")
    try:
        pidfd = libc.pidfd_open(pid)
    except ProcessLookupError:
        sock.close()
        return None
    try:
        return Link(sock, pid, pidfd, False, _greet(sock))
    except TimeoutError:
        libc.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (ConnectionError, EOFError):
        pass  # it died meanwhile, which leaves us to start another
    except BaseException:
        os.close(pidfd)
        sock.close()
        raise
    os.close(pidfd)
    sock.close()
    return None


def _greet(sock: socket.socket, patience: float = _PATIENCE) -> dict[str, Any]:
    """Say hello and wait for what there is. Raises TimeoutError, EOFError, or the supervisor's Failure."""
    sock.setblocking(True)
    sock.send(wire.encode({"v": wire.VERSION, "n": 0, "op": "hello", "version": wire.VERSION}))
    return _receive(sock, patience)


def _receive(sock: socket.socket, patience: float = _PATIENCE) -> dict[str, Any]:
    """The reply to the one request that is out, events skipped."""
    connection = wire.Connection(sock)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    deadline = time.monotonic() + patience
    while (left := deadline - time.monotonic()) > 0:
        poll.poll(left * 1000)
        try:
            message = connection.receive()
        except wire.Closed as error:
            raise EOFError(str(error)) from None
        if message is None:
            continue
        body = message.body
        if "error" in body:
            raise Failure.from_json(body["error"])
        if "ok" in body:
            ok: dict[str, Any] = body["ok"]
            return ok
    raise TimeoutError("no answer")


def _spawn(state: Path, python: Path, runtime_cgroup: str) -> Link:
    """Start one from a read-only clone of the interpreter, in a session of its own, with a clean environment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log_file = os.open(state / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    start = os.fstat(log_file).st_size
    image = read_only_image(python)
    try:
        child = subprocess.Popen(
            _arguments(state, python, runtime_cgroup, theirs.fileno()),
            executable=f"/proc/self/fd/{image}",
            pass_fds=(theirs.fileno(), image),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_file,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        raise Failure.wrap("start supervisor", "exec", error, str(python)) from error
    finally:
        for fd in (image, log_file):
            os.close(fd)
        theirs.close()
    child.returncode = 0  # not subprocess's to reap: whoever watches the pidfd does that
    pidfd = libc.pidfd_open(child.pid)
    try:
        return Link(ours, child.pid, pidfd, True, _greet(ours, _BIRTH))
    except (EOFError, TimeoutError, ConnectionError) as error:
        libc.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        ours.close()
        raise Failure("start supervisor", path=str(state / LOG), message=f"{error}: {_tail(state, start)}") from error


def _arguments(state: Path, python: Path, runtime_cgroup: str, sock: int) -> list[str]:
    """The command of a supervisor. The real path as argv[0] lets the interpreter find its prefix, in a virtual environment too."""
    settings = {"state": str(state), "runtime_cgroup": runtime_cgroup, "socket": sock, "files": FILES, "build": _build(runtime_cgroup)}
    if library := _systemd_library():
        settings["systemd"] = library
    package = str(Path(__file__).resolve().parent.parent)
    return [str(python), "-I", "-S", "-X", "utf8", "-c", _ENTRY, json.dumps(settings), package]


def _environment() -> dict[str, str]:
    return {**_ENVIRONMENT, **_failpoints()}


def _failpoints() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("CRI_SHIM_FAIL")}


def _tail(state: Path, start: int) -> str:
    text = (state / LOG).read_bytes()[start:][-500:].decode("utf-8", "replace").strip()
    return text or "it said nothing"


def read_only_image(python: Path) -> int:
    """An O_PATH fd of the interpreter on a detached read-only mount: /proc/PID/exe of what runs from it gives EROFS to every writer,
    and nothing was copied (CVE-2019-5736). Raises Failure."""
    try:
        tree = mount.open_tree(libc.AT_FDCWD, str(python), mount.OPEN_TREE_CLONE)
        mount.mount_setattr(tree, set=mount.MOUNT_ATTR_RDONLY, propagation=mount.MS_PRIVATE)
    except OSError as error:
        raise Failure.wrap("start supervisor", "open_tree", error, str(python)) from error
    return tree
