"""Pods with ``hostUsers: false`` over the socket: whose files are whose, what is refused, what cannot be reached, what a restart leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon

Pod = tuple[str, v1.PodSandboxConfig]
BASE, SIZE = 200000, 65536


def ids(container: int = 0, host: int = BASE, length: int = SIZE) -> v1.IDMapping:
    return v1.IDMapping(container_id=container, host_id=host, length=length)


def options(**fields: Any) -> v1.NamespaceOption:
    users = v1.UserNamespace(mode=v1.POD, uids=[ids()], gids=[ids()])
    return v1.NamespaceOption(**{"pid": v1.CONTAINER, "userns_options": users, **fields})


def run_pod(daemon: Daemon, **fields: Any) -> Pod:
    config = daemon.pod_config()
    config.linux.security_context.namespace_options.CopyFrom(options(**fields))
    return daemon.run_pod(config)


def volume(path: Path, target: str = "/data", *, mapped: bool = True, **fields: Any) -> v1.Mount:
    mappings = [ids()] if mapped else []
    return v1.Mount(host_path=str(path), container_path=target, uidMappings=mappings, gidMappings=mappings, **fields)


def output(daemon: Daemon, pod: Pod, busybox: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, busybox, "sh", "-c", script, **fields)
    ended = daemon.wait_exit(container)
    text = "".join(line.split(" ", 3)[3] + "\n" for line in daemon.log_text(container).splitlines())
    assert ended.exit_code == 0, text
    return text


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    status = daemon.runtime.Status(v1.StatusRequest(), timeout=10)
    if not status.runtime_handlers[0].features.user_namespaces:
        pytest.skip("this kernel cannot idmap what a pod with a user namespace needs")
    return run_pod(daemon)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A host directory with a file of the host's root, one of id 7, and a secret."""
    os.chmod(tmp_path, 0o777)
    for name, mode, owner in (("root", 0o644, 0), ("seven", 0o640, 7), ("secret", 0o600, 0)):
        (tmp_path / name).write_text(name)
        os.chmod(tmp_path / name, mode)
        os.chown(tmp_path / name, owner, owner)
    return tmp_path


def test_features_are_announced(daemon: Daemon, pod: Pod) -> None:
    status = daemon.runtime.Status(v1.StatusRequest(), timeout=10)
    assert all(handler.features.user_namespaces for handler in status.runtime_handlers)
    assert status.features.user_namespaces_host_network


def test_maps_and_capabilities(daemon: Daemon, pod: Pod, busybox: str) -> None:
    text = output(
        daemon,
        pod,
        busybox,
        "cat /proc/self/uid_map /proc/self/gid_map; id -u; cat /proc/self/setgroups; ls -ldn / /bin /dev /dev/null /dev/shm /etc/hosts",
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines[:4] == [["0", str(BASE), str(SIZE)], ["0", str(BASE), str(SIZE)], ["0"], ["allow"]]
    assert all(line[2:4] == ["0", "0"] for line in lines[4:]), text
