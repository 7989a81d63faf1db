"""CDI edits to an OCI specification, by the rules of the reference implementation: environment, devices, mounts, hooks, groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from cri.cdi import model
from cri.cdi.model import NO_PERMISSIONS, DeviceNode, Edits
from cri.errors import FailedPrecondition, Unimplemented
from cri.spec import strings
from cri.spec.inputs import HostFacts
from shim.oci import spec as oci
from shim.oci.spec import NamespaceType

_ATTRIBUTES: Final = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}


def apply(spec: oci.Spec, edits: Sequence[Edits], host: HostFacts) -> oci.Spec:
    """The specification with the edits made, in order. Raises FailedPrecondition for a device that the host does not have."""
    if not edits:
        return spec
    for one in edits:
        _refuse(one, host)
        spec = _devices(spec, one.device_nodes or (), host)
        spec = replace(
            spec,
            process=_process(spec.process, one),
            mounts=_mounts(spec, one.mounts or ()),
            hooks=_hooks(spec.hooks or oci.Hooks(), one.hooks or ()),
        )
    return spec if spec.hooks != oci.Hooks() else replace(spec, hooks=None)


def _refuse(edits: Edits, host: HostFacts) -> None:
    if edits.intel_rdt is not None:
        if not host.resctrl:
            raise FailedPrecondition("CDI intelRdt: this host has no resctrl file system (no Intel RDT, or it is not mounted)")
        raise Unimplemented("CDI intelRdt: classes of service are not built yet")


def _process(process: oci.Process, edits: Edits) -> oci.Process:
    variables = {entry.partition("=")[0]: entry for entry in process.env}
    variables |= {entry.partition("=")[0]: entry for entry in edits.env or ()}
    groups = dict.fromkeys((*process.user.additional_gids, *(gid for gid in edits.additional_gids or () if gid)))
    user = replace(process.user, additional_gids=tuple(groups))
    return replace(process, env=tuple(variables.values()), user=user)


def _devices(spec: oci.Spec, nodes: Iterable[DeviceNode], host: HostFacts) -> oci.Spec:
    devices = {device.path: device for device in spec.linux.devices}
    resources = spec.linux.resources or oci.Resources()
    rules = list(resources.devices)
    for node in nodes:
        device = _mapped(_device(node, spec.process.user, host), spec.linux)
        devices[device.path] = device
        # An empty set of permissions is no rule: an empty access in one means all three.
        if device.type in ("b", "c") and node.permissions != NO_PERMISSIONS:
            rules.append(oci.DeviceCgroup(True, device.type, device.major, device.minor, node.permissions or "rwm"))
    linux = replace(spec.linux, devices=tuple(devices.values()), resources=replace(resources, devices=tuple(rules)))
    return replace(spec, linux=linux)


def _device(node: DeviceNode, user: oci.User, host: HostFacts) -> oci.Device:
    """The node with what the file leaves out, as it is on the host. Nodes of nobody in particular belong to the container's user."""
    path, source = strings.clean(node.path), node.host_path or node.path
    kind, major, minor, mode = node.type, node.major or 0, node.minor or 0, node.file_mode
    if not kind or (not major and kind != "p"):
        found = _on_host(source, host)
        if kind and {"u": "c"}.get(kind, kind) != found.type:
            raise FailedPrecondition(f"CDI device {source!r:.200} is of type {found.type} on this host, not {kind}")
        kind, mode = kind or found.type, found.file_mode if mode is None else mode
        if not major and kind != "p":
            major, minor = found.major, found.minor
    uid = node.uid if node.uid is not None else user.uid or None
    gid = node.gid if node.gid is not None else user.gid or None
    return oci.Device(path, kind, major, minor, mode, uid, gid)


def _mapped(device: oci.Device, linux: oci.Linux) -> oci.Device:
    """CDI's owners are ids inside; /dev of a container in a user namespace is made outside, with the ids that they are there."""

    def outside(mappings: tuple[oci.IDMapping, ...], number: int | None) -> int | None:
        if number is None or not mappings:
            return number
        return next((m.host_id + number - m.container_id for m in mappings if m.container_id <= number < m.container_id + m.size), number)

    return replace(device, uid=outside(linux.uid_mappings, device.uid), gid=outside(linux.gid_mappings, device.gid))


def _on_host(source: str, host: HostFacts) -> oci.Device:
    try:
        found = host.devices(source)
    except OSError as error:
        raise FailedPrecondition(f"CDI device {source!r:.200}: {error.strerror}") from None
    if len(found) != 1 or found[0].path != source:
        raise FailedPrecondition(f"CDI device {source!r:.200} is not a device on this host")
    return found[0]


def _mounts(spec: oci.Spec, mounts: Iterable[model.Mount]) -> tuple[oci.Mount, ...]:
    wanted = list(mounts)
    if not wanted:
        return spec.mounts
    mapped = spec.namespace(NamespaceType.USER) is not None
    merged = {mount.destination: mount for mount in spec.mounts}
    for mount in wanted:
        destination = strings.clean(mount.container_path)
        merged.pop(destination, None)
        merged[destination] = _mount(mount, destination, mapped)
    return tuple(sorted(merged.values(), key=lambda m: m.destination.count("/")))


def _mount(mount: model.Mount, destination: str, mapped: bool) -> oci.Mount:
    options, kind = tuple(mount.options or ()), mount.type
    if kind in ("", "none", "bind"):
        kind = "bind"
        if not {"bind", "rbind"} & set(options):
            options = ("rbind", *options)
    elif {"bind", "rbind"} & set(options):
        kind = "bind"
    if mapped and kind == "bind" and not {"idmap", "ridmap"} & set(options):
        options = (*options, "idmap")  # else its files would belong to nobody in the pod
    return oci.Mount(destination, kind, mount.host_path, options)


def _hooks(hooks: oci.Hooks, wanted: Iterable[model.Hook]) -> oci.Hooks:
    for hook in wanted:
        attribute = _ATTRIBUTES[hook.hook_name]
        made = oci.Hook(hook.path, tuple(hook.args or ()), tuple(hook.env or ()), hook.timeout)
        hooks = replace(hooks, **{attribute: (*getattr(hooks, attribute), made)})
    return hooks
