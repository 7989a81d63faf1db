"""CDI devices over the socket: files of the node become devices, mounts, variables and hooks of a container."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack import images
from hack.node import Node
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, running, wait_for
from tests.registry import DockerRegistry

Pod = tuple[str, v1.PodSandboxConfig]
# A device that root may open without any capability, and that is not among those every container may use.
SOME = next(path for path in ("/dev/fuse", "/dev/net/tun", "/dev/loop-control") if Path(path).exists())
NUMBER = os.stat(SOME).st_rdev


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("cdi")
    for name in ("etc", "run"):
        (base / name).mkdir()
    return base / "etc", base / "run"


@pytest.fixture(scope="module")
def daemon(node: Node, specs: tuple[Path, Path]) -> Iterator[Daemon]:
    with running(node, extra=f"[runtime]\ncdi_spec_dirs = {json.dumps([str(d) for d in specs])}\n") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def write(
    path: Path, devices: dict[str, Any], every: dict[str, Any] | None = None, kind: str = "vendor.com/dev", version: str = "0.7.0"
) -> None:
    tree = {"cdiVersion": version, "kind": kind, "devices": [{"name": n, "containerEdits": e} for n, e in devices.items()]}
    path.write_text(json.dumps(tree | ({"containerEdits": every} if every else {})))


def names(*wanted: str) -> list[v1.CDIDevice]:
    return [v1.CDIDevice(name=f"vendor.com/dev={name}") for name in wanted]


def output(daemon: Daemon, pod: Pod, image: str, script: str, **fields: Any) -> str:
    container = daemon.run(pod, image, "sh", "-c", script, **fields)
    daemon.wait_exit(container)
    return "".join(line.split(" ", 3)[3] + "\n" for line in daemon.log_text(container).splitlines())


def refused(daemon: Daemon, pod: Pod, image: str, **fields: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as raised:
        daemon.create(pod, image, "true", **fields)
    return raised.value.code().name, raised.value.details()


def test_everything_a_file_can_say(daemon: Daemon, pod: Pod, busybox: str, specs: tuple[Path, Path]) -> None:
    library = specs[0].parent / "lib"
    library.mkdir()
    (library / "libvendor.so").write_text("library")
    write(
        specs[0] / "vendor.json",
        {
            "one": {
                "env": ["DEVICE=one"],
                "deviceNodes": [{"path": "/dev/vendor/one", "hostPath": SOME, "permissions": "r", "fileMode": 0o640, "uid": 5, "gid": 6}],
                "additionalGids": [77],
            },
            "two": {
                "deviceNodes": [{"path": "/dev/two", "type": "c", "major": os.major(NUMBER), "minor": os.minor(NUMBER)}],
                "env": ["DEVICE=two"],
            },
        },
        {"env": ["VENDOR=yes"], "mounts": [{"hostPath": str(library), "containerPath": "/usr/lib/vendor", "options": ["ro", "rbind"]}]},
    )
    script = (
        "exec 2>&1; echo $DEVICE $VENDOR; id -G; stat -c '%F %t:%T %a %u:%g' /dev/vendor/one;"
        "cat /usr/lib/vendor/*; echo; touch /usr/lib/vendor/x;"
        "(: < /dev/vendor/one) && echo readable; (: <> /dev/vendor/one)"
    )
    lines = output(daemon, pod, busybox, script, CDI_devices=names("one")).splitlines()
    assert lines[:4] == ["one yes", "0 77", f"character special file {os.major(NUMBER):x}:{os.minor(NUMBER):x} 640 5:6", "library"]
    assert "Read-only file system" in lines[4]
    assert lines[5] == "readable"
    assert "Operation not permitted" in lines[6]  # the device cgroup: r only, whatever root may do to the node
    both = output(daemon, pod, busybox, "echo $DEVICE $VENDOR; ls /dev/vendor/one /dev/two", CDI_devices=names("one", "two"))
    assert both.splitlines() == ["two yes", "/dev/two", "/dev/vendor/one"]
    assert output(daemon, pod, busybox, "echo [$VENDOR]; ls /dev/two 2>&1 | wc -l") == "[]\n1\n"


def test_annotations_and_later_directories(daemon: Daemon, pod: Pod, busybox: str, specs: tuple[Path, Path]) -> None:
    """Files are found while the daemon runs, in YAML too; a later directory overrides an earlier one."""
    text = "cdiVersion: 0.5.0\nkind: vendor.com/yaml\ndevices:\n- {name: '0', containerEdits: {env: [WHO=%s]}}\n"
    (specs[0] / "a.yaml").write_text(text % "etc")
    fields = {"annotations": {"cdi.k8s.io/plugin_1": "vendor.com/yaml=0"}}
    assert output(daemon, pod, busybox, "echo $WHO", **fields) == "etc\n"
    (specs[1] / "b.yaml").write_text(text % "run")
    assert output(daemon, pod, busybox, "echo $WHO", **fields) == "run\n"


def test_what_cannot_be_resolved(daemon: Daemon, pod: Pod, busybox: str, specs: tuple[Path, Path]) -> None:
    code, text = refused(daemon, pod, busybox, CDI_devices=names("absent"))
    assert code == "FAILED_PRECONDITION"
    assert "vendor.com/dev=absent" in text and str(specs[0]) in text and str(specs[1]) in text
    assert refused(daemon, pod, busybox, CDI_devices=[v1.CDIDevice(name="gpu0")])[0] == "INVALID_ARGUMENT"
    write(specs[0] / "gone.json", {"0": {"deviceNodes": [{"path": "/dev/gone"}]}}, kind="vendor.com/gone")
    code, text = refused(daemon, pod, busybox, CDI_devices=[v1.CDIDevice(name="vendor.com/gone=0")])
    assert code == "FAILED_PRECONDITION" and "/dev/gone" in text
    write(specs[0] / "rdt.json", {"0": {"intelRdt": {"closID": "x"}}}, kind="vendor.com/rdt")
    assert "intelRdt" in refused(daemon, pod, busybox, CDI_devices=[v1.CDIDevice(name="vendor.com/rdt=0")])[1]
    write(specs[0] / "mnt.json", {"0": {"mounts": [{"hostPath": "/nowhere", "containerPath": "/x"}]}}, kind="vendor.com/mnt")
    assert "/nowhere" in refused(daemon, pod, busybox, CDI_devices=[v1.CDIDevice(name="vendor.com/mnt=0")])[1]


def test_hooks_see_nothing_of_the_container(
    daemon: Daemon, registry: DockerRegistry, pod: Pod, specs: tuple[Path, Path], tmp_path: Path
) -> None:
    """CVE-2024-0132, CVE-2025-23266: an image's LD_PRELOAD and working directory must not reach a vendor's hook, which runs as root on
    the host's files. Each hook tells its environment and working directory; createContainer's also writes into the root."""
    evil = images.assemble([images.base_layer()], {"Env": ["PATH=/bin", "LD_PRELOAD=/evil.so", "SECRET=1"], "WorkingDir": "/tmp"})
    reference = registry.push(evil, "evil-env")
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    hooks = []
    for name in ("createRuntime", "createContainer", "poststart", "poststop"):
        script = f"{{ pwd; tr '\\0' '\\n' < /proc/self/environ; }} > {tmp_path}/{name}.part; cat > {tmp_path}/{name}.state; "
        if name == "createContainer":
            bundle = f"$(grep -o '\"bundle\": *\"[^\"]*' {tmp_path}/{name}.state | sed 's/.*\"//')"
            script += f"echo hooked > {bundle}/rootfs/etc/hooked; "
        script += f"mv {tmp_path}/{name}.part {tmp_path}/{name}"
        hooks.append({"hookName": name, "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", "HOOK=yes"]})
    inside = {"hookName": "startContainer", "path": "/bin/sh", "args": ["sh", "-c", "{ pwd; env; } > /from-start"], "env": ["HOOK=yes"]}
    write(specs[0] / "hooks.json", {"h": {"hooks": [*hooks, inside]}}, kind="vendor.com/hook")
    devices = [v1.CDIDevice(name="vendor.com/hook=h")]
    container = daemon.run(pod, reference, "sh", "-c", "cat /etc/hooked; env; sleep 60", CDI_devices=devices)
    assert "hooked" in wait_for("output", lambda: daemon.log_text(container))
    seen_inside = daemon.exec(container, "cat", "/from-start").stdout.decode()
    assert seen_inside.startswith("/\n") and "HOOK=yes" in seen_inside
    assert "LD_PRELOAD" not in seen_inside and "SECRET" not in seen_inside
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=20)
    for name in ("createRuntime", "createContainer", "poststart", "poststop"):
        cwd, *variables = wait_for(name, (tmp_path / name).exists) and (tmp_path / name).read_text().split("\n")
        seen = {v.partition("=")[0] for v in variables if v}
        assert cwd == "/" and "HOOK" in seen, name
        assert seen <= {"PATH", "HOOK", "PWD", "SHLVL", "_", "OLDPWD"}, (name, seen)
        assert json.loads((tmp_path / f"{name}.state").read_text())["id"] == container


def test_a_failing_hook_fails_the_container(daemon: Daemon, pod: Pod, busybox: str, specs: tuple[Path, Path]) -> None:
    hook = {"hookName": "createRuntime", "path": "/bin/sh", "args": ["sh", "-c", "echo no driver; exit 3"], "env": ["PATH=/bin"]}
    write(specs[0] / "fail.json", {"0": {"hooks": [hook]}}, kind="vendor.com/fail")
    text = refused(daemon, pod, busybox, CDI_devices=[v1.CDIDevice(name="vendor.com/fail=0")])[1]
    assert "/bin/sh" in text and "exit code 3: no driver" in text


def test_switched_off(node: Node, registry: DockerRegistry) -> None:
    with running(node, extra="[runtime]\nenable_cdi = false\n", subnets=("10.214.0.0/16",)) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        code, text = refused(daemon, daemon.run_pod(), image, CDI_devices=names("one"))
        assert code == "FAILED_PRECONDITION" and "enable_cdi" in text


def test_network_interfaces(node: Node, daemon: Daemon, busybox: str, specs: tuple[Path, Path]) -> None:
    """netDevices: the host's interface is the pod's, renamed, up and with its addresses; a second container of the pod finds it there."""

    def ip(*arguments: str) -> str:
        return subprocess.run(["nsenter", f"--net={node.netns}", "ip", *arguments], check=True, capture_output=True, text=True).stdout

    for name, address in (("cdi0", "192.0.2.10/24"), ("cdi1", "2001:db8::10/64"), ("cdi2", "198.51.100.1/32")):
        ip("link", "add", name, "type", "veth", "peer", "name", f"{name}peer")
        ip("addr", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
    both = {"netDevices": [{"hostInterfaceName": "cdi0", "name": "net0"}, {"hostInterfaceName": "cdi1", "name": "net1"}]}
    bad = {"netDevices": [{"hostInterfaceName": "cdi2", "name": "fine"}, {"hostInterfaceName": "absent", "name": "net2"}]}
    taken = {"netDevices": [{"hostInterfaceName": "cdi2", "name": "eth0"}]}
    write(specs[0] / "net.json", {"both": both, "bad": bad, "taken": taken}, kind="vendor.com/net", version="1.1.0")

    def device(name: str) -> list[v1.CDIDevice]:
        return [v1.CDIDevice(name=f"vendor.com/net={name}")]

    pod = daemon.run_pod()
    script = "cat /sys/class/net/net0/flags; ip addr show dev net0; ip addr show dev net1"
    for _ in range(2):
        text = output(daemon, pod, busybox, script, CDI_devices=device("both"))
        assert int(text.split()[0], 16) & 1, "up"
        assert "192.0.2.10/24" in text and "2001:db8::10/64" in text
    assert " cdi0@" not in ip("link") and " cdi1@" not in ip("link")
    # What cannot be had as a whole is not had in part: the interface that had been moved is back, with its address.
    code, text = refused(daemon, pod, busybox, CDI_devices=device("bad"))
    assert code == "FAILED_PRECONDITION" and "'absent'" in text
    assert "198.51.100.1/32" in ip("addr", "show", "dev", "cdi2")
    code, text = refused(daemon, pod, busybox, CDI_devices=device("taken"))
    assert code == "FAILED_PRECONDITION" and "'eth0'" in text
    host = daemon.run_pod(host_network=True)
    assert "host's network" in refused(daemon, host, busybox, CDI_devices=device("both"))[1]
    ip("link", "del", "cdi2")
