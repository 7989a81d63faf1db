"""What hack/run does once the packages are there: a daemon, an image, a pod of two containers, and everything away again at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from hack.messages import container_config, pod_config
from hack.node import REPOSITORY, Node, end_cgroup, unmount_below
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc

CGROUP = "/cri-shim-run"
NAMESPACE = "cri-shim-run"
PAGE = "<h1>served by a pod</h1>"
WEB = ("sh", "-c", f"mkdir -p /www && echo '{PAGE}' > /www/index.html && echo web: listening && exec httpd -f -v -p 80 -h /www")
CLIENT = ("sh", "-c", "until wget -qO- http://127.0.0.1/; do sleep 0.1; done; echo client: done; exec sleep 86400")


class Timer:
    """Milliseconds of each call, printed as it happens."""

    def __init__(self) -> None:
        self.total = 0.0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = (time.perf_counter() - began) * 1000
        self.total += spent
        print(f"   {name:<28}{spent:8.1f} ms", flush=True)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def stop_daemon(process: subprocess.Popen[bytes], directory: Path) -> None:
    """The daemon and, as it leaves them running on purpose, supervisor, stdio and containers."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_cgroup(CGROUP)
    unmount_below(directory)


def demonstrate(runtime: api_pb2_grpc.RuntimeServiceStub, images: api_pb2_grpc.ImageServiceStub, image: str, logs: Path) -> None:
    """The first pod, call by call, as the kubelet makes them."""
    timer = Timer()
    say("pull")
    with timer.step("PullImage"):
        images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=120)
    timer.total = 0
    say("a pod with two containers")
    pod = pod_config("first", cgroup_parent=f"{CGROUP}/pods", log_directory=str(logs))
    with timer.step("RunPodSandbox"):
        pod_id = runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=pod), timeout=60).pod_sandbox_id
    containers = {}
    for name, command in (("web", WEB), ("client", CLIENT)):
        config = container_config(image, *command, name=name, pod=pod)
        with timer.step(f"CreateContainer {name}"):
            request = v1.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
            containers[name] = runtime.CreateContainer(request, timeout=60).container_id
        with timer.step(f"StartContainer {name}"):
            runtime.StartContainer(v1.StartContainerRequest(container_id=containers[name]), timeout=60)
    print(f"   {'all of it':<28}{timer.total:8.1f} ms")

    status = runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=True), timeout=10)
    say(f"pod {pod_id[:12]} has the address {status.status.network.ip}")
    deadline = time.monotonic() + 20
    while "client: done" not in (logs / "client-0.log").read_text():
        if time.monotonic() > deadline:
            raise SystemExit("the client container did not reach the web container in 20 s")
        time.sleep(0.05)
    say("logs")
    for name in containers:
        for line in (logs / f"{name}-0.log").read_text().splitlines():
            print(f"   {name:<7}{line}")
    say("exec in web: ps")
    with timer.step("ExecSync"):
        reply = runtime.ExecSync(v1.ExecSyncRequest(container_id=containers["web"], cmd=["ps"], timeout=10), timeout=30)
    print("".join(f"   {line}\n" for line in reply.stdout.decode().splitlines()), end="")
    if stages := json.loads(status.info.get("info", "{}")).get("stagesMicroseconds"):
        say(f"RunPodSandbox by stage, in microseconds: {json.dumps(stages)}")


def serve_until_told(socket: Path, process: subprocess.Popen[bytes]) -> None:
    say("serving; Ctrl-C ends and removes everything")
    print(f"   sudo crictl --runtime-endpoint unix://{socket} ps")
    print(f"   sudo nsenter --net=/run/netns/{NAMESPACE} curl http://POD-ADDRESS/", flush=True)
    while process.poll() is None:
        time.sleep(0.5)
    raise SystemExit(f"the daemon exited with {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/run")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    root, state, logs, log = (directory / name for name in ("root", "state", "logs", "daemon.log"))
    socket = state / "cri-shim.sock"
    if socket.exists():
        remains(directory)
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        node = Node(NAMESPACE)
        stack.callback(node.down)
        node.up()
        say("a registry on the loopback of a network namespace, with an image made from this machine's busybox")
        image = stack.enter_context(node.registry(directory / "registry", "busybox")) + "/busybox:latest"
        say("the daemon, on embedded defaults")
        defaults = directory / "config.toml"  # empty: whatever /etc/cri-shim says is not for this daemon
        defaults.touch()
        flags = [
            f"--config={defaults}",
            f"--root={root}",
            f"--state={state}",
            "--network=bridge",
            f"--cgroup-runtime-cgroup={CGROUP}/runtime",
        ]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        began = time.perf_counter()
        process = node.daemon(log, sys.executable, "-m", "cri.cli", "serve", *flags, env=env)
        stack.callback(stop_daemon, process, directory)
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{socket}"))
        runtime, images = api_pb2_grpc.RuntimeServiceStub(channel), api_pb2_grpc.ImageServiceStub(channel)
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"the daemon exited with {process.returncode}:\n{log.read_text()}")
                with contextlib.suppress(grpc.RpcError):
                    version = runtime.Version(v1.VersionRequest(), timeout=5, wait_for_ready=True)
                    break
            print(f"   {version.runtime_name} {version.runtime_version} answers after {(time.perf_counter() - began) * 1000:.0f} ms")
            demonstrate(runtime, images, image, logs)
            if not arguments.once:
                serve_until_told(socket, process)
        except grpc.RpcError as error:
            print("".join(log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
            raise SystemExit(f"{error.code().name}: {error.details()}") from None
        except KeyboardInterrupt:
            print()
            say("removing everything")
        remove_pods(runtime)
    return 0


def remove_pods(runtime: api_pb2_grpc.RuntimeServiceStub) -> None:
    for pod in runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items:
        runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=30)
        runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=30)


def remains(directory: Path) -> None:
    """Away with what an earlier run left that was killed; one that still runs is not touched."""
    with grpc.insecure_channel(f"unix:{directory / 'state' / 'cri-shim.sock'}") as channel:
        try:
            api_pb2_grpc.RuntimeServiceStub(channel).Version(v1.VersionRequest(), timeout=2)
        except grpc.RpcError:
            end_cgroup(CGROUP)
            unmount_below(directory)
            subprocess.run(["ip", "netns", "delete", NAMESPACE], check=False, capture_output=True)
            shutil.rmtree(directory)
            return
    raise SystemExit(f"hack/run is running already (socket in {directory / 'state'})")


if __name__ == "__main__":
    sys.exit(main())
