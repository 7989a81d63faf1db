"""Log files: where they are, and ReopenContainerLog, which the kubelet calls after it has rotated one away."""

from __future__ import annotations

import os
import posixpath

from cri.containers.model import Containers
from cri.errors import InvalidArgument
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure


def container_log_path(pod: v1.PodSandboxConfig, container: v1.ContainerConfig) -> str:
    """The sandbox's log_directory and the container's log_path below it; empty, meaning no log, unless both are given.

    A path that leaves the directory is refused (CVE-2025-0750): the file is opened by root.
    """
    if not pod.log_directory or not container.log_path:
        return ""
    if "\0" in container.log_path or ".." in container.log_path.split("/"):
        raise InvalidArgument(f"{container.log_path!r} leaves the log directory", field="config.log_path")
    path = posixpath.normpath(posixpath.join(pod.log_directory, container.log_path.lstrip("/")))
    if path == posixpath.normpath(pod.log_directory):
        raise InvalidArgument(f"{container.log_path!r} names no file", field="config.log_path")
    return path


def make_directory(log_path: str) -> None:
    """The kubelet makes the directory of a log beforehand, people with crictl do not."""
    directory = posixpath.dirname(log_path)
    if not directory or os.path.isdir(directory):
        return
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    except OSError as e:
        raise Failure.wrap("create container", "make log directory", e, directory) from None


async def reopen(container_id: str, *, containers: Containers, supervisor: Supervisor) -> None:
    """Continue the log in a new file of the same name. Raises FailedPrecondition for a container that does not run."""
    container = containers.get(container_id)
    container.require_running("reopen log")
    if container.facts.log_path:
        await supervisor.reopen_log(container.id)
