"""What every test shares: who may be left out where and why, the node to test on, and the daemon under test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.daemon.harness import Daemon, Node
    from tests.registry import DockerRegistry

NEEDS_ROOT = ("kernel", "daemon", "attacks", "faults", "conformance")
APPARMOR, SELINUX = Path("/sys/kernel/security/apparmor"), Path("/sys/fs/selinux/enforce")
TESTS = Path(__file__).resolve().parent


def systemd_running() -> bool:
    """Whether systemd is PID 1, as sd_booted(3) decides it."""
    return os.path.isdir("/run/systemd/system")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; nothing is skipped silently."""
    for item in items:
        area = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if area in NEEDS_ROOT and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("systemd") and not systemd_running():
            item.add_marker(pytest.mark.skip(reason="systemd is not PID 1 here (hack/vm --systemd runs it)"))
        if item.get_closest_marker("apparmor") and not APPARMOR.exists():
            item.add_marker(pytest.mark.skip(reason="no AppArmor in this kernel (hack/vm --kernel 'apparmor=1 security=apparmor')"))
        if item.get_closest_marker("selinux") and not SELINUX.exists():
            item.add_marker(pytest.mark.skip(reason="no SELinux in this kernel (hack/vm --kernel 'selinux=1 security=selinux')"))
        if item.get_closest_marker("registry") and not shutil.which("docker-registry"):
            item.add_marker(pytest.mark.skip(reason="Debian's docker-registry is not installed"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that fails with a daemon in hand shows the end of the daemon's log."""
    outcome = yield
    report = outcome.get_result()
    daemon = getattr(item, "funcargs", {}).get("daemon")
    if report.failed and daemon is not None:
        report.sections.append(("daemon log", daemon.tail()))


# The harness imports grpc, which unit tests need not wait for: hence the imports inside the fixtures.


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """A network namespace of its own, so that bridges, NAT rules and pod addresses never touch the host's."""
    from tests.daemon.harness import Node

    node = Node()
    try:
        node.up()
        yield node
    finally:
        node.down()


@pytest.fixture(scope="module")
def daemon(node: Node) -> Iterator[Daemon]:
    """A started daemon for the tests of one module. A test that kills it starts it again."""
    from tests.daemon.harness import running

    with running(node) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def registry(node: Node) -> Iterator[DockerRegistry]:
    """Debian's docker-registry on the node's loopback, plain HTTP, with the busybox image in it."""
    from hack import images
    from tests.registry import DockerRegistry

    if not shutil.which("docker-registry"):
        pytest.skip("Debian's docker-registry is not installed")
    with DockerRegistry(node.directory / "registry", netns=node.netns) as registry:
        registry.push(images.busybox(), "busybox")
        yield registry


@pytest.fixture(scope="module")
def busybox(daemon: Daemon, registry: DockerRegistry) -> str:
    """Reference of a busybox image that the daemon has pulled."""
    from protos.runtime.v1 import api_pb2 as v1

    reference = f"{registry.host}/busybox:latest"
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    return reference
