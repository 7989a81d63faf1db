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
    try:
        for name, data in (("uid_map", id_map(uids)), ("gid_map", id_map(gids))):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure.wrap("create container", "idmap", error) from None
    finally:
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

    def close(self) -> None:
        for fd in self._own:
            os.close(fd)
        self._own, self._known = [], {}
