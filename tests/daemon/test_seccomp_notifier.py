"""A pod's annotation has the calls counted that its containers' seccomp profile refuses, and perhaps ends them for it."""

from __future__ import annotations

import json

import grpc
import pytest

from hack.node import Node
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, running, wait_for
from tests.registry import DockerRegistry

ANNOTATION = "io.kubernetes.cri-o.seccompNotifierAction"
EXTRA = f"""
[metrics]
listen = "127.0.0.1:9464"
[runtime.handlers.counting]
unset_seccomp_profile = "runtime/default"
pod_annotations = ["{ANNOTATION}", "seccomp.cri-shim.io/notifier-action"]
"""
PIVOT = "busybox pivot_root /tmp /tmp"


def _run(daemon: Daemon, image: str, annotations: dict[str, str], handler: str, script: str) -> str:
    config = daemon.pod_config()
    config.annotations.update(annotations)
    pod = daemon.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=config, runtime_handler=handler), timeout=30).pod_sandbox_id
    return daemon.run((pod, config), image, "sh", "-c", script)


def _info(daemon: Daemon, container: str) -> dict[str, int]:
    request = v1.ContainerStatusRequest(container_id=container, verbose=True)
    return json.loads(daemon.runtime.ContainerStatus(request, timeout=10).info["info"])["seccompRefused"]


def test_counted_stopped_and_only_where_it_is_allowed(node: Node, registry: DockerRegistry) -> None:
    with running(node, extra=EXTRA) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        counting = _run(daemon, image, {ANNOTATION: "log"}, "counting", f"{PIVOT}; {PIVOT}; sleep 1000")
        script = f"trap exit TERM; {PIVOT}; while :; do sleep 0.1; done"
        stopped = _run(daemon, image, {"seccomp.cri-shim.io/notifier-action": "stop"}, "counting", script)
        not_allowed = _run(daemon, image, {ANNOTATION: "stop"}, "", f"{PIVOT}; sleep 7")
        with pytest.raises(grpc.RpcError) as refused:
            _run(daemon, image, {ANNOTATION: "maybe"}, "counting", "true")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and ANNOTATION in str(refused.value.details())
        daemon.wait_exit(stopped)
        status = daemon.container(stopped)
        assert (status.reason, status.message) == ("seccomp killed", "Used forbidden syscalls: pivot_root (1x)")
        assert _info(daemon, counting) == {"pivot_root": 2}
        assert daemon.container(counting).state == v1.CONTAINER_RUNNING
        assert _info(daemon, not_allowed) == {}
        scraped = node.run("busybox", "wget", "-qO-", "http://127.0.0.1:9464/metrics").stdout
        lines = [line for line in scraped.splitlines() if line.startswith("cri_shim_seccomp_refused_total{")]
        assert [line.rpartition(" ")[2] for line in lines if f'id="{counting}"' in line and 'syscall="pivot_root"' in line] == ["2.0"]


def test_in_a_user_namespace(node: Node, registry: DockerRegistry) -> None:
    with running(node, extra=EXTRA) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        if json.loads(daemon.runtime.Status(v1.StatusRequest(verbose=True), timeout=10).info["host"])["userNamespaces"] != "available":
            pytest.skip("pods cannot have user namespaces on this host")
        for shared in (False, True):
            config = daemon.pod_config(shared_pid=shared, annotations={ANNOTATION: "log"})
            mapping = v1.IDMapping(host_id=100000, container_id=0, length=65536)
            users = v1.UserNamespace(mode=v1.POD, uids=[mapping], gids=[mapping])
            config.linux.security_context.namespace_options.userns_options.CopyFrom(users)
            request = v1.RunPodSandboxRequest(config=config, runtime_handler="counting")
            pod = daemon.runtime.RunPodSandbox(request, timeout=30).pod_sandbox_id
            container = daemon.run((pod, config), image, "sh", "-c", f"{PIVOT}; sleep 1000")
            assert daemon.exec(container, "sh", "-c", PIVOT).exit_code != 0
            wait_for("two refusals", lambda container=container: _info(daemon, container) == {"pivot_root": 2})
