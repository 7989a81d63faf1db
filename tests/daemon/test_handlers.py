"""Settings of RuntimeClass handlers reach pods and containers."""

from __future__ import annotations

from hack.node import Node
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import running
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
