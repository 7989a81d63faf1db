"""Which namespaces a container gets: the pod's, its own, another container's or the host's."""

from __future__ import annotations

from cri.errors import InvalidArgument, Unimplemented
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import Namespace, NamespaceType

_OPTIONS = "linux.security_context.namespace_options"


def of_container(container: v1.NamespaceOption, pod: v1.NamespaceOption, *, own_cgroup: bool) -> tuple[Namespace, ...]:
    """Network, IPC and UTS follow the pod, whatever the container's options say (as in containerd); PID is the container's choice.

    UTS goes with the network: a pod in the host's network has the host's name.
    """
    refuse_user_namespace(container, "config")
    wanted = [Namespace(NamespaceType.MOUNT)]
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
    refuse_user_namespace(pod, "config")
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
    return tuple(wanted)


def refuse_user_namespace(options: v1.NamespaceOption, prefix: str) -> None:
    """User namespaces come with idmapped roots; until then a pod that asks for one must not run without."""
    users = options.userns_options
    if options.HasField("userns_options") and users.mode != v1.NODE:
        raise Unimplemented(f"{prefix}.{_OPTIONS}.userns_options: user namespaces are not built yet")
    if users.uids or users.gids:
        raise InvalidArgument("mappings without a user namespace", field=f"{prefix}.{_OPTIONS}.userns_options")
