"""Which namespaces a container gets: the pod's, its own, another container's or the host's; and the pod's user namespace's ids."""

from __future__ import annotations

from collections.abc import Sequence

from cri.errors import InvalidArgument
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import IDMapping, Namespace, NamespaceType
from shim.oci.validate import MAX_ID

_OPTIONS = "linux.security_context.namespace_options"


def of_container(container: v1.NamespaceOption, pod: v1.NamespaceOption, *, own_cgroup: bool) -> tuple[Namespace, ...]:
    """Network, IPC and UTS follow the pod, whatever the container's options say (as in containerd); PID is the container's choice.

    UTS goes with the network: a pod in the host's network has the host's name.
    """
    wanted = [Namespace(NamespaceType.MOUNT)]
    if user_mappings(pod) is not None:
        wanted.append(Namespace(NamespaceType.USER, "pod:user"))
    if container.HasField("userns_options") and user_mappings(container) != user_mappings(pod):
        raise InvalidArgument("not the sandbox's", field=f"config.{_OPTIONS}.userns_options")
    for name, mode, of in (("network", container.network, pod.network), ("ipc", container.ipc, pod.ipc)):
        if mode == v1.NODE and of != v1.NODE:
            raise InvalidArgument("NODE, but the pod has a namespace of its own", field=f"config.{_OPTIONS}.{name}")
    if pod.network != v1.NODE:
        wanted += [Namespace(NamespaceType.NETWORK, "pod:network"), Namespace(NamespaceType.UTS, "pod:uts")]
    if pod.ipc != v1.NODE:
        wanted.append(Namespace(NamespaceType.IPC, "pod:ipc"))
    pid = _pid(container, pod)
    if pid is not None:
        wanted.append(pid)
    if own_cgroup:
        wanted.append(Namespace(NamespaceType.CGROUP))
    return tuple(wanted)


def _pid(container: v1.NamespaceOption, pod: v1.NamespaceOption) -> Namespace | None:
    field = f"config.{_OPTIONS}"
    if container.pid == v1.TARGET:
        if not container.target_id:
            raise InvalidArgument("is empty, but pid is TARGET", field=f"{field}.target_id")
        return Namespace(NamespaceType.PID, "target:pid")
    if container.pid == v1.CONTAINER:
        return Namespace(NamespaceType.PID)
    if container.pid == v1.NODE and pod.pid != v1.NODE:
        raise InvalidArgument("NODE, but the pod is not in the host's PID namespace", field=f"{field}.pid")
    if pod.pid == v1.NODE:
        return None
    # POD in a pod whose containers have one each: there is no shared namespace to join, so it gets its own as the others do.
    return Namespace(NamespaceType.PID, "pod:pid" if pod.pid == v1.POD else "")


def of_pod(pod: v1.NamespaceOption) -> tuple[NamespaceType, ...]:
    """The namespaces that exist once per pod."""
    for name, mode in (("network", pod.network), ("ipc", pod.ipc)):
        if mode not in (v1.POD, v1.NODE):
            raise InvalidArgument(f"{v1.NamespaceMode.Name(mode)} is not a choice for a pod", field=f"config.{_OPTIONS}.{name}")
    if pod.pid == v1.TARGET:
        raise InvalidArgument("TARGET is not a choice for a pod", field=f"config.{_OPTIONS}.pid")
    wanted: list[NamespaceType] = []
    if pod.network == v1.POD:
        wanted += [NamespaceType.NETWORK, NamespaceType.UTS]
    if pod.ipc == v1.POD:
        wanted.append(NamespaceType.IPC)
    if pod.pid == v1.POD:
        wanted.append(NamespaceType.PID)
    if user_mappings(pod) is not None:
        if pod.pid == v1.NODE:
            raise InvalidArgument("NODE, which a user namespace excludes: /proc would be the host's", field=f"config.{_OPTIONS}.pid")
        wanted.append(NamespaceType.USER)
    return tuple(wanted)


def user_mappings(pod: v1.NamespaceOption) -> tuple[IDMapping, IDMapping] | None:
    """How the uids and gids of the pod's user namespace are mapped; None where it is in the host's.

    One mapping from container id 0 on, the same for both kinds, is what the kubelet makes and containerd takes.
    """
    users, field = pod.userns_options, f"config.{_OPTIONS}.userns_options"
    if not pod.HasField("userns_options"):
        return None
    if users.mode == v1.NODE:
        if users.uids or users.gids:
            raise InvalidArgument("mappings without a user namespace (mode NODE)", field=field)
        return None
    if users.mode != v1.POD:
        name = v1.NamespaceMode.Name(users.mode) if users.mode in v1.NamespaceMode.values() else str(users.mode)
        raise InvalidArgument(f"{name} is not a choice for a user namespace", field=f"{field}.mode")
    uids, gids = (_only_mapping(m, f"{field}.{name}") for name, m in (("uids", users.uids), ("gids", users.gids)))
    if uids != gids:
        raise InvalidArgument("is not the mapping of uids", field=f"{field}.gids")
    return uids, gids


def _only_mapping(mappings: Sequence[v1.IDMapping], field: str) -> IDMapping:
    if len(mappings) != 1:
        raise InvalidArgument(f"{len(mappings)} mappings, and exactly one is supported", field=field)
    return id_mapping(mappings[0], f"{field}[0]", from_root=True)


def id_mapping(mapping: v1.IDMapping, field: str, *, from_root: bool = False) -> IDMapping:
    """One mapping, checked against the range of ids."""
    if mapping.length < 1:
        raise InvalidArgument("must be at least 1", field=f"{field}.length")
    if from_root and mapping.container_id != 0:
        raise InvalidArgument("must be 0: root has to be mapped", field=f"{field}.container_id")
    if max(mapping.host_id, mapping.container_id) + mapping.length - 1 > MAX_ID:
        raise InvalidArgument("the last id is out of range", field=f"{field}.length")
    return IDMapping(mapping.container_id, mapping.host_id, mapping.length)
