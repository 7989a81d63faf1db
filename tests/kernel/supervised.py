"""A real supervisor with its own state directory, and containers of the host's static busybox, for the tests beside this file."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from cri.supervisor import ExecSession, Supervisor
from shim import client
from shim.linux.process import set_subreaper
from shim.oci import bundle
from shim.oci.bundle import ExitRecord, Recipe
from shim.oci.sandbox import Sandbox
from shim.oci.spec import Linux, Mount, Namespace, NamespaceType, Process, Root, Spec

BUSYBOX = "/bin/busybox"
APPLETS = (
    "sh",
    "cat",
    "echo",
    "sleep",
    "true",
    "false",
    "seq",
    "dd",
    "head",
    "ps",
    "kill",
    "id",
    "ls",
    "test",
    "yes",
    "tty",
    "stty",
    "hostname",
    "tail",
    "tr",
)
ENV = ("PATH=/bin", "HOME=/")
MOUNTS = (
    Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")),
)
SHM = Mount("/dev/shm", "bind", "pod:shm", ("rbind", "nosuid", "nodev", "noexec"))


def make_root(directory: Path) -> Path:
    """A root file system with busybox."""
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (directory / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, directory / "bin/busybox")
    for name in APPLETS:
        (directory / "bin" / name).symlink_to("busybox")
    return directory


# Tests written for whatever driver there is can be run with this one.
DRIVER = "CRI_SHIM_TEST_CGROUP_DRIVER"


class Rig:
    """One state directory. ``supervisor`` is the daemon's side; everything goes through it."""

    def __init__(self, base: Path, *, systemd: bool = False) -> None:
        self.base = base
        self.state = base / "state"
        self.slice = f"crishimh7{token_hex(3)}.slice" if systemd else ""
        self.cgroup = f"/{self.slice}" if systemd else f"/crishim-h7-{token_hex(3)}"
        self.root = make_root(base / "root")
        self.exits: dict[str, ExitRecord] = {}
        self.oom: list[str] = []
        self.replaced = asyncio.Event()
        self.supervisor: Supervisor
        self.containers: set[str] = set()
        self.pods: set[str] = set()
        for name in ("", "pods", "containers", "netns"):
            (self.state / name).mkdir(mode=0o700)
        (base / "logs").mkdir()

    def place(self, name: str) -> str:
        """A cgroups path for something of this rig."""
        return f"{self.slice}:cri-shim:{name}" if self.slice else f"{self.cgroup}/{name}"

    async def open(self) -> None:
        """Start, or connect to, the supervisor."""
        self.supervisor = await Supervisor.start(self.state, python=Path(sys.executable), runtime_cgroup=self.place("runtime"))
        self.supervisor.on_exit = self.exits.__setitem__
        self.supervisor.on_oom = self.oom.append
        self.supervisor.on_replaced = self.replaced.set

    async def close(self) -> None:
        for name in list(self.containers):
            await self.supervisor.delete_container(name)
        for name in list(self.pods):
            await self.supervisor.delete_pod(name)
        self.supervisor.close()
        await asyncio.to_thread(client.shutdown, self.state, force=True)

    async def pod(self, *kinds: NamespaceType, shm: int = 1 << 20) -> str:
        name = token_hex(32)
        directory = self.state / "pods" / name
        directory.mkdir(mode=0o700)
        namespaces = kinds or (NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS)
        pin = str(self.state / "netns" / name) if NamespaceType.NETWORK in namespaces else ""
        sandbox = Sandbox(name, namespaces, hostname="pod", netns_path=pin, shm_size=shm, cgroups_path=self.place(name[:8]))
        bundle.write_sandbox(directory, sandbox)
        self.pods.add(name)
        handles = await self.supervisor.create_pod(name, directory)
        if handles.netlink is not None:
            os.close(handles.netlink)
        return name

    def spec(
        self, name: str, args: tuple[str, ...], *, pid: str = "", tty: bool = False, change: Callable[[Spec], Spec] = lambda s: s
    ) -> Spec:
        """``pid``: empty for a new PID namespace, "pod:pid", or "host"."""
        namespaces = [Namespace(NamespaceType.MOUNT)]
        namespaces += [Namespace(kind, f"pod:{kind.value}") for kind in (NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS)]
        if pid != "host":
            namespaces.append(Namespace(NamespaceType.PID, pid))
        process = Process(args, env=ENV, terminal=tty)
        linux = Linux(tuple(namespaces), cgroups_path=self.place(name))
        return change(Spec("1.2.0", Root("rootfs"), process, mounts=(*MOUNTS, SHM), linux=linux))

    async def create(
        self, pod: str, *args: str, tty: bool = False, stdin: bool = False, pid: str = "", log: str | None = None,
        change: Callable[[Spec], Spec] = lambda s: s,
    ) -> str:  # fmt: skip
        name = token_hex(32)
        self.containers.add(name)
        directory = self.state / "containers" / name
        spec = self.spec(name, args, pid=pid, tty=tty, change=change)
        bundle.write(directory, spec, Recipe("bind", source=str(self.root)), stdin=stdin, tty=tty)
        await self.supervisor.create_container(
            name, pod, bundle=directory, log_path=str(self.log(name)) if log is None else log, tty=tty, stdin=stdin, stdin_once=False
        )
        return name

    async def run(self, pod: str, *args: str, **options: object) -> str:
        name = await self.create(pod, *args, **options)  # type: ignore[arg-type]
        await self.supervisor.start_container(name)
        return name

    async def remove(self, name: str) -> None:
        await self.supervisor.delete_container(name)
        shutil.rmtree(self.state / "containers" / name)
        self.containers.discard(name)

    def log(self, name: str) -> Path:
        return self.base / "logs" / f"{name[:12]}.log"

    def lines(self, name: str, stream: str | None = None) -> list[str]:
        """The text of a log as the kubelet shows it."""
        lines, partial = [], ""
        for record in self.log(name).read_text().splitlines():
            _, where, tag, text = record.split(" ", 3)
            if stream in (None, where):
                partial += text
                if tag == "F":
                    lines.append(partial)
                    partial = ""
        return lines

    async def exit(self, name: str, patience: float = 10.0) -> ExitRecord:
        await until(lambda: name in self.exits, patience)
        return self.exits[name]

    async def exec(self, name: str, *args: str, tty: bool = False, user: int = 0) -> tuple[ExecSession, int]:
        """The session and the reading end of its stdout and stderr (its console with ``tty``)."""
        process = Process(args, env=ENV, terminal=tty)
        if user:
            process = replace(process, user=replace(process.user, uid=user, gid=user))
        if tty:
            session = await self.supervisor.exec(name, token_hex(16), process, stdin=None, stdout=None, stderr=None)
            assert session.console is not None
            return session, session.console
        read, write = os.pipe()
        try:
            session = await self.supervisor.exec(name, token_hex(16), process, stdin=None, stdout=write, stderr=write)
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        return session, read

    async def output(self, name: str, *args: str) -> tuple[int, str]:
        """Exit code and output of an exec'd process."""
        session, read = await self.exec(name, *args)
        try:
            code = await asyncio.wait_for(asyncio.shield(session.exited), 10)
            return code, os.read(read, 1 << 16).decode()
        finally:
            os.close(read)

    @property
    def stdio_pid(self) -> int:
        return int((self.state / "stdio.lock").read_text().split()[0])

    async def kill_supervisor(self) -> int:
        """SIGKILL it and wait for its successor; the successor's pid."""
        self.replaced.clear()
        os.kill(self.supervisor.pid, signal.SIGKILL)
        await asyncio.wait_for(self.replaced.wait(), 15)
        return self.supervisor.pid

    async def kill_stdio(self) -> None:
        before = self.stdio_pid
        os.kill(before, signal.SIGKILL)
        await until(lambda: self.stdio_pid != before)

    def record(self, name: str) -> ExitRecord:
        """exit.json as it is on disk."""
        fields = json.loads((self.state / "containers" / name / "exit.json").read_text())
        return ExitRecord(fields.get("exitCode", 0), fields["finishedAt"], fields.get("oomKilled", False), fields.get("reason", ""))


async def until(condition: Callable[[], object], patience: float = 10.0) -> None:
    """Wait for something that no event tells."""
    deadline = time.monotonic() + patience
    while True:
        with suppress(FileNotFoundError, ProcessLookupError, IndexError):  # of /proc: gone before or after the open
            if condition():
                return
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    """A rig that leaves nothing behind: state, cgroups and processes."""
    base = Path(tempfile.mkdtemp(prefix="h7-", dir=os.environ.get("TMPDIR", "/tmp")))
    made = Rig(base, systemd=os.environ.get(DRIVER) == "systemd")
    try:
        await made.open()
        yield made
        await made.close()
    except BaseException:
        log = made.state / client.LOG
        print(log.read_text()[-4000:] if log.exists() else "no supervisor.log")  # pytest shows it with the failure
        raise
    finally:
        await asyncio.to_thread(_sweep, made)
        set_subreaper(False)  # which the client made us: other tests' orphans would come here, and nobody would reap them


def _sweep(made: Rig) -> None:
    """End and remove what a failed test left: every process in the rig's cgroups, mounts below its directory, the cgroups."""
    if made.slice:
        subprocess.run(["systemctl", "kill", "--signal=KILL", made.slice], check=False)
        subprocess.run(["systemctl", "stop", made.slice], check=False)
    one = Path("/sys/fs/cgroup/cgroup.procs").exists()
    mounts = [Path("/sys/fs/cgroup")] if one else list(Path("/sys/fs/cgroup").iterdir())
    tops = [mount / made.cgroup.lstrip("/") for mount in mounts]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = {int(pid) for top in tops for file in top.rglob("cgroup.procs") for pid in file.read_text().split()}
        if not left:
            break
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[1].startswith(f"{made.base}/"):
            subprocess.run(["umount", "-l", line.split()[1]], check=False)
    for top in tops:
        for directory, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
    shutil.rmtree(made.base, ignore_errors=True)
