"""AppArmor profiles on a kernel that has them: the default one, loaded ones by name, none."""

from __future__ import annotations

import subprocess

import grpc
import pytest

from cri.apparmor import PROFILE
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon

pytestmark = pytest.mark.apparmor

Pod = tuple[str, v1.PodSandboxConfig]
Context = v1.LinuxContainerSecurityContext
Profile = v1.SecurityProfile
NAME = "cri-shim-test-deny-write"
TEXT = f"profile {NAME} flags=(attach_disconnected) {{ file, capability, signal, deny /tmp/** w, }}"
CURRENT = "cat /proc/self/attr/apparmor/current"


@pytest.fixture(scope="module", params=[False, True], ids=["own-pids", "shared-pids"])
def pod(request: pytest.FixtureRequest, daemon: Daemon) -> Pod:
    """Both ways to launch a process: as PID 1 of its own namespace, and into one that others live in."""
    return daemon.run_pod(shared_pid=request.param)


@pytest.fixture(scope="module")
def loaded() -> str:
    subprocess.run(["apparmor_parser", "-Kr"], input=TEXT.encode(), check=True)
    return NAME


def run(daemon: Daemon, pod: Pod, image: str, **context: object) -> str:
    return daemon.run(pod, image, "sh", "-c", f"{CURRENT}; sleep 1000", security=Context(**context))  # type: ignore[arg-type]


def confined(daemon: Daemon, container: str) -> tuple[str, str]:
    """By what the container's first process and an exec session are confined."""
    while not (log := daemon.log_text(container)):
        assert daemon.container(container).state == v1.CONTAINER_RUNNING
    found = daemon.exec(container, "sh", "-c", CURRENT)
    assert found.exit_code == 0, found.stderr
    return log.split(" F ", 1)[1].strip(), found.stdout.decode().strip()


def test_the_default_profile(daemon: Daemon, pod: Pod, busybox: str) -> None:
    enforced = f"{PROFILE} (enforce)"
    for context in ({}, {"apparmor": Profile(profile_type=Profile.RuntimeDefault)}, {"apparmor_profile": "runtime/default"}):
        container = run(daemon, pod, busybox, **context)
        assert confined(daemon, container) == (enforced, enforced)
        for refused in ("echo x > /proc/sysrq-trigger", "mkdir /tmp/m && mount -t tmpfs t /tmp/m", "echo 1 > /sys/kernel/mm/ksm/run"):
            assert daemon.exec(container, "sh", "-c", refused).exit_code != 0
        assert daemon.exec(container, "sh", "-c", "echo x > /tmp/x && echo 5 > /proc/self/oom_score_adj && kill -0 $$").exit_code == 0
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=60)


def test_a_loaded_profile(daemon: Daemon, pod: Pod, busybox: str, loaded: str) -> None:
    for context in (
        {"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref=loaded)},
        {"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref=f"localhost/{loaded}"), "no_new_privs": True},
        {"apparmor_profile": f"localhost/{loaded}", "run_as_user": v1.Int64Value(value=1000)},
    ):
        container = run(daemon, pod, busybox, **context)
        assert confined(daemon, container) == (f"{loaded} (enforce)",) * 2
        assert b"denied" in daemon.exec(container, "sh", "-c", "echo x > /tmp/x").stderr
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=60)


def test_no_profile(daemon: Daemon, pod: Pod, busybox: str) -> None:
    container = run(daemon, pod, busybox, apparmor=Profile(profile_type=Profile.Unconfined))
    assert confined(daemon, container) == ("unconfined", "unconfined")


def test_a_profile_that_is_not_loaded(daemon: Daemon, pod: Pod, busybox: str) -> None:
    with pytest.raises(grpc.RpcError) as error:
        run(daemon, pod, busybox, apparmor=Profile(profile_type=Profile.Localhost, localhost_ref="nobody-loaded-this"))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "apparmor.localhost_ref" in str(error.value.details()) and "not loaded" in str(error.value.details())
