"""User namespaces that exist only to say how the ids of an idmapped mount are mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shim.errors import Failure
from shim.linux import libc
from shim.oci.spec import IDMapping

if TYPE_CHECKING:
    from shim.rootfs.plan import Mappings


def id_map(mappings: Sequence[IDMapping]) -> bytes:
    """The text of /proc/PID/uid_map or gid_map."""
    return "".join(f"{r.container_id} {r.host_id} {r.size}\n" for r in mappings).encode()


def host_id(mappings: Sequence[IDMapping], number: int) -> int | None:
    """What a container's id is outside; None where it is not mapped."""
    return next((r.host_id + number - r.container_id for r in mappings if r.container_id <= number < r.container_id + r.size), None)


def root_ids(mappings: Mappings) -> tuple[int, int]:
    """The uid and gid outside of root inside. Raises Failure where root is not mapped: nothing could be set up for the container."""
    uid, gid = (host_id(part, 0) for part in mappings)
    if uid is None or gid is None:
        raise Failure("user namespace", message="container id 0 is not mapped", path="uidMappings")
    return uid, gid


def write_maps(proc: int, pid: int, mappings: Mappings) -> None:
    """Give the user namespace of ``pid`` its maps, through the procfs root ``proc``, by a process of the parent user namespace."""
    for name, part in zip(("uid_map", "gid_map"), mappings, strict=True):
        fd = os.open(f"{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, id_map(part))
        finally:
            os.close(fd)


def user_namespace(mappings: Mappings) -> int:
    """An fd of a new user namespace with those maps and no process in it; for a process with one thread that sees a /proc."""
    uids, gids = mappings
    if not uids or not gids:
        raise Failure("create container", "idmap", message="both uid and gid mappings are needed")
    hold, release = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = libc.clone3(libc.CLONE_NEWUSER, pidfd=True)
    if pid == 0:
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
    proc = -1
    try:
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        write_maps(proc, pid, mappings)
        return os.open(f"{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError as error:
        raise Failure.wrap("create container", "idmap", error) from None
    finally:
        if proc >= 0:
            os.close(proc)
        os.close(release)
        os.close(hold)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


class Namespaces:
    """One user namespace per distinct mapping of a container; the pod's own is used where its mapping is asked for."""

    def __init__(self, pod: int | None, pod_mappings: Mappings | None) -> None:
        self._root = pod_mappings
        self._known: dict[Mappings, int] = {}
        self._own: list[int] = []
        if pod is not None and pod_mappings is not None:
            self._known[pod_mappings] = pod

    def of(self, mappings: Mappings) -> int:
        fd = self._known.get(mappings)
        if fd is None:
            fd = self._known[mappings] = user_namespace(mappings)
            self._own.append(fd)
        return fd

    def of_root(self) -> int | None:
        return None if self._root is None else self.of(self._root)

    def root_ids(self) -> tuple[int, int]:
        """What root of the container is outside."""
        return (0, 0) if self._root is None else root_ids(self._root)

    def close(self) -> None:
        for fd in self._own:
            os.close(fd)
        self._own, self._known = [], {}
