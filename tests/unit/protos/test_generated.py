"""The committed generated code is what the proto says, and the proto is CRI v1 of cri-api v0.37."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from protos.runtime.v1 import api_pb2

ROOT = Path(__file__).resolve().parents[3]
PROTO = "protos/runtime/v1/api.proto"
#: Over `shape()` of the upstream file at cri-api v0.37. Changes only together with the API version.
UPSTREAM_SHAPE = "a73c9c893cb6433bfde3bde23e34968271b8a6d5e0448d7b7d9b916cc4ef9c10"


@pytest.mark.parametrize("proto", [PROTO, "protos/people/v1/people.proto"])
def test_generated_code_is_current(tmp_path: Path, proto: str) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is a development dependency")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, proto], check=True, cwd=ROOT, timeout=60)
    for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        name = proto.removesuffix(".proto") + suffix
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is stale: see the header of {proto}"


def test_every_rpc_is_there() -> None:
    services = api_pb2.DESCRIPTOR.services_by_name
    assert len(services["RuntimeService"].methods) == 37
    assert len(services["ImageService"].methods) == 6
    streaming = {m.name for s in services.values() for m in s.methods if m.server_streaming}
    assert streaming == {
        "GetContainerEvents",
        "StreamContainers",
        "StreamContainerStats",
        "StreamImages",
        "StreamPodSandboxes",
        "StreamPodSandboxMetrics",
        "StreamPodSandboxStats",
    }
    assert not any(m.client_streaming for s in services.values() for m in s.methods)


def test_wire_shape_is_upstreams() -> None:
    assert hashlib.sha256("\n".join(shape()).encode()).hexdigest() == UPSTREAM_SHAPE


def test_secrets_are_marked() -> None:
    """Text formatting of a request in a log or a traceback must not print credentials."""
    fields = api_pb2.AuthConfig.DESCRIPTOR.fields
    assert {f.name for f in fields if f.GetOptions().debug_redact} == {"password", "auth", "identity_token", "registry_token"}


def shape() -> list[str]:
    """Every name, number and type on the wire, sorted."""
    file = api_pb2.DESCRIPTOR
    lines = [f"package {file.package}"]
    for message in file.message_types_by_name.values():
        lines += _message(message)
    for enum in file.enum_types_by_name.values():
        lines += _enum(enum)
    for service in file.services_by_name.values():
        lines += [f"{m.full_name}({m.input_type.full_name}) {m.output_type.full_name} {m.server_streaming}" for m in service.methods]
    return sorted(lines)


def _message(message: Descriptor) -> Iterator[str]:
    yield message.full_name
    for field in message.fields:
        yield f"{field.full_name} {field.number} {_type(field)}"
    for nested in message.nested_types:
        yield from _message(nested)
    for enum in message.enum_types:
        yield from _enum(enum)


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    yield from (f"{enum.full_name} {value.name} {value.number}" for value in enum.values)


def _type(field: FieldDescriptor) -> str:
    target = field.message_type or field.enum_type
    oneof = field.containing_oneof.name if field.containing_oneof else ""
    return f"{field.type} {'repeated' if field.is_repeated else ''} {target.full_name if target else ''} {oneof}"
