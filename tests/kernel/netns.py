"""Network namespaces for tests, entered by threads: only the thread that calls setns moves, and those that it starts."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cri.network import rtnl
from cri.network.netlink import Socket
from shim.linux import libc

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
_serial = itertools.count(1)


class Netns:
    """A named network namespace."""

    def __init__(self, role: str) -> None:
        self.name = f"crishim-{os.getpid()}-{role}{next(_serial)}"
        self.path = f"/run/netns/{self.name}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    def call(self, function: Callable[[], T]) -> T:
        """``function`` in a thread that lives in the namespace."""
        result: list[Any] = []

        def body() -> None:
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    libc.setns(fd, CLONE_NEWNET)
                finally:
                    os.close(fd)
                result.extend((function(), None))
            except BaseException as error:
                result.extend((None, error))

        thread = threading.Thread(target=body)
        thread.start()
        thread.join(60)
        assert result, f"stuck in {self.name}"
        if result[1] is not None:
            raise result[1]
        return result[0]

    def run(self, *argv: str) -> str:
        """A command in the namespace; its output."""
        return subprocess.run(["nsenter", f"--net={self.path}", "--", *argv], check=True, text=True, capture_output=True, timeout=30).stdout

    def udp_flows(self, port: int, version: int = 4) -> int:
        """How many flows to a port are tracked."""

        def count() -> int:
            with Socket(protocol=12) as sock:
                return len(list(rtnl.flows(sock, version, socket.IPPROTO_UDP, port)))

        return self.call(count)

    def netlink(self) -> int:
        """A NETLINK_ROUTE socket opened inside, as a child of the supervisor opens it."""
        return self.call(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE).detach())

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket made inside; it stays there whoever uses it."""
        made = self.call(lambda: socket.socket(family, kind, protocol))
        made.settimeout(5)
        return made
