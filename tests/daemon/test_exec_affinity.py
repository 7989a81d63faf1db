"""Exec sessions on one processor, and the end of a streaming session that has had its time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from hack.node import Node
from hack.streaming_client import ChannelClient
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, running
from tests.registry import DockerRegistry

EXTRA = """
[runtime.handlers.quiet]
exec_cpu_affinity = "first"
[streaming]
session_timeout = "1s"
"""
CPUS = "grep Cpus_allowed_list /proc/self/status"


@pytest.fixture(scope="module")
def pinned(node: Node, registry: DockerRegistry) -> Iterator[tuple[Daemon, str]]:
    """A daemon with the settings above, and a pulled image."""
    image = f"{registry.host}/busybox:latest"
    with running(node, extra=EXTRA) as daemon:
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        yield daemon, image


def run(daemon: Daemon, image: str, handler: str, cpus: str) -> str:
    config = daemon.pod_config()
    request = v1.RunPodSandboxRequest(config=config, runtime_handler=handler)
    pod = daemon.runtime.RunPodSandbox(request, timeout=30).pod_sandbox_id
    return daemon.run((pod, config), image, "sleep", "60", resources=v1.LinuxContainerResources(cpuset_cpus=cpus))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_exec_runs_on_the_first_of_the_cpuset(pinned: tuple[Daemon, str]) -> None:
    daemon, image = pinned
    first, second = sorted(os.sched_getaffinity(0))[:2]
    both = f"{first},{second}"
    container = run(daemon, image, "quiet", both)
    assert daemon.exec(container, "sh", "-c", CPUS).stdout.split()[-1] == b"%d" % first
    own = daemon.exec(container, "grep", "Cpus_allowed_list", "/proc/1/status").stdout.split()[-1].decode()
    assert own.replace("-", ",") == both, "the container's own process has all of them"
    update = v1.LinuxContainerResources(cpuset_cpus=str(second))
    daemon.runtime.UpdateContainerResources(v1.UpdateContainerResourcesRequest(container_id=container, linux=update), timeout=10)
    assert daemon.exec(container, "sh", "-c", CPUS).stdout.split()[-1] == b"%d" % second
    usual = run(daemon, image, "", both)
    assert daemon.exec(usual, "sh", "-c", CPUS).stdout.split()[-1].decode().replace("-", ",") == both


def test_a_streaming_session_ends_with_its_time(pinned: tuple[Daemon, str]) -> None:
    daemon, image = pinned
    container = run(daemon, image, "", "")
    request = v1.ExecRequest(container_id=container, cmd=["sh", "-c", "while :; do echo busy; sleep 0.1; done"], stdout=True)
    url = daemon.runtime.Exec(request, timeout=10).url
    began = time.monotonic()
    client = ChannelClient(daemon.node.netns, url)
    while client.read(10):
        pass
    assert b"busy" in client.data["stdout"]
    assert 0.9 < time.monotonic() - began < 8
