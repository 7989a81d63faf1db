"""Network devices of containers (CDI ``netDevices``): interfaces of the host that a pod gets for itself.

As the OCI specification has it for ``linux.netDevices``: the interface is moved into the container's network namespace, which is the pod's,
gets its new name, keeps its permanent global addresses, and is up. Routes are not kept. It stays with the pod for as long as that lives, so
that a container that is started again finds it: the alias ``cri-shim:NAME`` tells that it is the one that the host called NAME. When the
pod's namespace ends, the kernel gives hardware back to the host's, and deletes what is only software.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from cri.errors import FailedPrecondition
from cri.network import rtnl
from cri.network.ipam import Interface
from cri.network.netlink import Socket
from shim.errors import Failure

_ALIAS = "cri-shim:"
_LOOPBACK = 0x8  # IFF_LOOPBACK
_PERMANENT = 0x80  # IFA_F_PERMANENT


@dataclass(frozen=True, slots=True)
class _Side:
    """A network namespace: a socket in it, and an fd of it."""

    socket: Socket
    netns: int


def move(wanted: Sequence[tuple[str, str]], netlink: int, netns_path: str) -> None:
    """``wanted``: (name on the host, name in the pod). ``netlink``, a socket that was opened in the pod's namespace, is used up. If one
    cannot be moved, the others go back. Blocks for as long as the kernel takes: call it in a thread."""
    with ExitStack() as stack:
        pod_socket = stack.enter_context(Socket(netlink))
        host = _Side(stack.enter_context(Socket()), _open(stack, "/proc/thread-self/ns/net"))
        pod = _Side(pod_socket, _open(stack, netns_path))
        moved: list[tuple[str, str]] = []
        try:
            for source, name in wanted:
                if _move(host, pod, source, name):
                    moved.append((source, name))
        except BaseException:
            for source, name in reversed(moved):
                with suppress(OSError):  # the error that is on its way says more
                    _carry(pod, host, rtnl.link(pod.socket, name), source, alias="")
            raise


def _open(stack: ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _move(host: _Side, pod: _Side, source: str, name: str) -> bool:
    """False: it was there already."""
    try:
        present = rtnl.find_link(pod.socket, name)
        if present is not None:
            if present.alias == f"{_ALIAS}{source}":
                return False
            raise FailedPrecondition(f"CDI netDevices: the pod already has an interface {name!r}, which is not the host's {source!r}")
        found = rtnl.find_link(host.socket, source)
        if found is None:
            raise FailedPrecondition(f"CDI netDevices: this host has no interface {source!r}")
        if found.flags & _LOOPBACK:
            raise FailedPrecondition(f"CDI netDevices: {source!r} is the loopback interface")
        _carry(host, pod, found, name, alias=f"{_ALIAS}{source}")
    except OSError as error:
        raise Failure("move network device", errno=error.errno, path=source, message=str(error.strerror or "")) from None
    return True


def _carry(origin: _Side, target: _Side, link: rtnl.LinkFacts, name: str, *, alias: str) -> None:
    """From one namespace to another, with its addresses; back again if it cannot be set up there."""
    kept = [a.interface for a in rtnl.addresses(origin.socket, link.index) if a.scope == 0 and a.flags & _PERMANENT]
    origin.socket.request(rtnl.move_link(link.index, name, target.netns))
    index = rtnl.link(target.socket, name).index
    try:
        _settle(target.socket, index, alias, kept)
    except OSError:
        with suppress(OSError):
            target.socket.request(rtnl.move_link(index, link.name, origin.netns))
            _settle(origin.socket, rtnl.link(origin.socket, link.name).index, link.alias, kept)
        raise


def _settle(sock: Socket, index: int, alias: str, addresses: Sequence[Interface]) -> None:
    up = rtnl.set_link(index, flags=rtnl.UP, change=rtnl.UP)
    sock.request(rtnl.set_alias(index, alias), up, *(rtnl.add_address(index, address) for address in addresses))
