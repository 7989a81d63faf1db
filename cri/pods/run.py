"""RunPodSandbox: directory and files, namespaces, network, record. The intent is on disk before anything outlives us."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cri import relabel
from cri.errors import AlreadyExists, InvalidArgument
from cri.network.base import Network
from cri.node import Node
from cri.pods.model import Pod, Pods, now, pod_name
from cri.spec import files, sandbox, selinux
from cri.spec.inputs import HostFacts
from cri.state import records, trees
from cri.state.layout import Layout
from cri.state.operations import Operation
from cri.state.records import PodFacts
from cri.supervisor import Supervisor
from cri.undo import Undo
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import bundle

INTENT = "intent.json"


async def run(
    request: v1.RunPodSandboxRequest,
    *,
    pods: Pods,
    supervisor: Supervisor,
    network: Network,
    node: Node,
    timeout: float | None = None,
) -> str:
    """The id of a ready sandbox with this configuration; a retry gets the id of the first call, in flight or done."""
    name = pod_name(request.config.metadata)
    if request.runtime_handler not in node.handlers:
        raise InvalidArgument(f"no handler {request.runtime_handler!r} is configured", field="runtime_handler")
    _check_log_directory(request.config.log_directory)
    existing = pods.store.named(name)
    if existing is not None:
        if existing.ready and existing.config == request.config and existing.facts.runtime_handler == request.runtime_handler:
            return existing.id
        kind = "ready with another configuration" if existing.ready else "not ready"
        raise AlreadyExists(f"sandbox name {name!r} belongs to {existing.id}, which is {kind}", hint="remove that sandbox first")

    async def work(operation: Operation) -> str:
        return await _make(operation, request, pods=pods, supervisor=supervisor, network=network, node=node)

    return await pods.operations.run(name, new_id, request, work, timeout=timeout)


async def _make(
    operation: Operation, request: v1.RunPodSandboxRequest, *, pods: Pods, supervisor: Supervisor, network: Network, node: Node
) -> str:
    layout, pod_id = pods.layout, operation.id
    config = v1.PodSandboxConfig()
    config.CopyFrom(request.config)
    facts = PodFacts(id=pod_id, boot_id=pods.boot_id, runtime_handler=request.runtime_handler)
    pod = Pod(facts, config, records.config_json(config))
    if not pod.host_network:
        facts.netns_path = str(layout.netns(pod_id))
    facts.selinux_level = _reserve_level(pod, pods, node.host)
    try:
        await _build(operation, pod, pods=pods, supervisor=supervisor, network=network, node=node)
    finally:
        pods.levels.discard(facts.selinux_level)
    operation.enter("answer")
    return pod_id


async def _build(operation: Operation, pod: Pod, *, pods: Pods, supervisor: Supervisor, network: Network, node: Node) -> None:
    layout, facts, config, pod_id = pods.layout, pod.facts, pod.config, pod.id
    async with Undo(f"run sandbox {config.metadata.namespace}/{config.metadata.name}") as undo:
        operation.enter("state directory")
        directory = layout.pod(pod_id)
        undo.push("remove state directory", partial(remove_directory, directory))
        write_directory(layout, pod, node)

        operation.enter("namespaces")
        undo.push("delete namespaces", partial(supervisor.delete_pod, pod_id))
        handles = await supervisor.create_pod(pod_id, directory)
        facts.pid = handles.pid
        if pod.host_network:
            if handles.netlink is not None:
                os.close(handles.netlink)
        else:
            operation.enter("network")
            undo.push("tear down network", partial(network.teardown, pod.network(partial(supervisor.pod_netlink, pod_id))))
            spare = [handles.netlink] if handles.netlink is not None else []
            try:
                result = await network.setup(pod.network(_netlink(supervisor, pod_id, spare)))
            finally:
                for fd in spare:  # CNI has no use for it, and an open one would keep the namespace alive
                    os.close(fd)
            # An empty address would make the kubelet throw the sandbox away: so they are in the record before it hears of the pod.
            facts.ips, facts.network = list(result.ips), dict(result.raw)
            _write_hosts(directory, pod, node.host)

        operation.enter("record")
        undo.push("remove record", partial(pods.records.remove, pod_id))
        facts.created_at = now()
        facts.stages = operation.took
        pods.commit(pod)


def _reserve_level(pod: Pod, pods: Pods, host: HostFacts) -> str:
    """The SELinux level that the request names, else one that no other pod has; empty where there are no labels."""
    options = pod.config.linux.security_context.selinux_options
    selinux.check(options, "config.linux.security_context.selinux_options")
    if host.selinux_contexts is None:
        return ""
    level = options.level or selinux.pick_level(host.selinux_contexts, {*pods.levels, *(p.facts.selinux_level for p in pods.store)})
    pods.levels.add(level)
    return level


def file_label(pod: Pod, host: HostFacts) -> str:
    """SELinux label of what is made for the pod's containers; empty for none."""
    if host.selinux_contexts is None:
        return ""
    options, field = pod.config.linux.security_context.selinux_options, "config.linux.security_context.selinux_options"
    return selinux.labels(options, pod.facts.selinux_level, host.selinux_contexts, privileged=False, field=field).mount


def write_directory(layout: Layout, pod: Pod, node: Node) -> None:
    """The pod's state directory: what its namespaces need, what its containers mount, and the intent for a recovery."""
    directory = layout.pod(pod.id)
    os.mkdir(directory, 0o700)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if pod.facts.netns_path:  # torn, it still does: its network is then released by the id alone
            _write(fd, INTENT, records.encode(pod.facts, pod.config_json), 0o600)
        for name, data in files.render(pod.config, node.host).items():
            _write(fd, name, data, label=file_label(pod, node.host))
    finally:
        os.close(fd)
    userns = str(layout.userns(pod.id))
    handler = node.handlers[pod.facts.runtime_handler]
    made = sandbox.build(pod.id, pod.config, netns_path=pod.facts.netns_path, userns_path=userns, host=node.host, handler=handler)
    made = replace(made, mount_label=file_label(pod, node.host))
    bundle.write_sandbox(directory, made)


def _write_hosts(directory: Path, pod: Pod, host: HostFacts) -> None:
    """/etc/hosts again, now that the pod has addresses."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        content = files.hosts(pod.config, host, files.pod_hostname(pod.config, host), pod.facts.ips)
        _write(fd, files.HOSTS, content, label=file_label(pod, host))
    finally:
        os.close(fd)


def _write(dirfd: int, name: str, data: bytes, mode: int = 0o644, label: str = "") -> None:
    # 0644 whatever the umask: it becomes a file in containers whose user is not root.
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode, dir_fd=dirfd)
    try:
        os.fchmod(fd, mode)
        if label:
            relabel.file(fd, label)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _netlink(supervisor: Supervisor, pod_id: str, spare: list[int]) -> Callable[[], Awaitable[int]]:
    """Gives the socket that came with the namespaces to whoever asks first, and fetches another for whoever asks again."""

    async def give() -> int:
        return spare.pop() if spare else await supervisor.pod_netlink(pod_id)

    return give


def _check_log_directory(path: str) -> None:
    if not path:
        return
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise InvalidArgument("must be absolute and free of '..'", field="config.log_directory")


def remove_directory(directory: Path) -> None:
    """Remove a small directory of ours with all that is in it; its absence is fine."""
    trees.delete(directory)


async def remove_tree(directory: Path) -> None:
    """Remove a directory whose size others decided (an image VOLUME): in a thread."""
    if directory.exists():
        await asyncio.to_thread(remove_directory, directory)


def new_id() -> str:
    """64 hexadecimal digits, as Docker's and containerd's ids are."""
    return secrets.token_hex(32)
