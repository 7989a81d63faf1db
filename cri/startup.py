"""What the daemon does before grpc may be imported: kernel floor, directories, the lock, the supervisor.

grpc starts threads, and a process with threads must not fork (ARCHITECTURE §1); what the daemon imports must not be in the
supervisor's memory either.
"""

from __future__ import annotations

import fcntl
import os
import re
import resource
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from cri import cgroups, log
from cri.config import Config
from cri.errors import StartError

#: openat2, new mount API, clone3, pidfd, close_range, idmapped mounts.
KERNEL_FLOOR = (5, 15)


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """Major and minor of ``uname -r``, whatever a distribution appends to it."""
    release = os.uname().release if release is None else release
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_host() -> None:
    """Refuses what can never work, in one line."""
    if kernel_version() < KERNEL_FLOOR:
        raise StartError(f"Linux {os.uname().release} is too old: cri-shim needs {KERNEL_FLOOR[0]}.{KERNEL_FLOOR[1]} or later")
    if os.geteuid() != 0:
        raise StartError("must run as root: it mounts file systems and makes namespaces")


@dataclass(frozen=True, slots=True)
class Lock:
    """Held for as long as the process lives; the kernel lets go of it whatever kills us."""

    fds: tuple[int, ...]


def lock(config: Config) -> Lock:
    """Claims root and state for this process. Each has a lock of its own: two daemons must share neither."""
    fds = []
    for directory in (config.root, config.state):
        path = Path(directory) / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StartError(f"another cri-shim (pid {holder}) is using {directory}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        fds.append(fd)
    return Lock(tuple(fds))


def directories(config: Config) -> None:
    """Makes root and state, 0700, and repairs their mode: others must not read environments and specs (CVE-2021-41103, CVE-2024-25621)."""
    for directory in (config.root, config.state):
        path = Path(directory)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise StartError(f"{path} is not a directory of user {os.geteuid()}")
            if stat.S_IMODE(found.st_mode) != 0o700:
                path.chmod(0o700)
        except OSError as error:
            raise StartError(f"{error.filename or path}: {error.strerror}") from error


def interpreter() -> Path:
    """What the supervisor runs: it uses the standard library only, so it needs nothing of our virtual environment."""
    return Path(sys.executable).resolve()


def serve(config: Config) -> int:
    """The whole life of a daemon process: checks, lock, supervisor, and only then everything that imports grpc."""
    from shim import client

    check_host()
    directories(config)
    held = lock(config)
    log.setup(config.log.level, config.log.format)
    driver = cgroups.choose(config)
    link = client.ensure(Path(config.state), interpreter(), runtime_cgroup=driver.runtime)
    # Only now: shim.client gives containers the limit that it found.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    from cri import daemon

    code = daemon.main(config, driver, link)
    del held
    return code
