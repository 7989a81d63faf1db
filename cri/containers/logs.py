"""Log files: where they are, and ReopenContainerLog, which the kubelet calls after it has rotated one away."""

from __future__ import annotations

import os
import posixpath
from contextlib import suppress

from cri.containers.model import Containers
from cri.errors import InvalidArgument
from cri.spec import strings
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.linux import path as paths


def container_log_path(pod: v1.PodSandboxConfig, container: v1.ContainerConfig) -> str:
    """The sandbox's log_directory and the container's log_path below it; empty, meaning no log, unless both are given.

    A path that leaves the directory is refused (CVE-2025-0750): the file is opened by root.
    """
    if not pod.log_directory or not container.log_path:
        return ""
    if "\0" in container.log_path or ".." in container.log_path.split("/"):
        raise InvalidArgument(f"{container.log_path!r:.200} leaves the log directory", field="config.log_path")
    strings.line(container.log_path, "config.log_path")
    directory = strings.clean(pod.log_directory)
    path = posixpath.normpath(posixpath.join(directory, container.log_path.lstrip("/")))
    if path == directory:
        raise InvalidArgument(f"{container.log_path!r} names no file", field="config.log_path")
    return path


def core_path(path: str, pod: v1.PodSandboxConfig) -> str:
    """``container_log_path`` as the core wants it: with a double slash after the part that may lead over symlinks, which is the
    directory that the request names. What is below it a container may have been allowed to write to (a hostPath volume)."""
    directory = strings.clean(pod.log_directory)
    return f"{directory.rstrip('/')}//{path[len(directory) :].lstrip('/')}" if path else ""


def make_directory(core: str) -> None:
    """The kubelet makes the directory of a log beforehand, people with crictl do not. ``core`` is a ``core_path``."""
    top, _, name = core.partition("//")
    if not name:
        return
    try:
        os.makedirs(top or "/", mode=0o755, exist_ok=True)
        directory = os.open(top or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in name.split("/")[:-1]:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=directory)
                below = paths.open_beneath(directory, part, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                os.close(directory)
                directory = below
        finally:
            os.close(directory)
    except OSError as e:
        raise Failure.wrap("create container", "make log directory", e, posixpath.dirname(core)) from None


async def reopen(container_id: str, *, containers: Containers, supervisor: Supervisor) -> None:
    """Continue the log in a new file of the same name. Raises FailedPrecondition for a container that does not run."""
    container = containers.get(container_id)
    container.require_running("reopen log")
    if container.facts.log_path:
        await supervisor.reopen_log(container.id)
