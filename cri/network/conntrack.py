"""Connection tracking: flows that must not go on where they went. UDP has no end, so an entry lives as long as somebody sends."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from cri.network import rtnl
from cri.network.netlink import Socket

_NETFILTER = 12
_PROTOCOLS = {"udp": socket.IPPROTO_UDP, "sctp": 132}


def forget(versions: Iterable[int], protocol: str, ports: Iterable[int]) -> int:
    """Forget every flow whose first packet went to one of these ports; how many there were. Their next packet meets the rules anew.

    A kernel without connection tracking tracks nothing.
    """
    number = 0
    with Socket(protocol=_NETFILTER) as sock:
        for version in versions:
            for port in ports:
                try:
                    found = list(rtnl.flows(sock, version, _PROTOCOLS[protocol], port))
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
                        raise
                    return number
                for failure in sock.batch([rtnl.forget_flow(name) for name in found]) if found else ():
                    if failure is not None and failure.errno != errno.ENOENT:  # it has ended
                        raise failure
                number += len(found)
    return number
