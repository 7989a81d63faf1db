"""The edge around handlers, on a real server and client over a unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import server
from cri.api.interceptor import Edge, nul_field
from cri.errors import CriError, InvalidArgument, NotFound, RegistryUnavailable
from cri.undo import Undo
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc
from shim.errors import Failure

Run = Callable[[object, Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]]
RUNTIME = v1.DESCRIPTOR.services_by_name["RuntimeService"]


class Service(api_pb2_grpc.RuntimeServiceServicer):
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.cancelled = asyncio.Event()

    async def Version(self, request: v1.VersionRequest, context: Any) -> v1.VersionResponse:
        return v1.VersionResponse(runtime_name=request.version)

    async def ContainerStatus(self, request: v1.ContainerStatusRequest, context: Any) -> v1.ContainerStatusResponse:
        async with Undo("look") as undo:
            undo.push("hand back", lambda: 1 / 0)
            raise self.error or AssertionError("no error given")

    async def StopContainer(self, request: v1.StopContainerRequest, context: Any) -> v1.StopContainerResponse:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return v1.StopContainerResponse()

    async def GetContainerEvents(self, request: v1.GetEventsRequest, context: Any) -> AsyncIterator[v1.ContainerEventResponse]:
        yield v1.ContainerEventResponse(container_id="a")
        if self.error:
            raise self.error
        yield v1.ContainerEventResponse(container_id="b")


async def serve(tmp_path: Path, service: object, body: Callable[[Any], Coroutine[Any, Any, None]], **edge: Any) -> None:
    table = Edge("json", "info", **edge).handlers(service, RUNTIME)
    listening = await server.listen(tmp_path / "s", table)
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            await body(channel)
    finally:
        await listening.stop(0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


async def test_one_line_per_call_with_id_and_duration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, str]] = []

    async def body(channel: grpc.aio.Channel) -> None:
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        assert (await stub.Version(v1.VersionRequest(version="x"))).runtime_name == "x"
        assert [e.container_id async for e in stub.GetContainerEvents(v1.GetEventsRequest())] == ["a", "b"]

    await serve(tmp_path, Service(), body, observe=lambda method, code, seconds: seen.append((method, code)))
    first, second = lines(capsys)
    assert (first["message"], first["code"], first["level"]) == ("Version", "OK", "info")
    assert first["ms"] >= 0
    assert second["message"] == "GetContainerEvents"
    assert first["request"] != second["request"]
    assert seen == [("Version", "OK"), ("GetContainerEvents", "OK")]


async def test_polls_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        await stub.Version(v1.VersionRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ContainerStatus(v1.ContainerStatusRequest())

    await serve(tmp_path, Service(NotFound("gone")), body, polls=False)
    assert [line["message"] for line in lines(capsys)] == ["ContainerStatus"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NotFound("no container 1234"), "NOT_FOUND", "no container 1234"),
        (InvalidArgument("must be positive", field="config.x"), "INVALID_ARGUMENT", "config.x: must be positive"),
        (RegistryUnavailable("dial"), "UNKNOWN", "RegistryUnavailable: dial"),
        (Failure("create container", "mount", errno=1, path="/proc"), "UNKNOWN", "create container: mount /proc: EPERM"),
        (Failure("start container", "exec", errno=2, path="/x"), "UNKNOWN", "start container: exec /x: ENOENT"),
        (Failure("run pod", "connect", errno=110), "DEADLINE_EXCEEDED", "run pod: connect: ETIMEDOUT"),
        (OSError(28, "x", "/var"), "UNKNOWN", "/var: ENOSPC"),
        (TimeoutError(), "DEADLINE_EXCEEDED", "timed out"),
        (KeyError("x"), "INTERNAL", "KeyError"),
        (CriError("x" * 9000), "UNKNOWN", " ..."),
        (CriError("bad \udcff name"), "UNKNOWN", "bad \\udcff name"),
    ],
)
async def test_errors_become_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: str, text: str) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ContainerStatus(v1.ContainerStatusRequest(container_id="1234"))
        assert caught.value.code().name == code
        assert text in (caught.value.details() or "")

    await serve(tmp_path, Service(error), body)
    line = lines(capsys)[0]
    assert (line["code"], line["level"], line["container"]) == (code, "warning", "1234")
    assert line["undo"] == "undo look: hand back: division by zero"


async def test_error_in_a_stream(tmp_path: Path) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        got = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in api_pb2_grpc.RuntimeServiceStub(channel).GetContainerEvents(v1.GetEventsRequest()):
                got.append(event.container_id)
        assert got == ["a"]
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    await serve(tmp_path, Service(NotFound("gone")), body)


async def test_unbuilt_methods_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CheckpointPod(v1.CheckpointPodRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "CheckpointPod is not built" in (caught.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.StreamContainers(v1.StreamContainersRequest()):
                pass
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    await serve(tmp_path, Service(), body)
    assert [line["code"] for line in lines(capsys)] == ["UNIMPLEMENTED", "UNIMPLEMENTED"]


async def test_a_client_that_leaves_cancels_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service()

    async def body(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api_pb2_grpc.RuntimeServiceStub(channel).StopContainer(v1.StopContainerRequest(timeout=3), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(service.cancelled.wait(), 5)
        await asyncio.sleep(0.01)

    await serve(tmp_path, service, body)
    assert [(line["code"], line["timeout"]) for line in lines(capsys)] == [("CANCELLED", 3)]


@pytest.mark.parametrize("raw", [b"\x0a\x02\xff\xfe", b"\x0a\xff", b"\x0a\x03a\0b", b"\x0a\x03\xed\xa0\x80"])
async def test_bytes_that_are_no_text_are_refused(tmp_path: Path, raw: bytes) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/runtime.v1.RuntimeService/Version")(raw)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    await serve(tmp_path, Service(), body)


async def test_messages_up_to_16_mib(tmp_path: Path) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        wide = grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}", options=[("grpc.max_receive_message_length", -1)])
        stub = api_pb2_grpc.RuntimeServiceStub(wide)
        text = "x" * (server.MESSAGE_MAX - 1024)
        assert (await stub.Version(v1.VersionRequest(version=text))).runtime_name == text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Version(v1.VersionRequest(version="x" * server.MESSAGE_MAX))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await wide.close()

    await serve(tmp_path, Service(), body)


async def test_socket_is_private_and_replaces_only_sockets(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    listening = await server.listen(path, {})
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.parent.stat().st_mode & 0o777 == 0o700
    await listening.stop(0)
    again = await server.listen(path, {})
    await again.stop(0)
    path.unlink(missing_ok=True)
    path.write_text("a file")
    with pytest.raises(Failure, match="not a socket"):
        await server.listen(path, {})
    assert path.read_text() == "a file"


def test_where_a_nul_is() -> None:
    request = v1.CreateContainerRequest()
    request.config.linux.security_context.run_as_user.value = 0
    assert b"\0" in request.SerializeToString()
    assert nul_field(request) == ""
    request.config.envs.add(key="A", value=b"a\0b")
    assert nul_field(request) == "config.envs.value"
    request.config.command.append("a\0")
    assert nul_field(request) == "config.command"
    del request.config.command[:], request.config.envs[:]
    request.sandbox_config.labels["a\0"] = "b"
    assert nul_field(request) == "sandbox_config.labels"
