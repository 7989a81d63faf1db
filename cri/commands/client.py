"""The connection of the people's commands to the daemon: a plain CRI client, nothing that crictl could not do."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from protos.runtime.v1 import api_pb2_grpc

RpcError = grpc.RpcError


class CommandError(Exception):
    """One line for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """The two services over one channel."""

    channel: grpc.Channel
    runtime: api_pb2_grpc.RuntimeServiceStub
    images: api_pb2_grpc.ImageServiceStub

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.channel.close()


def connect(socket: str) -> Daemon:
    """Lazy: the first call connects."""
    channel = grpc.insecure_channel(f"unix:{socket}", options=(("grpc.max_receive_message_length", 16 << 20),))
    stubs: Any = api_pb2_grpc  # generated, without types
    return Daemon(channel, stubs.RuntimeServiceStub(channel), stubs.ImageServiceStub(channel))


def explain(error: grpc.RpcError, socket: str) -> str:
    """What a person wants to read of a failed call."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and ("connect" in details or "No such file" in details):
        return f"no daemon answers at {socket} (is `cri-shim serve` running, and are you root?)"
    return f"{details} ({code.name})" if details else code.name
