"""A place to run a node in: a network namespace of its own, a registry on its loopback, and tidying up after daemons that were killed.

Shared by hack/run, hack/bench and the tests. Stdlib only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
_serial = itertools.count(1)


def wait_for(what: str, test: Callable[[], Any], seconds: float = 10, step: float = 0.02) -> Any:
    """Poll ``test`` until it is true and return its value; AssertionError naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        value = test()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(step)


class Node:
    """A network namespace with loopback and a blind uplink, so that "the default route" exists and nothing leaves it."""

    def __init__(self, name: str = "") -> None:
        self.name = name or f"crishim-{os.getpid()}-{next(_serial)}"
        self.netns = f"/run/netns/{self.name}"
        self.directory = Path(tempfile.mkdtemp(prefix="csn"))

    def up(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        for line in (
            "link set lo up",
            "link add up0 type veth peer name up1",
            "addr add 192.0.2.1/24 dev up0",
            "link set up1 up",
            "link set up0 up",
            "route add default via 192.0.2.254 dev up0",
        ):
            self.run("ip", *line.split())

    def command(self, *argv: str) -> list[str]:
        """``argv`` run inside the node. Not `ip netns exec`, which hides /sys/fs/cgroup behind a fresh /sys."""
        return ["nsenter", f"--net={self.netns}", "--", *argv]

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*argv), check=True, text=True, capture_output=True, timeout=60, **options)

    def daemon(self, log: Path, *argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a daemon inside, in a session of its own; the Popen's pid is its pid (nsenter execs)."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(*argv), cwd="/", env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    @contextlib.contextmanager
    def registry(self, directory: Path, *images: str, port: int = 5000) -> Iterator[str]:
        """Debian's docker-registry on the node's loopback, filled from hack/images.py's catalogue; yields its host:port."""
        host = f"127.0.0.1:{port}"
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "config.yml"
        storage = {"filesystem": {"rootdirectory": str(directory / "data")}}
        config.write_text(  # JSON is YAML
            json.dumps(
                {"version": 0.1, "log": {"level": "error", "accesslog": {"disabled": True}}, "storage": storage, "http": {"addr": host}}
            )
        )
        process = self.daemon(directory / "log", "docker-registry", "serve", str(config))
        try:
            push = [sys.executable, str(REPOSITORY / "hack" / "images.py"), "push", "--registry", host, *images]

            def pushed() -> bool:
                assert process.poll() is None, f"docker-registry exited: {(directory / 'log').read_text()[-1000:]}"
                listening = self.run("ss", "-Hltn", f"sport = :{port}").stdout
                return bool(listening.strip())

            wait_for("docker-registry", pushed, 20)
            subprocess.run(self.command(*push), check=True, stdout=subprocess.DEVNULL, timeout=600)
            yield host
        finally:
            process.kill()
            process.wait()

    def down(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)


# -- what a killed daemon leaves


def cgroup_directories(path: str) -> list[Path]:
    """Every directory that is the cgroup ``path``, in whatever hierarchies this host has."""
    top = Path("/sys/fs/cgroup")
    candidates = [top, *(d for d in top.iterdir() if d.is_dir() and not d.is_symlink())]
    return [d for c in candidates if (d := c / path.strip("/")).is_dir()]


def cgroup_pids(path: str) -> set[int]:
    """Processes in the cgroup ``path`` or below it."""
    pids: set[int] = set()
    for top in cgroup_directories(path):
        for directory, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                pids.update(int(p) for p in (Path(directory) / "cgroup.procs").read_text().split())
    return pids


def kill_pid(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody has reaped yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def unmount_below(directory: Path) -> None:
    """Unmount everything below a directory, deepest first."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in sorted((t for t in targets if t.startswith(f"{directory}/")), key=len, reverse=True):
        subprocess.run(["umount", "-l", target], check=False, capture_output=True)


def end_cgroup(path: str) -> None:
    """Kill every process in a cgroup of ours and remove it."""
    for _ in range(100):
        left = cgroup_pids(path)
        if not left:
            break
        for pid in left:
            kill_pid(pid)
        time.sleep(0.05)
    for top in cgroup_directories(path):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
