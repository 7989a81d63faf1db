"""Settings of RuntimeClass handlers reach pods and containers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import grpc
import pytest

from hack.node import Node
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, running
from tests.registry import DockerRegistry

EXTRA = """
[runtime.handlers.strict]
unset_seccomp_profile = "runtime/default"
unprivileged_ports = false
unprivileged_icmp = false
rlimits = { RLIMIT_NOFILE = [100, 200] }
"""
SHOW = "grep Seccomp: /proc/self/status; ulimit -Sn; ulimit -Hn; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"


def test_settings_of_handlers(node: Node, registry: DockerRegistry) -> None:
    with running(node, extra=EXTRA) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        found = {}
        for handler in ("", "strict"):
            config = daemon.pod_config()
            request = v1.RunPodSandboxRequest(config=config, runtime_handler=handler)
            pod = daemon.runtime.RunPodSandbox(request, timeout=30).pod_sandbox_id
            container = daemon.run((pod, config), image, "sh", "-c", SHOW)
            daemon.wait_exit(container)
            found[handler] = [line.split(" F ", 1)[1].split()[-1] for line in daemon.log_text(container).splitlines()]
        assert found["strict"] == ["2", "100", "200", "1024"]
        assert found[""][0] == "0" and found[""][-1] == "0"


def output(daemon: Daemon, handler: str, image: str, script: str) -> list[str]:
    config = daemon.pod_config()
    pod = daemon.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=config, runtime_handler=handler), timeout=30).pod_sandbox_id
    container = daemon.run((pod, config), image, "sh", "-c", script)
    daemon.wait_exit(container)
    return [line.split(" ", 3)[3] for line in daemon.log_text(container).splitlines()]


def test_base_runtime_spec(node: Node, registry: DockerRegistry, tmp_path: Path) -> None:
    """Mounts, limits, variables, groups' limits and hooks of a handler's file reach its containers, and only them."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_text("of the base\n")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"echo hooked > {tmp_path}/hooked"], "env": ["PATH=/bin:/usr/bin"]}
    tree = {
        "process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 111, "hard": 222}], "env": ["BASE=yes", "PATH=/nowhere"]},
        "mounts": [{"destination": "/base", "type": "bind", "source": str(tmp_path / "shared"), "options": ["rbind", "ro"]}],
        "hooks": {"createRuntime": [hook]},
        "linux": {"resources": {"pids": {"limit": 77}}},
    }
    file = tmp_path / "base.json"
    file.write_text(json.dumps(tree))
    extra = f'[runtime.handlers.based]\nbase_runtime_spec = "{file}"\n'
    with running(node, extra=extra) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        script = "ulimit -Sn; ulimit -Hn; echo [$BASE]; cat /base/file; echo x > /base/file; cat /proc/self/cgroup"
        plain = output(daemon, "", image, script)
        assert "[]" in plain and "of the base" not in plain and not (tmp_path / "hooked").exists()
        based = output(daemon, "based", image, script)
        assert based[:4] == ["111", "222", "[yes]", "of the base"]
        assert any("Read-only" in line for line in based)
        assert (tmp_path / "hooked").exists()
        # A file that is wrong is found at the start, not by the first pod.
        daemon.kill()
        file.write_text(json.dumps({"linux": {"intelRdt": {"closID": "x"}}}))
        assert daemon.spawn().wait(60) == 1
        for part in ("linux.intelRdt", "runtime.handlers.based.base_runtime_spec", str(file)):
            assert part in daemon.tail()
        file.write_text("{}")
        daemon.start()


def test_a_limit_above_the_kernels(node: Node) -> None:
    daemon = Daemon(node, extra='[runtime.handlers.""]\nrlimits = { RLIMIT_NOFILE = [1024, 9000000000] }\n')
    try:
        assert daemon.spawn().wait(60) == 1
        assert "RLIMIT_NOFILE" in daemon.tail() and "fs.nr_open" in daemon.tail()
    finally:
        daemon.close()


def test_blockio_classes(node: Node, registry: DockerRegistry, tmp_path: Path) -> None:
    """Annotations of the container and of its pod select a class, whose throttles are in the container's cgroup."""
    disk = next((p for p in ("/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0") if os.path.exists(p)), "")
    if not disk:
        pytest.skip("this machine has no block device")
    number = f"{os.major(os.stat(disk).st_rdev)}:{os.minor(os.stat(disk).st_rdev)}"
    file = tmp_path / "blockio.yaml"
    text = "Classes:\n  slow:\n  - Devices: [%s]\n    ThrottleReadBps: 1Mi\n    ThrottleWriteIOPS: %d\n"
    file.write_text(text % (disk, 50))
    with running(node, extra=f'[runtime]\nblockio_config_file = "{file}"\n') as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)

        def limits(container: str) -> str:
            for line in Path(f"/proc/{process_of(daemon, container)}/cgroup").read_text().splitlines():
                controllers, path = line.split(":", 2)[1:]
                if "blkio" in controllers.split(","):
                    names = ("read_bps", "write_iops")
                    return " ".join(Path(f"/sys/fs/cgroup/blkio{path}/blkio.throttle.{n}_device").read_text().strip() for n in names)
                if not controllers and Path(f"/sys/fs/cgroup{path}/io.max").exists():
                    return Path(f"/sys/fs/cgroup{path}/io.max").read_text().strip()
            return "no io controller"

        pod = daemon.run_pod(annotations={"blockio.resources.beta.kubernetes.io/container.one": "slow"})
        own = daemon.run(pod, image, "sleep", "60", annotations={"io.kubernetes.cri.blockio-class": "slow"})
        named = daemon.run(pod, image, "sleep", "60", name="one")
        other = daemon.run(pod, image, "sleep", "60", name="two")
        assert limits(own) in (f"{number} 1048576 {number} 50", f"{number} rbps=1048576 wbps=max riops=max wiops=50")
        assert limits(named) == limits(own)
        assert number not in limits(other)
        file.write_text(text % (disk, 7))  # read again, while the daemon runs
        changed = daemon.run(pod, image, "sleep", "60", annotations={"io.kubernetes.cri.blockio-class": "slow"})
        assert limits(changed).endswith((f"{number} 7", "wiops=7"))
        for annotation, why in (("fast", "blockio class 'fast' is not one of slow"),):
            with pytest.raises(grpc.RpcError, match=why):
                daemon.create(pod, image, "true", annotations={"io.kubernetes.cri.blockio-class": annotation})
        file.write_text("Classes: {slow: [{Weight: 1}]}")
        with pytest.raises(grpc.RpcError, match=r"blockio\.yaml: Classes\.slow\[0\]\.Weight"):
            daemon.create(pod, image, "true", annotations={"io.kubernetes.cri.blockio-class": "slow"})
        daemon.kill()
        assert daemon.spawn().wait(60) == 1
        assert "runtime.blockio_config_file" in daemon.tail()
        file.write_text("{}")
        daemon.start()


def process_of(daemon: Daemon, container: str) -> int:
    reply = daemon.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container, verbose=True), timeout=10)
    return int(json.loads(reply.info["info"])["pid"])
