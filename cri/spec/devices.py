"""Device nodes and device cgroup rules."""

from __future__ import annotations

from collections.abc import Iterable

from cri.errors import InvalidArgument
from cri.spec import strings
from cri.spec.inputs import HandlerConfig, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

_DENY = oci.DeviceCgroup(False, access="rwm")
_ALLOW = oci.DeviceCgroup(True, access="rwm")
# Making any node is harmless where opening it is not allowed; the named ones are those of a default /dev.
_DEFAULT_RULES = (
    _DENY,
    oci.DeviceCgroup(True, "c", access="m"),
    oci.DeviceCgroup(True, "b", access="m"),
    *(
        oci.DeviceCgroup(True, "c", major, minor, "rwm")
        # null, zero, full, random, urandom, tty, console, ptmx, pts/*
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))
    ),
)
# Made or mounted for each container; the host's would hide or leak into them.
_NOT_FROM_HOST = frozenset({"/dev/console", "/dev/ptmx", "/dev/tty", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"})


def build(
    config: v1.ContainerConfig, host: HostFacts, handler: HandlerConfig
) -> tuple[tuple[oci.Device, ...], tuple[oci.DeviceCgroup, ...]]:
    """Nodes and rules: the request's devices, for a privileged container all of the host's."""
    nodes: dict[str, oci.Device] = {}
    rules = list(_DEFAULT_RULES)
    for i, device in enumerate(config.devices):
        for node in _requested(device, f"config.devices[{i}]", host):
            nodes[node.path] = node
            rules.append(oci.DeviceCgroup(True, node.type, node.major, node.minor, _permissions(device, f"config.devices[{i}]")))
    if config.linux.security_context.privileged:
        if not handler.privileged_without_host_devices:
            nodes = _host_nodes(host) | nodes
            rules = [_ALLOW]
        elif handler.privileged_without_host_devices_all_devices_allowed:
            rules = [_ALLOW]
    return tuple(nodes.values()), tuple(rules)


def _host_nodes(host: HostFacts) -> dict[str, oci.Device]:
    return {d.path: d for d in host.devices("/dev") if d.path not in _NOT_FROM_HOST and d.type in ("c", "b")}


def _permissions(device: v1.Device, field: str) -> str:
    if not device.permissions or set(device.permissions) - set("rwm"):
        raise InvalidArgument(f"{device.permissions!r:.40} is not of r, w and m", field=f"{field}.permissions")
    return device.permissions


def _requested(device: v1.Device, field: str, host: HostFacts) -> Iterable[oci.Device]:
    """The node a request names, or every node below the directory it names, under the container's path."""
    source = strings.absolute(device.host_path, f"{field}.host_path")
    target = strings.absolute(device.container_path or device.host_path, f"{field}.container_path")
    try:
        found = host.devices(source)
    except OSError as e:
        raise InvalidArgument(f"{source!r:.200}: {e.strerror}", field=f"{field}.host_path") from None
    if not found:
        raise InvalidArgument(f"{source!r:.200} is not a device and has none below it", field=f"{field}.host_path")
    for node in found:
        path = target + node.path.removeprefix(source)
        yield oci.Device(path, node.type, node.major, node.minor, node.file_mode, node.uid, node.gid)
