"""A container's seccomp filter: compiled (or found compiled) at create, kept in its bundle for exec sessions."""

from __future__ import annotations

import os
import struct

from shim import seccomp
from shim.errors import Failure
from shim.oci.spec import Spec
from shim.seccomp.filter import flags

_FILE = "seccomp.bpf"
_HEAD = struct.Struct("<I")  # flags of seccomp(2); the instructions follow


def store(spec: Spec, cache: int, bundle: int) -> seccomp.Filter | None:
    """The filter of a container that is being created, None where it runs unconfined."""
    profile = spec.linux.seccomp
    if profile is None:
        return None
    capabilities = spec.process.capabilities.bounding if spec.process.capabilities else ()
    bpf, value = seccomp.compile(profile, capabilities, cache), flags(profile)
    filter_ = seccomp.Filter(bpf, value)
    if filter_.notifies:
        raise Failure("seccomp", message="SCMP_ACT_NOTIFY is not built yet", path="linux.seccomp.syscalls")
    fd = os.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=bundle)
    os.write(fd, _HEAD.pack(value) + bpf)
    os.close(fd)
    return filter_


def load(bundle: int) -> seccomp.Filter | None:
    """The filter that ``store`` left in the bundle, for one more process of that container."""
    try:
        fd = os.open(_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
    except FileNotFoundError:
        return None
    try:
        data = os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return seccomp.Filter(data[_HEAD.size :], _HEAD.unpack_from(data)[0])
