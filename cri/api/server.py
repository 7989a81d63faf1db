"""The gRPC server: one unix socket, all handlers in one table."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import grpc

from shim.errors import Failure

#: What kubelet and crictl allow as well; a node with hundreds of pods needs more than gRPC's 4 MiB.
MESSAGE_MAX = 16 * 1024 * 1024

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.max_send_message_length", MESSAGE_MAX),
    # Two servers on one path would each get some of the calls; the lock file already refuses that.
    ("grpc.so_reuseport", 0),
    # The kubelet's client pings an idle connection; answering GOAWAY "too many pings" would break its event stream.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # Nothing to measure on a unix socket.
    ("grpc.http2.bdp_probe", 0),
)


class Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """One dictionary look-up per call instead of one per service."""

    def __init__(self, table: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]]) -> None:
        self._table = table

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._table.get(handler_call_details.method)


async def listen(path: Path, table: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]]) -> grpc.aio.Server:
    """A started server on ``path``, mode 0660. The caller holds the lock that makes replacing an old socket safe."""
    _clear(path)
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Handlers(table),))
    previous = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise Failure("start", "bind", path=str(path), message=str(error)) from error
    finally:
        os.umask(previous)
    path.chmod(0o660)
    await server.start()
    return server


def _clear(path: Path) -> None:
    """Makes the directory (0700) if it is missing and removes a socket that a killed daemon left. Never removes anything else."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise Failure("start", "bind", path=str(path), message="exists and is not a socket")
    path.unlink()
