"""CRI messages with defaults that a kubelet would send, for hack/ and the tests."""

from __future__ import annotations

import itertools
import os
from typing import Any

from protos.runtime.v1 import api_pb2 as v1

_serial = itertools.count(1)


def unique(prefix: str = "pod") -> str:
    """A name that nothing else of this process uses."""
    return f"{prefix}-{os.getpid()}-{next(_serial)}"


def pod_config(
    name: str = "",
    *,
    namespace: str = "default",
    attempt: int = 0,
    uid: str = "",
    cgroup_parent: str = "",
    log_directory: str = "",
    host_network: bool = False,
    host_pid: bool = False,
    host_ipc: bool = False,
    shared_pid: bool = False,
    hostname: str = "",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    sysctls: dict[str, str] | None = None,
    **fields: Any,
) -> v1.PodSandboxConfig:
    """A pod. PID namespaces are per container, as the kubelet asks by default; ``fields`` are further fields of the message."""
    name = name or unique()
    options = v1.NamespaceOption(
        network=v1.NODE if host_network else v1.POD,
        pid=v1.NODE if host_pid else v1.POD if shared_pid else v1.CONTAINER,
        ipc=v1.NODE if host_ipc else v1.POD,
    )
    return v1.PodSandboxConfig(
        metadata=v1.PodSandboxMetadata(name=name, namespace=namespace, uid=uid or f"uid-{name}", attempt=attempt),
        hostname=hostname or ("" if host_network else name[:63]),
        log_directory=log_directory,
        labels=labels or {},
        annotations=annotations or {},
        linux=v1.LinuxPodSandboxConfig(
            cgroup_parent=cgroup_parent,
            sysctls=sysctls or {},
            security_context=v1.LinuxSandboxSecurityContext(namespace_options=options),
        ),
        **fields,
    )


def container_config(
    image: str,
    *command: str,
    name: str = "",
    attempt: int = 0,
    args: tuple[str, ...] = (),
    pod: v1.PodSandboxConfig | None = None,
    env: dict[str, str] | None = None,
    mounts: tuple[v1.Mount, ...] = (),
    resources: v1.LinuxContainerResources | None = None,
    security: v1.LinuxContainerSecurityContext | None = None,
    log_path: str | None = None,
    **fields: Any,
) -> v1.ContainerConfig:
    """A container. Its namespace options are copied from ``pod`` as the kubelet does; the log is ``<name>-<attempt>.log``."""
    name = name or unique("ctr")
    context = v1.LinuxContainerSecurityContext()
    if security is not None:
        context.CopyFrom(security)
    if not context.HasField("namespace_options"):
        options = (
            pod.linux.security_context.namespace_options
            if pod is not None
            else v1.NamespaceOption(network=v1.POD, pid=v1.CONTAINER, ipc=v1.POD)
        )
        context.namespace_options.CopyFrom(options)
    return v1.ContainerConfig(
        metadata=v1.ContainerMetadata(name=name, attempt=attempt),
        image=v1.ImageSpec(image=image),
        command=command,
        args=args,
        envs=[v1.KeyValue(key=k, value=v.encode()) for k, v in (env or {}).items()],
        mounts=mounts,
        log_path=f"{name}-{attempt}.log" if log_path is None else log_path,
        linux=v1.LinuxContainerConfig(resources=resources, security_context=context),
        **fields,
    )
