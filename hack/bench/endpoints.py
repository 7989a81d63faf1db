"""The runtimes under comparison: each in a root, a state and a cgroup of its own, so that what it uses can be told apart."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from hack import messages
from hack.node import REPOSITORY, Node, cgroup_directories, cgroup_pids, end_cgroup, unmount_below
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc

LIMIT = 16 << 20
CGROUP = f"/crishim-bench-{os.getpid()}"
PAUSE = "bench/pause:latest"
IMAGE = "bench/tools:latest"
_serial = itertools.count(1)


@dataclass
class Endpoint:
    """A CRI endpoint. ``cgroup`` empty: somebody else's, of which only latencies can be measured."""

    name: str
    socket: Path
    cgroup: str = ""
    process: subprocess.Popen[bytes] | None = None
    directory: Path = field(default_factory=Path)
    version: str = ""

    def connect(self) -> None:
        options = [("grpc.max_receive_message_length", LIMIT), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"unix:{self.socket}", options=options)
        self.runtime = api_pb2_grpc.RuntimeServiceStub(self.channel)
        self.images = api_pb2_grpc.ImageServiceStub(self.channel)
        deadline = time.monotonic() + 60
        while True:
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"{self.name} exited with {self.process.returncode}: {self.tail()}")
            try:
                reply = self.runtime.Version(v1.VersionRequest(), timeout=10, wait_for_ready=True)
                break
            except grpc.RpcError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not answer: {error}: {self.tail()}") from None
                time.sleep(0.1)
        self.version = self.version or f"{reply.runtime_name} {reply.runtime_version}"

    def tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-1500:]
        return ""

    # -- what it uses

    def cpu(self, part: str = "") -> float:
        """CPU seconds so far of everything it started, containers included; ``part`` "runtime": of its own processes only."""
        path = f"{self.cgroup}/{part}" if part else self.cgroup
        directories = cgroup_directories(path)
        for directory in directories:
            if (usage := directory / "cpuacct.usage").exists():
                return int(usage.read_text()) / 1e9
        for directory in directories:  # a hybrid machine has this file too, and it counts nothing there
            if (stat := directory / "cpu.stat").exists() and (found := re.search(r"usage_usec (\d+)", stat.read_text())):
                return int(found.group(1)) / 1e6
        return float("nan")

    def pids(self) -> list[int]:
        """Its own processes: what is in its cgroups except the workload (which is all busybox and the tools of the image)."""
        return [p for p in cgroup_pids(self.cgroup) if executable(p) not in ("busybox", "spew")]

    def pss(self) -> int:
        """Proportional set size of its own processes, in bytes."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+) kB", text, re.M).group(1)) * 1024  # type: ignore[union-attr]
        return total

    # -- pods

    def pod_config(self, **fields: object) -> v1.PodSandboxConfig:
        name = messages.unique()
        fields.setdefault("host_network", True)
        logs = str(self.directory / "logs" / name) if self.cgroup else ""
        parent = f"{self.cgroup}/pods/{name}" if self.cgroup else ""
        return messages.pod_config(name, cgroup_parent=parent, log_directory=logs, **fields)  # type: ignore[arg-type]

    def run_pod(self, config: v1.PodSandboxConfig) -> str:
        return str(self.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=config), timeout=60).pod_sandbox_id)

    def create(self, pod: str, config: v1.PodSandboxConfig, image: str, *command: str) -> str:
        container = messages.container_config(image, *command, pod=config)
        request = v1.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        return str(self.runtime.CreateContainer(request, timeout=60).container_id)

    def start(self, container: str) -> None:
        self.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=60)

    def stop(self, container: str) -> None:
        self.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=60)

    def remove(self, container: str) -> None:
        self.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=60)

    def stop_pod(self, pod: str) -> None:
        self.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def remove_pod(self, pod: str) -> None:
        self.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def exec(self, container: str, *command: str) -> None:
        reply = self.runtime.ExecSync(v1.ExecSyncRequest(container_id=container, cmd=command, timeout=30), timeout=60)
        if reply.exit_code != 0:
            raise RuntimeError(f"{self.name}: exec of {command} exited with {reply.exit_code}: {reply.stderr!r}")

    def pull(self, image: str) -> None:
        self.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=600)

    def remove_image(self, image: str) -> None:
        self.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=image)), timeout=120)

    def clear(self) -> None:
        """Every pod of it away; several at a time, because hundreds may be left."""
        from concurrent.futures import ThreadPoolExecutor

        def away(pod: str) -> None:
            self.stop_pod(pod)
            self.remove_pod(pod)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(away, [p.id for p in self.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=30).items]))

    def close(self) -> None:
        with contextlib.suppress(grpc.RpcError, AttributeError):
            if self.process is not None and self.process.poll() is None:
                self.clear()
        with contextlib.suppress(AttributeError):
            self.channel.close()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()
            end_cgroup(self.cgroup)
            unmount_below(self.directory)
            shutil.rmtree(self.directory, ignore_errors=True)


def executable(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
    return ""


def spawn(node: Node, endpoint: Endpoint, *argv: str, env: dict[str, str] | None = None) -> None:
    """Start an endpoint's daemon inside its cgroup's ``runtime`` child, in the hierarchy that counts CPU time."""
    files = []
    top = Path("/sys/fs/cgroup")
    tops = [top] if (top / "cgroup.controllers").exists() else [d for d in (top / "cpuacct", top / "cpu,cpuacct") if d.is_dir()][:1]
    for hierarchy in tops:
        directory = hierarchy / endpoint.cgroup.strip("/") / "runtime"
        directory.mkdir(parents=True, exist_ok=True)
        files.append(str(directory / "cgroup.procs"))
    enter = "".join(f"echo $$ > {file} && " for file in files)
    endpoint.process = node.daemon(endpoint.directory / "log", "sh", "-c", f'{enter}exec "$@"', "sh", *argv, env=env)
    endpoint.connect()


def make(node: Node, name: str, scratch: Path) -> Endpoint:
    directory = scratch / name
    (directory / "logs").mkdir(parents=True)
    return Endpoint(name, directory / "state" / "cri.sock", f"{CGROUP}/{name}-{next(_serial)}", directory=directory)


PLUGINS = "/usr/lib/cni"  # Debian's


def network(endpoint: Endpoint, number: int) -> Path:
    """A CNI configuration directory with a bridge, addresses and a store of the endpoint's own; the same plugins for every endpoint."""
    directory = endpoint.directory / "net.d"
    directory.mkdir()
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": f"10.24{number}.0.0/16"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(endpoint.directory / "addresses"),
    }
    bridge = {"type": "bridge", "bridge": f"cnibench{number}", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    (directory / "10-bench.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": f"bench{number}", "plugins": plugins}))
    return directory


def cri_shim(node: Node, scratch: Path) -> Endpoint:
    endpoint = make(node, "cri-shim", scratch)
    config = endpoint.directory / "config.toml"
    config.write_text(
        f'root = "{endpoint.directory}/root"\nstate = "{endpoint.directory}/state"\nlisten = "unix://{endpoint.socket}"\n'
        f'[cgroup]\ndriver = "cgroupfs"\nruntime_cgroup = "{endpoint.cgroup}/runtime"\n'
        f'[network.cni]\nconf_dir = "{network(endpoint, 0)}"\nbin_dirs = ["{PLUGINS}"]\n'
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    spawn(node, endpoint, sys.executable, "-m", "cri.cli", "serve", "--config", str(config), env=env)
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    endpoint.version = f"{endpoint.version} ({python})"
    return endpoint


CONTAINERD = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{socket}"
[debug]
  level = "error"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{registry}/{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def containerd(node: Node, scratch: Path, registry: str) -> Endpoint:
    endpoint = make(node, "containerd", scratch)
    config = endpoint.directory / "config.toml"
    cni = {"plugins": PLUGINS, "networks": network(endpoint, 1)}
    config.write_text(CONTAINERD.format(directory=endpoint.directory, socket=endpoint.socket, registry=registry, pause=PAUSE, **cni))
    spawn(node, endpoint, "containerd", "--config", str(config))
    runc = subprocess.run(["runc", "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    endpoint.version = f"{endpoint.version}, {runc.replace('version ', '')}"
    return endpoint


def external(text: str) -> Endpoint:
    """``NAME=unix:///SOCKET``."""
    name, _, address = text.partition("=")
    endpoint = Endpoint(name, Path(address.removeprefix("unix://")))
    endpoint.connect()
    return endpoint
