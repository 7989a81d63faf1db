"""A pod's namespaces, for the core."""

from __future__ import annotations

from collections.abc import Collection

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import cgroups, files, namespaces, security
from cri.spec.inputs import HandlerConfig, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.sandbox import Sandbox
from shim.oci.spec import NamespaceType
from shim.oci.validate import sysctl_namespace, sysctl_path

SHM_SIZE = 64 << 20
_SYSCTLS = "config.linux.sysctls"


def build(
    pod_id: str,
    config: v1.PodSandboxConfig,
    *,
    netns_path: str,
    userns_path: str = "",
    host: HostFacts,
    handler: HandlerConfig | None = None,
) -> Sandbox:
    """``Sandbox`` of a pod; ``netns_path`` is where its network namespace will be pinned, unused with the host's network, and
    ``userns_path`` its user namespace, unused without one and where the network namespace leads to it."""
    security.check_sandbox(config.linux.security_context)
    options = config.linux.security_context.namespace_options
    kinds = namespaces.of_pod(options)
    mappings = namespaces.user_mappings(options)
    if mappings is not None and host.no_user_namespaces:
        raise FailedPrecondition(f"config.linux.security_context.namespace_options.userns_options: {host.no_user_namespaces}")
    own_network = NamespaceType.NETWORK in kinds
    parent = config.linux.cgroup_parent
    cgroups_path = cgroups.path(parent, pod_id, host.cgroup_driver)  # checks the parent even where nothing of ours goes below it
    return Sandbox(
        id=pod_id,
        namespaces=kinds,
        hostname=files.pod_hostname(config, host) if NamespaceType.UTS in kinds else "",
        netns_path=netns_path if own_network else "",
        sysctl=sysctls(config, kinds, handler or HandlerConfig(), ipv6=host.ipv6),
        userns_path=userns_path if mappings is not None and not own_network else "",
        uid_mappings=mappings[:1] if mappings is not None else (),
        gid_mappings=mappings[1:] if mappings is not None else (),
        shm_size=SHM_SIZE if NamespaceType.IPC in kinds else 0,
        cgroups_path=cgroups_path if NamespaceType.PID in kinds else "",
    )


def sysctls(
    config: v1.PodSandboxConfig, kinds: Collection[NamespaceType], handler: HandlerConfig, *, ipv6: bool = False
) -> dict[str, str]:
    """The request's, each checked to belong to a namespace of the pod's own; with the defaults that containerd 2 sets too.

    CVE-2022-0811 put a second setting into a value with ``+``; CVE-2022-0532 wrote to the host through hostNetwork and hostIPC.
    CVE-2020-10749: a pod that sends router advertisements would become the router of its neighbours.
    """
    settings: dict[str, str] = {}
    if NamespaceType.NETWORK in kinds:
        if ipv6:
            settings["net.ipv6.conf.all.accept_ra"] = "0"
            settings["net.ipv6.conf.default.accept_ra"] = "0"
        if handler.unprivileged_ports:
            settings["net.ipv4.ip_unprivileged_port_start"] = "0"
        if handler.unprivileged_icmp:
            settings["net.ipv4.ping_group_range"] = "0 2147483647"
    files_set: dict[tuple[str, ...], str] = {}
    for name, value in config.linux.sysctls.items():
        field = f"{_SYSCTLS}[{name!r:.80}]"
        path, kind = sysctl_path(name), sysctl_namespace(name)
        if path is None or kind is None:
            raise InvalidArgument("is not a sysctl of a namespace", field=field)
        if kind not in kinds:
            raise InvalidArgument(f"the {kind} namespace is the host's", field=field)
        if not value or "+" in value or any(not c.isprintable() and c != "\t" for c in value):
            raise InvalidArgument("the value is empty or has a separator or control character", field=field)
        if path in files_set:
            raise InvalidArgument(f"is the same as {files_set[path]!r:.80}", field=field)
        files_set[path] = name
    for name, path in ((n, sysctl_path(n)) for n in list(settings)):
        if path in files_set:
            del settings[name]
    return settings | dict(config.linux.sysctls)
