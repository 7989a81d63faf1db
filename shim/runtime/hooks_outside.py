"""createContainer hooks of a container in a user namespace: run by a process that has never joined it.

A process of the user namespace cannot enter the host's mount namespace, whose programs and files the hooks need. So a helper is forked
while the launch still has its rights outside, and gets the container's root by message. Its user id is what the container's root is
outside, so that what it makes in the idmapped root belongs to root inside; its capabilities are the host's, as without a user namespace. It
is in the pod's network, IPC and UTS namespaces, but in no PID namespace in which a container could see it.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from shim.errors import Failure
from shim.linux import caps, libc, mount, process
from shim.oci.spec import Spec
from shim.runtime import hooks


@dataclass(frozen=True, slots=True)
class Order:
    """What the helper needs to know."""

    spec: Spec
    container_id: str
    bundle_path: str
    root: tuple[int, int]  # the host's ids of the container's root
    host_mntns: int
    namespaces: Iterable[tuple[int, int]]  # of the pod: fd and type


class Outside:
    """The helper; the process that made it may fork, and any of its forks may call ``run``."""

    def __init__(self, order: Order) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid, _ = libc.clone3(0)
        if pid == 0:
            self._ours.close()
            _serve(theirs, order)
        theirs.close()

    def run(self, rootfd: int) -> None:
        """Run the hooks on the root behind the fd, with everything mounted in it. Raises Failure."""
        tree = mount.clone_mount(rootfd, recursive=True)
        self._ours.sendmsg([b"r"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tree]))])
        os.close(tree)
        said = self._ours.recv(1 << 16)
        self._ours.close()
        if not said:
            raise Failure("hook", "createContainer", message="the process that ran the hooks died")
        if said != b"ok":
            raise Failure.from_json(json.loads(said))


def _serve(line: socket.socket, order: Order) -> NoReturn:
    try:
        data, ancillary, _, _ = line.recvmsg(16, socket.CMSG_SPACE(4))
        if not data or not ancillary:  # the launch has failed
            os._exit(0)
        tree = array.array("i", ancillary[0][2])[0]
        for namespace, kind in order.namespaces:
            libc.setns(namespace, kind)
        hooks.show_root(tree, order.host_mntns, order.bundle_path)
        _become(order.root)
        payload = hooks.state(order.spec, order.container_id, "creating", 0, order.bundle_path)
        hooks.run_all(hooks.of_stage(order.spec, "createContainer"), payload)
        line.send(b"ok")
    except Failure as failure:
        line.send(json.dumps(failure.to_json()).encode())
    except OSError as error:
        line.send(json.dumps(Failure.wrap("hook", "prepare", error).to_json()).encode())
    finally:
        os._exit(0)


def _become(root: tuple[int, int]) -> None:
    """Take ids without losing capabilities, also through the execve of a hook."""
    everything = libc.capget()[1]
    caps.keepcaps(True)
    os.setgroups([])
    os.setresgid(root[1], root[1], root[1])
    os.setresuid(root[0], root[0], root[0])
    process.set_dumpable(False)
    caps.set_caps(everything, everything, everything)
    caps.set_ambient(everything)
