"""``cri-shim run IMAGE [CMD…]``: one pod with one container, its output here, its exit code ours, nothing left of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from cri.commands import pull
from cri.commands.client import CommandError, Daemon, connect, explain
from cri.commands.logtail import Tail
from protos.runtime.v1 import api_pb2 as v1

#: As docker does: our own failure, told apart from the container's codes.
FAILED = 125
LOG_NAME = "0.log"
#: On the pods of this command; the value is the pod's uid.
LABEL = "io.cri-shim.run"
#: Seconds between looks at log and status: quick at first, for commands that end at once.
LOOK_FIRST, LOOK_LAST = 0.01, 0.2

#: What the kubelet masks in every container that is not privileged.
MASKED = (
    *("/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_SIZE = re.compile(r"(\d+)([kmg]?)b?", re.IGNORECASE)


def main(socket: str, options: argparse.Namespace) -> int:
    """The container's exit code, or 125."""
    try:
        with connect(socket) as daemon, tempfile.TemporaryDirectory(prefix="cri-shim-run-") as logs:
            try:
                return _run(daemon, options, logs)
            except grpc.RpcError as error:
                raise CommandError(explain(error, socket)) from error
    except CommandError as error:
        print(f"cri-shim: {error}", file=sys.stderr)
        return FAILED


def pod_config(options: argparse.Namespace, logs: str) -> v1.PodSandboxConfig:
    """The pod that the options ask for."""
    uid = str(uuid.uuid4())
    name = options.name or f"run-{uid[:8]}"
    config = v1.PodSandboxConfig(
        metadata=v1.PodSandboxMetadata(name=name, uid=uid, namespace="default"),
        log_directory=logs,
        labels={LABEL: uid},
    )
    context = config.linux.security_context
    config.linux.cgroup_parent = options.cgroup_parent
    context.privileged = options.privileged
    context.namespace_options.pid = v1.CONTAINER
    if options.network == "host":
        context.namespace_options.network = v1.NODE
    else:
        config.hostname = options.hostname or re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:63] or "pod"
    return config


def container_config(options: argparse.Namespace, image: str) -> v1.ContainerConfig:
    """The container that the options ask for."""
    cmd = options.cmd[1:] if options.cmd[:1] == ["--"] else options.cmd
    config = v1.ContainerConfig(
        metadata=v1.ContainerMetadata(name="main"),
        image=v1.ImageSpec(image=image, user_specified_image=options.image),
        args=cmd,
        working_dir=options.workdir,
        log_path=LOG_NAME,
        mounts=[_mount(text) for text in options.volume],
    )
    for text in options.env:
        key, equals, value = text.partition("=")
        config.envs.add(key=key, value=os.fsencode(value if equals else os.environ.get(key, "")))
    if options.memory:
        config.linux.resources.memory_limit_in_bytes = _size(options.memory)
    if options.cpus:
        config.linux.resources.cpu_period, config.linux.resources.cpu_quota = 100_000, int(options.cpus * 100_000)
    context = config.linux.security_context
    context.namespace_options.pid = v1.CONTAINER
    if options.network == "host":
        context.namespace_options.network = v1.NODE
    context.privileged, context.readonly_rootfs = options.privileged, options.read_only
    context.seccomp.profile_type = v1.SecurityProfile.Unconfined if options.privileged else v1.SecurityProfile.RuntimeDefault
    if not options.privileged:
        context.masked_paths.extend(MASKED)
        context.readonly_paths.extend(READ_ONLY)
    _user(context, options.user)
    return config


def _user(context: v1.LinuxContainerSecurityContext, text: str) -> None:
    user, _, group = text.partition(":")
    if user.isdigit():
        context.run_as_user.value = int(user)
    elif user:
        context.run_as_username = user
    if group:
        if not group.isdigit():
            raise CommandError(f"--user: group {group!r} must be a number")
        context.run_as_group.value = int(group)


def _mount(text: str) -> v1.Mount:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(p.startswith("/") for p in parts[:2]) or parts[2:] not in ([], ["ro"], ["rw"]):
        raise CommandError(f"--volume: expected /host/path:/container/path[:ro], got {text!r}")
    return v1.Mount(host_path=parts[0], container_path=parts[1], readonly=parts[2:] == ["ro"])


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise CommandError(f"--memory: expected a size such as 64m, got {text!r}")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def _run(daemon: Daemon, options: argparse.Namespace, logs: str) -> int:
    pod, container = pod_config(options, logs), container_config(options, "")
    container.image.image = _image(daemon, options, pod)
    try:
        pod_id = daemon.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=pod, runtime_handler=options.handler)).pod_sandbox_id
        request = v1.CreateContainerRequest(pod_sandbox_id=pod_id, config=container, sandbox_config=pod)
        container_id = daemon.runtime.CreateContainer(request).container_id
        with _interrupts(daemon, container_id, options.stop_timeout):
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container_id))
            return _follow(daemon, container_id, str(Path(logs) / LOG_NAME))
    finally:
        _remove(daemon, pod)


def _remove(daemon: Daemon, config: v1.PodSandboxConfig) -> None:
    """Found by label: an interrupt may have come before we were told the id."""
    selector = v1.PodSandboxFilter(label_selector={LABEL: config.labels[LABEL]})
    for pod in daemon.runtime.ListPodSandbox(v1.ListPodSandboxRequest(filter=selector)).items:
        daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod.id))
        daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def _image(daemon: Daemon, options: argparse.Namespace, pod: v1.PodSandboxConfig) -> str:
    spec = v1.ImageSpec(image=options.image)
    if options.pull != "always":
        status = daemon.images.ImageStatus(v1.ImageStatusRequest(image=spec))
        if status.HasField("image"):
            return str(status.image.id)
        if options.pull == "never":
            raise CommandError(f"image {options.image} is not here, and --pull never was given")
    return pull.pull(daemon, spec, quiet=options.quiet, sandbox=pod)


def _follow(daemon: Daemon, container_id: str, path: str) -> int:
    """Copies the log until the container has exited. It is complete then: its last byte is written before the status says so."""
    tail, wait = Tail(path), LOOK_FIRST
    outputs = {"stdout": 1, "stderr": 2}
    sys.stdout.flush()
    try:
        while True:
            status = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container_id)).status
            copied = tail.copy(outputs)
            if status.state == v1.CONTAINER_EXITED:
                if status.reason not in ("Completed", "Error", ""):
                    print(f"cri-shim: {status.reason}{': ' if status.message else ''}{status.message}", file=sys.stderr)
                return int(status.exit_code)
            wait = LOOK_FIRST if copied else min(wait * 1.3, LOOK_LAST)
            time.sleep(wait)
    finally:
        tail.close()


@contextlib.contextmanager
def _interrupts(daemon: Daemon, container_id: str, timeout: int) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the container: the first one gently, the second one at once."""
    pending: list[grpc.Future[v1.StopContainerResponse]] = []

    def stop(number: int, frame: object) -> None:
        request = v1.StopContainerRequest(container_id=container_id, timeout=0 if pending else timeout)
        pending.append(daemon.runtime.StopContainer.future(request))

    before: dict[int, Callable[..., object] | int | None] = {}
    for interrupt in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[interrupt] = signal.signal(interrupt, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
