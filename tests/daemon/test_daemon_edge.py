"""The gRPC edge over the real socket: what every RPC has in common, and the RPCs about the runtime itself."""

from __future__ import annotations

import json
import re

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import MESSAGE_LIMIT, Daemon, wait_for


def test_version(daemon: Daemon) -> None:
    reply = daemon.runtime.Version(v1.VersionRequest(version="v1"), timeout=5)
    assert (reply.runtime_name, reply.runtime_api_version) == ("cri-shim", "v1")
    assert re.fullmatch(r"\d+\.\d+\.\d+([-+].*)?", reply.runtime_version)


def test_status(daemon: Daemon) -> None:
    def ready() -> dict[str, bool]:
        reply = daemon.runtime.Status(v1.StatusRequest(), timeout=5)
        assert not reply.info
        found = {c.type: c.status for c in reply.status.conditions}
        return found if all(found.values()) else {}

    assert wait_for("both conditions", ready) == {"RuntimeReady": True, "NetworkReady": True}
    reply = daemon.runtime.Status(v1.StatusRequest(verbose=True), timeout=5)
    assert [h.name for h in reply.runtime_handlers] == [""]
    assert reply.runtime_handlers[0].features.recursive_read_only_mounts
    assert json.loads(reply.info["config"])["root"] == str(daemon.root)


def test_runtime_config(daemon: Daemon) -> None:
    assert daemon.runtime.RuntimeConfig(v1.RuntimeConfigRequest(), timeout=5).linux.cgroup_driver == v1.CGROUPFS
    daemon.runtime.UpdateRuntimeConfig(v1.UpdateRuntimeConfigRequest(), timeout=5)


@pytest.mark.parametrize(
    ("name", "request_type"),
    [
        ("CheckpointPod", v1.CheckpointPodRequest),
        ("RestorePod", v1.RestorePodRequest),
        ("CheckpointContainer", v1.CheckpointContainerRequest),
    ],
)
def test_what_is_not_built_says_so(daemon: Daemon, name: str, request_type: type) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(daemon.runtime, name)(request_type(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert name in caught.value.details()


def test_unknown_method_is_unimplemented(daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.channel.unary_unary("/runtime.v1.RuntimeService/NoSuchThing")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("raw", [b"\x0a\x04\xff\xfe\xfd\xfc", b"\x0a\x03a\0b", b"\x0a\xff\xff", b"\x0a\x03\xed\xa0\x80"])
def test_what_is_no_text_is_an_invalid_argument(daemon: Daemon, raw: bytes) -> None:
    for method in ("ContainerStatus", "StopPodSandbox", "ExecSync"):
        with pytest.raises(grpc.RpcError) as caught:
            daemon.channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(raw, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_big_messages(daemon: Daemon) -> None:
    request = v1.ContainerStatusRequest(container_id="x" * (MESSAGE_LIMIT - 100))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.ContainerStatus(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND, "it arrived, and its error text fits into a header"
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id="x" * MESSAGE_LIMIT), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_one_line_per_call(daemon: Daemon) -> None:
    before = len(daemon.log.read_text())
    with pytest.raises(grpc.RpcError):
        daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id='no\n"such'), timeout=5)
    line = wait_for("the line", lambda: [x for x in daemon.log.read_text()[before:].splitlines() if "ContainerStatus" in x])[0]
    assert re.search(r"WARNING ContainerStatus request=\S+ code=NOT_FOUND ms=[\d.]+ container=\"no\\n\\\"such\" error=", line)
