"""Users, groups, capabilities and filters that turn out to be more than was asked for (ATTACKS.md, "Users, capabilities, seccomp")."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hack.images import Layer
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.test_descriptors import mount
from tests.attacks.test_mounts import output
from tests.daemon.harness import Daemon, wait_for

Pod = tuple[str, v1.PodSandboxConfig]


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def context(pod: Pod, **fields: object) -> v1.LinuxContainerSecurityContext:
    made = v1.LinuxContainerSecurityContext(**fields)
    made.namespace_options.CopyFrom(pod[1].linux.security_context.namespace_options)
    return made


def as_user(uid: int) -> dict[str, object]:
    return {"run_as_user": v1.Int64Value(value=uid)}


def status(text: str, name: str) -> str:
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:"))


PASSWD = "root:x:0:0:root:/root:/bin/sh\n1000:x:0:0:evil:/root:/bin/sh\napp:x:2000:2000::/:/bin/sh\n"


@pytest.mark.parametrize("by", ["request", "name", "image"])
def test_a_user_whose_name_is_a_number(daemon: Daemon, pod: Pod, image: Callable[..., str], by: str) -> None:
    """CVE-2016-3697: "1000" is a uid, whatever /etc/passwd calls that."""
    reference = image(Layer().file("etc/passwd", PASSWD), **({"User": "1000"} if by == "image" else {}))
    fields: dict[str, object] = {"request": as_user(1000), "name": {"run_as_username": "1000"}, "image": {}}[by]  # type: ignore[assignment]
    text = output(daemon, pod, reference, "id -u; id -g", security=context(pod, **fields))
    assert text.split()[0] == "1000"
    container = daemon.run(pod, reference, "sleep", "60", security=context(pod, **fields))
    assert daemon.exec(container, "id", "-u").stdout == b"1000\n"


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("add", [(), ("NET_ADMIN",), ("ALL",)])
def test_no_capability_is_inheritable_or_ambient(daemon: Daemon, pod: Pod, busybox: str, uid: int, add: tuple[str, ...]) -> None:
    """CVE-2018-1000400, 2022-24769, 2022-29162: CapInh and CapAmb are empty at start and in exec sessions, and a user other than root
    has no effective ones."""
    security = context(pod, **as_user(uid), capabilities=v1.Capability(add_capabilities=add))
    container = daemon.run(pod, busybox, "sh", "-c", "cat /proc/self/status; sleep 60", security=security)
    for text in (daemon.exec(container, "cat", "/proc/self/status").stdout.decode(), first_status(daemon, container)):
        assert int(status(text, "CapInh"), 16) == int(status(text, "CapAmb"), 16) == 0
        if uid:
            assert int(status(text, "CapEff"), 16) == int(status(text, "CapPrm"), 16) == 0
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)


def first_status(daemon: Daemon, container: str) -> str:
    pid = next(p for p in Path("/proc").iterdir() if p.name.isdigit() and in_cgroup(p, container))
    return (pid / "status").read_text()


def in_cgroup(process: Path, container: str) -> bool:
    try:
        return container in (process / "cgroup").read_text()
    except OSError:
        return False


def test_the_primary_group_is_among_the_groups(daemon: Daemon, pod: Pod, image: Callable[..., str]) -> None:
    """CVE-2022-36109, 2022-2995, 2023-25173: a file that its group may not read (0707) stays closed, at start and in exec sessions, and
    setgroups(2) cannot leave the group."""
    layer = Layer().file("etc/group", "secretive:x:3000:app\n").file("etc/passwd", "app:x:2000:3000::/:/bin/sh\n")
    layer.file("closed", "no entry\n", 0o707, gid=3000)
    reference = image(layer, User="app")
    container = daemon.run(pod, reference, "sh", "-c", "cat /closed; id -G; sleep 60")
    assert daemon.exec(container, "cat", "/closed").exit_code != 0
    assert "3000" in daemon.exec(container, "id", "-G").stdout.decode().split()
    assert "no entry" not in daemon.log_text(container)
    extra = daemon.run(pod, reference, "sleep", "60", security=context(pod, **as_user(2000), supplemental_groups=[4000]))
    assert {"3000", "4000"} <= set(daemon.exec(extra, "id", "-G").stdout.decode().split())


@pytest.mark.parametrize("user", ["2147483648", "4294967296", "9" * 36, "-1", "+0", "1:4294967295", ":"])
def test_ids_that_wrap_around(daemon: Daemon, pod: Pod, image: Callable[..., str], busybox: str, user: str) -> None:
    """CVE-2024-40635, 2026-46680, 2026-30892: refused, of an image and of a request; never root."""
    for reference, fields in ((image(User=user), {}), (busybox, {"run_as_username": user})):
        with pytest.raises(grpc.RpcError) as failed:
            daemon.create(pod, reference, "id", security=context(pod, **fields))
        assert failed.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN), failed.value


@pytest.mark.parametrize("number", [-1, 1 << 31, 1 << 32, -(1 << 63)])
@pytest.mark.parametrize("name", ["run_as_user", "run_as_group"])
def test_numbers_that_wrap_around(daemon: Daemon, pod: Pod, busybox: str, name: str, number: int) -> None:
    """CVE-2024-40635: of a request."""
    wrong = context(pod, **{**as_user(1), name: v1.Int64Value(value=number)})
    with pytest.raises(grpc.RpcError) as failed:
        daemon.create(pod, busybox, "id", security=wrong)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT and name in (failed.value.details() or "")


@pytest.mark.parametrize("content", ["", "{}", "null", "[]", '{"defaultAction": ""}', None])
def test_an_empty_profile_is_not_unconfined(daemon: Daemon, pod: Pod, busybox: str, tmp_path: Path, content: str | None) -> None:
    """CVE-2023-2431."""
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    for reference in (str(path), "") if content is None else (str(path),):
        profile = v1.SecurityProfile(profile_type=v1.SecurityProfile.Localhost, localhost_ref=reference)
        with pytest.raises(grpc.RpcError) as failed:
            daemon.create(pod, busybox, "true", security=context(pod, seccomp=profile))
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_socket_families_of_the_default_profile(daemon: Daemon, pod: Pod, busybox: str, hostile: Callable[[str], Path]) -> None:
    """copy.fail: AF_ALG and AF_VSOCK are EPERM, also for root, with more capabilities, and in exec sessions."""
    profile = v1.SecurityProfile(profile_type=v1.SecurityProfile.RuntimeDefault)
    mounts = (mount(hostile("sockets"), "/hostile"),)
    for capabilities in ((), ("NET_ADMIN", "SYS_PTRACE")):
        security = context(pod, seccomp=profile, capabilities=v1.Capability(add_capabilities=capabilities))
        container = daemon.run(pod, busybox, "sh", "-c", "/hostile/sockets; sleep 60", mounts=mounts, security=security)
        text = daemon.exec(container, "/hostile/sockets").stdout.decode()
        assert [line.split()[2] for line in text.splitlines()] == ["EPERM", "EPERM"], text
        wait_for("its output", lambda c=container: daemon.log_text(c).count("EPERM") == 2)
