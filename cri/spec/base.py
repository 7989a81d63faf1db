"""A handler's base specification: what its containers have where neither the request nor we say anything. Pure.

As with containerd's ``base_runtime_spec`` (usually the output of ``ctr oci spec`` with limits or mounts added), what a request always
decides is not taken from it, however it stands there: arguments, working directory, user, capabilities, seccomp, AppArmor, SELinux,
no_new_privileges, masked and read-only paths, namespaces, id mappings, the cgroup, the root. Everything that we would not carry out is
an error when the daemon starts.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from shim.errors import Failure
from shim.oci import codec, validate
from shim.oci import spec as oci
from shim.oci.spec import NamespaceType

T = TypeVar("T")

_NAMESPACES = tuple(
    oci.Namespace(kind)
    for kind in (NamespaceType.MOUNT, NamespaceType.PID, NamespaceType.NETWORK, NamespaceType.IPC, NamespaceType.UTS, NamespaceType.CGROUP)
)


def parse(data: bytes) -> oci.Spec:
    """A whole or partial ``config.json``. Raises Failure naming the field that cannot be used."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Failure("base specification", message=f"not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise Failure("base specification", message="not a JSON object")
    for unknown in _unknown(tree, oci.Spec, ""):
        raise Failure("base specification", path=unknown, message="is not a field that cri-shim carries out")
    tree = {"ociVersion": "1.2.0", **tree}
    tree["root"] = {"path": "rootfs"}
    tree["process"] = {**(tree.get("process") or {}), "args": ["x"], "cwd": "/", "terminal": False}
    spec = codec.from_json(oci.Spec, tree)
    linux = oci.Linux(
        _NAMESPACES,
        devices=spec.linux.devices,
        resources=spec.linux.resources,
        rootfs_propagation=spec.linux.rootfs_propagation,
        sysctl=spec.linux.sysctl,
    )
    plain = oci.Process(spec.process.args)
    process = replace(
        plain,
        env=spec.process.env,
        rlimits=spec.process.rlimits,
        oom_score_adj=spec.process.oom_score_adj,
        exec_cpu_affinity=spec.process.exec_cpu_affinity,
        user=oci.User(umask=spec.process.user.umask),
    )
    spec = replace(spec, linux=linux, process=process, hostname="", domainname="")
    validate.validate(spec)
    for i, mount in enumerate(spec.mounts):
        if mount.type == "image" or mount.source.startswith("pod:"):
            raise Failure("base specification", path=f"mounts[{i}]", message="is not a mount that a file can ask for")
    return spec


def _unknown(tree: object, kind: Any, at: str) -> Iterator[str]:
    """Paths of keys that the codec would skip, unless their value says nothing."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        yield from _unknown(tree, arguments[0], at)
    elif origin is tuple and isinstance(tree, list):
        for i, item in enumerate(tree):
            yield from _unknown(item, arguments[0], f"{at}[{i}]")
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(tree, dict):
        hints = typing.get_type_hints(kind)
        known = {codec.json_name(field): hints[field.name] for field in dataclasses.fields(kind)}
        for key, value in tree.items():
            path = f"{at}.{key}" if at else str(key)
            if key in known:
                yield from _unknown(value, known[key], path)
            elif value is not False and value not in (None, {}, [], ""):
                yield path


def under(base: oci.Spec, spec: oci.Spec) -> oci.Spec:
    """``spec`` with the base's where it has nothing of its own. The mounts are merged where they are made."""
    own = spec.process
    names = {entry.partition("=")[0] for entry in own.env}
    limited = {limit.type for limit in own.rlimits}
    process = replace(
        own,
        env=(*(entry for entry in base.process.env if entry.partition("=")[0] not in names), *own.env),
        rlimits=(*own.rlimits, *(limit for limit in base.process.rlimits if limit.type not in limited)),
        oom_score_adj=base.process.oom_score_adj if own.oom_score_adj is None else own.oom_score_adj,
        exec_cpu_affinity=own.exec_cpu_affinity or base.process.exec_cpu_affinity,
        user=replace(own.user, umask=base.process.user.umask if own.user.umask is None else own.user.umask),
    )
    paths = {device.path for device in spec.linux.devices}
    linux = replace(
        spec.linux,
        devices=(*(device for device in base.linux.devices if device.path not in paths), *spec.linux.devices),
        resources=_resources(base.linux.resources or oci.Resources(), spec.linux.resources or oci.Resources()),
        sysctl=base.linux.sysctl | spec.linux.sysctl,
        rootfs_propagation=spec.linux.rootfs_propagation or base.linux.rootfs_propagation,
    )
    return replace(
        spec, process=process, linux=linux, hooks=_hooks(base.hooks, spec.hooks), annotations=base.annotations | spec.annotations
    )


def _resources(base: oci.Resources, own: oci.Resources) -> oci.Resources:
    # Ours begin with "nothing"; a base that does so too must not take back what follows.
    extra = tuple(rule for rule in base.devices if rule.allow or rule.type not in ("", "a") or rule.major is not None)
    merged = _under(replace(base, devices=(), unified={}), replace(own, devices=(), unified={}))
    return replace(merged, devices=(*own.devices, *extra), unified=base.unified | own.unified)


def _under(base: T, own: T) -> T:
    """Field by field: ours unless it is empty."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(own):  # type: ignore[arg-type]
        mine, other = getattr(own, field.name), getattr(base, field.name)
        if mine in (None, (), ""):
            changes[field.name] = other
        elif dataclasses.is_dataclass(mine) and other is not None:
            changes[field.name] = _under(other, mine)
    return replace(own, **changes)  # type: ignore[type-var]


def _hooks(base: oci.Hooks | None, own: oci.Hooks | None) -> oci.Hooks | None:
    if base is None or own is None:
        return own or base
    return oci.Hooks(*(getattr(base, f.name) + getattr(own, f.name) for f in dataclasses.fields(oci.Hooks)))
