"""A container's bundle directory, a pod's sandbox record and the exit record: what crosses from the daemon to the core through files.

Everything is 0600 in a directory of 0700: specs carry environments, and environments carry secrets.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shim.errors import Failure
from shim.oci import codec
from shim.oci.sandbox import Sandbox
from shim.oci.spec import Spec

T = TypeVar("T")

CONFIG, RECIPE, SANDBOX, EXIT, REFUSALS = "config.json", "rootfs.json", "sandbox.json", "exit.json", "seccomp.json"
STDIN, STDOUT, STDERR = "stdin", "stdout", "stderr"

IMAGE_VOLUME = "mount image volume"  # operation of the Failure of one: the daemon has words for it that the kubelet knows

_LIMIT = 32 << 20  # twice the largest gRPC message: a longer file is not ours


@dataclass(frozen=True, slots=True)
class Volume:
    """An image that a mount of type "image" shows, read-only."""

    destination: str  # of the mount in the specification
    lower: tuple[str, ...]  # absolute, topmost first
    sub_path: str = ""  # a directory inside; resolved when the mount is made


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a container's root. ``cri/images`` writes it, ``shim/rootfs`` executes it."""

    type: str  # "overlay" or "bind"
    lower: tuple[str, ...] = ()  # absolute, topmost first
    upper: str = ""  # empty with ``lower``: a read-only overlay
    work: str = ""
    source: str = ""  # of a bind
    options: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a container ended. Written by the supervisor before it reports the exit, so that a dead daemon misses nothing."""

    exit_code: int
    finished_at: int  # ns since the epoch
    oom_killed: bool = False
    reason: str = ""
    signal: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Refusals:
    """Calls by name that a container's seccomp profile refused it, where somebody counts them; ``stopped`` once it was ended for them."""

    calls: dict[str, int] = field(default_factory=dict)
    stopped: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{name} ({count}x)" for name, count in sorted(self.calls.items()))


def write(directory: Path, spec: Spec, recipe: Recipe, *, stdin: bool, tty: bool) -> None:
    """Make the bundle ``directory`` (it must not exist) with its spec, recipe and FIFOs."""
    try:
        os.mkdir(directory, 0o700)
        dirfd = _open_directory(directory)
        try:
            _create(dirfd, CONFIG, codec.encode(spec))
            _create(dirfd, RECIPE, codec.encode(recipe))
            for name, wanted in ((STDIN, stdin), (STDOUT, True), (STDERR, not tty)):
                if wanted:
                    os.mkfifo(name, 0o600, dir_fd=dirfd)
        finally:
            os.close(dirfd)
    except OSError as e:
        raise Failure.wrap("write bundle", "create", e, str(directory)) from None


def write_sandbox(directory: Path, sandbox: Sandbox) -> None:
    """Write ``sandbox.json`` into a pod's state directory, atomically."""
    try:
        dirfd = _open_directory(directory)
        try:
            _replace(dirfd, SANDBOX, codec.encode(sandbox))
        finally:
            os.close(dirfd)
    except OSError as e:
        raise Failure.wrap("write sandbox", "create", e, str(directory)) from None


def write_exit(dirfd: int, record: ExitRecord) -> None:
    """Write ``exit.json`` atomically into the bundle ``dirfd``."""
    try:
        _replace(dirfd, EXIT, codec.encode(record))
    except OSError as e:
        raise Failure.wrap("write exit record", "create", e, EXIT) from None


def load_spec(dirfd: int) -> Spec:
    """The bundle's OCI configuration."""
    return _load(dirfd, CONFIG, Spec)


def load_recipe(dirfd: int) -> Recipe:
    """How to make the bundle's root."""
    return _load(dirfd, RECIPE, Recipe)


def load_sandbox(dirfd: int) -> Sandbox:
    """The pod's namespaces, from its state directory."""
    return _load(dirfd, SANDBOX, Sandbox)


def read_exit(dirfd: int) -> ExitRecord | None:
    """The exit record of the bundle, None while there is none."""
    try:
        data = _read(dirfd, EXIT)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise Failure.wrap("read bundle", "read", e, EXIT) from None
    return codec.decode(ExitRecord, data)


def write_refusals(dirfd: int, refusals: Refusals) -> None:
    """Replace ``seccomp.json``; the caller sees to it that nobody else does at the same time."""
    data = json.dumps({"calls": refusals.calls, "stopped": refusals.stopped}, separators=(",", ":")).encode()
    try:
        _replace(dirfd, REFUSALS, data)
    except OSError as e:
        raise Failure.wrap("write seccomp record", "create", e, REFUSALS) from None


def read_refusals(dirfd: int) -> Refusals | None:
    """What was counted, None where nothing was."""
    try:
        data = _read(dirfd, REFUSALS)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise Failure.wrap("read bundle", "read", e, REFUSALS) from None
    fields = json.loads(data)
    return Refusals(dict(fields["calls"]), bool(fields["stopped"]))


def _load(dirfd: int, name: str, cls: type[T]) -> T:
    try:
        data = _read(dirfd, name)
    except OSError as e:
        raise Failure.wrap("read bundle", "read", e, name) from None
    return codec.decode(cls, data)


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _read(dirfd: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dirfd)
    try:
        size = os.fstat(fd).st_size
        if size > _LIMIT:
            raise Failure("read bundle", "read", path=name, message=f"{size} bytes, at most {_LIMIT} expected")
        parts = [os.read(fd, size + 1)]
        while parts[-1] and sum(map(len, parts)) < size:
            parts.append(os.read(fd, size))
        return b"".join(parts)
    finally:
        os.close(fd)


def _create(dirfd: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _replace(dirfd: int, name: str, data: bytes) -> None:
    """Readers see the old file or the new one. One writer per file, so the temporary name is fixed and a torn leftover is reused."""
    temporary = f".{name}.new"
    try:
        os.unlink(temporary, dir_fd=dirfd)
    except FileNotFoundError:
        pass  # the usual case: no earlier writer died here
    _create(dirfd, temporary, data)
    os.rename(temporary, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
