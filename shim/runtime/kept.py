"""What creating a container leaves in its bundle for exec sessions: the compiled filter, the user's home directory, and what its root is
outside of its user namespace.

One small file that is read with two calls: an exec session decodes no specification, compiles nothing and does not look into the
root's /etc/passwd, which the container may have rewritten since.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from shim import seccomp
from shim.errors import Failure
from shim.oci.spec import Spec
from shim.runtime import userns
from shim.seccomp.filter import NEW_LISTENER, flags

_FILE = "exec.kept"
# magic, flags of seccomp(2), bytes of BPF, bytes of the home directory, uid and gid of root
_HEAD = struct.Struct("<4sIIIII")
_MAGIC = b"csk2"
_HOST = 0xFFFFFFFF  # no user namespace


@dataclass(frozen=True, slots=True)
class Kept:
    bpf: bytes  # empty: unconfined
    flags: int
    home: str
    root: tuple[int, int] | None = None  # the host's ids of root in the container; None where it is the host's own

    @property
    def notifies(self) -> bool:
        """Whether the filter comes with a listener: see ``shim.runtime.listener``."""
        return bool(self.flags & NEW_LISTENER)

    def filter(self) -> seccomp.Filter | None:
        return seccomp.Filter(self.bpf, self.flags) if self.bpf else None


def compile_filter(spec: Spec, cache: int) -> Kept:
    """The filter of a container that is being created, compiled or out of the cache directory."""
    profile = spec.linux.seccomp
    if profile is None:
        return Kept(b"", 0, "", userns.root_of(spec.linux))
    capabilities = spec.process.capabilities.bounding if spec.process.capabilities else ()
    bpf, value = seccomp.compile(profile, capabilities, cache), flags(profile)
    return Kept(bpf, value, "", userns.root_of(spec.linux))


def create(bundle: int) -> int:
    """The file, to be written by ``store`` when this process may not enter the bundle any more."""
    return os.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=bundle)


def store(fd: int, kept: Kept) -> None:
    """Write the file and close it. The container does not run yet, so nobody reads it half written."""
    home = os.fsencode(kept.home)
    uid, gid = kept.root or (_HOST, _HOST)
    try:
        os.writev(fd, (_HEAD.pack(_MAGIC, kept.flags, len(kept.bpf), len(home), uid, gid), kept.bpf, home))
    finally:
        os.close(fd)


def load(bundle: int) -> Kept:
    """Raises Failure where the file is missing or torn: without its filter nothing may be run in the container."""
    try:
        fd = os.open(_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
    except OSError as error:
        raise Failure.wrap("exec", "read bundle", error, _FILE) from None
    try:
        data = os.read(fd, 1 << 17)
    finally:
        os.close(fd)
    magic, value, bpf, home, uid, gid = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (b"", 0, 0, 0, 0, 0)
    start = _HEAD.size
    if magic != _MAGIC or len(data) != start + bpf + home:
        raise Failure("exec", "read bundle", path=_FILE, message="not what creating the container wrote")
    return Kept(data[start : start + bpf], value, os.fsdecode(data[start + bpf :]), None if uid == _HOST else (uid, gid))
