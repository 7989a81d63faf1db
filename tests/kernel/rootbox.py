"""A root made by ``shim.rootfs`` and a shell in it, in forked children: the harness of the kernel tests of mounts.

The host's mounts are never touched: the child that plays the host's side works in a mount namespace of its own, private below "/".
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from shim.errors import Failure
from shim.linux import libc, process
from shim.linux import mount as m
from shim.oci.bundle import Recipe
from shim.oci.spec import Linux, Mount, Namespace, NamespaceType, Process, Root, Spec
from shim.rootfs import ops, plan

BUSYBOX = "/bin/busybox"
APPLETS = "sh cat ls stat touch mount umount mkdir grep sleep usleep id test wc readlink"
NSE = ("nosuid", "noexec", "nodev")
PROC = Mount("/proc", "proc", "proc", NSE)
DEV = Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k"))
PTS = Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"))
MQUEUE = Mount("/dev/mqueue", "mqueue", "mqueue", NSE)
SYS = Mount("/sys", "sysfs", "sysfs", (*NSE, "ro"))
USUAL = (PROC, DEV, PTS, MQUEUE, SYS)
NAMESPACES = tuple(
    Namespace(kind) for kind in (NamespaceType.PID, NamespaceType.MOUNT, NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS)
)
SECONDS = 20  # after which a child that hangs is killed


@dataclass
class Result:
    code: int
    out: str
    host: str = ""  # what the host's side returned after the container ended

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass
class Box:
    """An image in ``base/image`` (busybox and empty directories), writable layers made for each run."""

    base: Path
    image: Path = field(init=False)
    runs: int = 0

    def __post_init__(self) -> None:
        self.image = self.base / "image"
        for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
            (self.image / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.image / "bin/busybox")
        for name in APPLETS.split():
            os.symlink("busybox", self.image / "bin" / name)

    def recipe(self) -> Recipe:
        self.runs += 1
        upper, work = self.base / f"upper{self.runs}", self.base / f"work{self.runs}"
        upper.mkdir()
        work.mkdir()
        return Recipe("overlay", (str(self.image),), str(upper), str(work))

    @property
    def upper(self) -> Path:
        """The writable layer of the last run."""
        return self.base / f"upper{self.runs}"

    def run(
        self,
        script: str = "true",
        mounts: tuple[Mount, ...] = USUAL,
        *,
        recipe: Recipe | None = None,
        readonly: bool = False,
        cwd: str = "/",
        version: int = 2,
        cgroup_paths: dict[str, str] | None = None,
        shm: Callable[[], int] | None = None,
        before: Callable[[], None] | None = None,
        during: Callable[[], None] | None = None,
        after: Callable[[], str] | None = None,
        inside: Callable[[int], None] | None = None,
        linux: Linux | None = None,
        mknod: bool = True,
    ) -> Result:
        """Run a shell script as PID 1 in a new root. ``before``, ``during`` and ``after`` run on the host's side (its own mount namespace),
        ``inside`` in the container before it executes, with the root's fd. A Failure of the runtime is raised here."""
        spec = Spec(
            "1.2.0",
            Root("rootfs", readonly),
            Process(("/bin/sh", "-c", script), cwd),
            mounts=mounts,
            linux=linux or Linux(namespaces=NAMESPACES),
        )
        recipe = recipe or self.recipe()
        operations = plan.plan(spec, recipe, cgroup_version=version, cgroup_paths=cgroup_paths or {}, mknod=mknod)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            job = _Job(spec, recipe, write, operations, shm, inside)
            job.host_side(before, during, after)
        os.close(write)
        with open(read, "rb") as file:
            messages = [json.loads(line) for line in file]
        os.waitpid(pid, 0)
        result = Result(-1, "")
        for message in messages:
            if "failure" in message:
                raise Failure.from_json(message["failure"])
            if "crash" in message:
                raise AssertionError(message["crash"])
            for key, value in message.items():
                setattr(result, key, value)
        return result


@dataclass
class _Job:
    spec: Spec
    recipe: Recipe
    write: int
    operations: tuple[plan.Op, ...]
    shm: Callable[[], int] | None
    inside: Callable[[int], None] | None

    def tell(self, **message: object) -> None:
        os.write(self.write, json.dumps(message).encode() + b"\n")

    def failed(self, error: BaseException) -> None:
        self.tell(failure=error.to_json()) if isinstance(error, Failure) else self.tell(crash=repr(error))

    def host_side(self, before: Callable[[], None] | None, during: Callable[[], None] | None, after: Callable[[], str] | None) -> NoReturn:
        try:
            signal.alarm(SECONDS)
            libc.unshare(libc.CLONE_NEWNS)
            m.make_private("/")
            if before:
                before()
            prepared = ops.prepare(self.operations, self.recipe, shm_fd=self.shm() if self.shm else None)
            out, into = os.pipe()
            pid, pidfd = libc.clone3(libc.CLONE_NEWPID, pidfd=True)
            if pid == 0:
                self.container(into, prepared)
            os.close(into)
            prepared.close()
            if during:
                during()
            with open(out, "rb") as file:
                text = file.read().decode(errors="replace")
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            self.tell(code=ended.si_status if ended else -1, out=text)
            if after:
                self.tell(host=after())
        except BaseException as error:
            self.failed(error)
        finally:
            os._exit(0)

    def container(self, out: int, prepared: ops.Prepared) -> NoReturn:
        try:
            signal.alarm(SECONDS)
            libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
            os.close(ops.lean_namespace())
            libc.unshare(libc.CLONE_NEWNS)
            rootfd = ops.attach_root(prepared)
            ops.attach(self.operations, prepared, rootfd)
            ops.seal(self.operations, prepared, rootfd)
            if self.inside:
                self.inside(rootfd)
            image = libc.ExecImage(b"/bin/sh", [arg.encode() for arg in self.spec.process.args], [b"PATH=/bin"])
            os.dup2(out, 1)
            os.dup2(out, 2)
            process.close_all_except({1, 2, self.write})
            os.set_inheritable(self.write, False)
            image.exec()
        except BaseException as error:
            self.failed(error)
        finally:
            os._exit(127)


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Poll; used where the other side can only be seen, not heard."""
    import time

    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("condition did not come true")
        time.sleep(0.002)


def kernel() -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


def file_system(where: Path) -> int:
    """The magic number of the file system that ``where`` is on."""
    fd = os.open(where, os.O_PATH)
    try:
        return m.fstatfs_type(fd)
    finally:
        os.close(fd)


def shared_tmpfs(target: Path, propagation: int = m.MS_SHARED) -> None:
    """A tmpfs over ``target`` with that propagation, in the calling mount namespace."""
    fd = m.new_filesystem("tmpfs", {"source": "test"})
    m.attach(fd, str(target))
    m.mount_setattr(fd, propagation=propagation)
    os.close(fd)


@contextmanager
def swapping(directory: Path, name: str, target: str) -> Iterator[None]:
    """A process that exchanges ``directory/name`` (a directory) with a symlink to ``target`` as fast as it can."""
    link = directory / f"{name}.link"
    os.symlink(target, link)
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            dirfd = os.open(directory, os.O_RDONLY)
            a, b = name.encode(), link.name.encode()
            number = 316 if libc.MACHINE == "x86_64" else 276  # renameat2
            while True:
                libc.syscall(number, dirfd, a, dirfd, b, 2)  # RENAME_EXCHANGE
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (directory / name).is_symlink():
            os.rename(directory / name, directory / "swapped")
            os.rename(link, directory / name)
            os.rename(directory / "swapped", link)
        link.unlink()
