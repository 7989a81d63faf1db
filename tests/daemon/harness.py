"""The daemon under test: a process that can be killed at any moment, with a root, a state and a cgroup of its own."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from hack.node import REPOSITORY, Node, cgroup_pids, end_cgroup, gone, kill_pid, title, unmount_below, wait_for
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc
from tests.daemon import builders

__all__ = ["Daemon", "Node", "Pids", "running", "wait_for"]

MESSAGE_LIMIT = 16 * 1024 * 1024
_serial = itertools.count(1)


@dataclass(frozen=True)
class Pids:
    """Our processes, told apart by their titles; ``others`` are helpers and containers of the runtime's own cgroup."""

    daemon: int | None
    supervisor: int | None
    stdio: int | None
    others: tuple[int, ...] = ()

    def all(self) -> tuple[int, ...]:
        return tuple(p for p in (self.daemon, self.supervisor, self.stdio) if p is not None) + self.others


@dataclass
class Daemon:
    """One daemon with a root and a state of its own. ``runtime`` and ``images`` are the gRPC stubs, made anew at every start."""

    node: Node
    extra: str = ""  # TOML appended to the configuration
    env: dict[str, str] = field(default_factory=dict)
    registry_dir: str = ""
    subnets: tuple[str, ...] = ("10.213.0.0/16",)
    driver: str = "cgroupfs"
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="csd")))
    process: subprocess.Popen[bytes] | None = None
    runtime: api_pb2_grpc.RuntimeServiceStub = field(init=False)
    images: api_pb2_grpc.ImageServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.cgroup_parent = f"/crishim-test-{os.getpid()}-{next(_serial)}"
        self.runtime_cgroup = f"{self.cgroup_parent}/runtime"
        self.slice = ""
        if self.driver != "cgroupfs":
            self.slice = f"crishim{os.getpid()}x{next(_serial)}"
            self.cgroup_parent = f"/{self.slice}.slice"
            digest = hashlib.sha256(str(self.directory / "state").encode()).hexdigest()[:8]
            self.runtime_cgroup = f"{self.cgroup_parent}/cri-shim-runtime-{digest}.scope"
        self.root, self.state = self.directory / "root", self.directory / "state"
        self.logs = self.directory / "logs"
        self.log = self.directory / "daemon.log"
        self.socket = self.state / "cri-shim.sock"
        self.config = self.directory / "config.toml"
        self.logs.mkdir()
        self.write_config()

    def write_config(self) -> None:
        images = f'[images]\nregistry_dir = "{self.registry_dir}"\n' if self.registry_dir else ""
        where = f"{self.slice}.slice" if self.slice else self.runtime_cgroup
        self.config.write_text(
            f'root = "{self.root}"\nstate = "{self.state}"\nlisten = "unix://{self.socket}"\n'
            f'[log]\nlevel = "debug"\n'
            f'[cgroup]\ndriver = "{self.driver}"\nruntime_cgroup = "{where}"\n'
            f'[network]\nmode = "bridge"\nsubnets = {json.dumps(self.subnets)}\n'
            f"{images}{self.extra}\n"
        )

    # -- life

    def spawn(self) -> subprocess.Popen[bytes]:
        """The daemon's process, without waiting for it to serve."""
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **self.env}
        return self.node.daemon(self.log, sys.executable, "-m", "cri.cli", "serve", "--config", str(self.config), env=env)

    def start(self, seconds: float = 60) -> float:
        """Start and wait until Version answers; returns the seconds that took."""
        assert self.process is None, "already started"
        began = time.monotonic()
        self.process = self.spawn()
        deadline = began + seconds
        while True:
            assert self.process.poll() is None, f"the daemon exited with {self.process.returncode}:\n{self.tail()}"
            if self.socket.exists():
                self.connect()
                with contextlib.suppress(grpc.RpcError):
                    self.runtime.Version(v1.VersionRequest(), timeout=2)
                    return time.monotonic() - began
            assert time.monotonic() < deadline, f"the daemon does not answer after {seconds} s:\n{self.tail()}"
            time.sleep(0.02)

    def connect(self) -> None:
        self.disconnect()
        limits = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.max_send_message_length", MESSAGE_LIMIT)]
        # a subchannel of an earlier daemon must not be reused: it would wait out its backoff
        self.channel = grpc.insecure_channel(f"unix:{self.socket}", options=[*limits, ("grpc.use_local_subchannel_pool", 1)])
        self.runtime = api_pb2_grpc.RuntimeServiceStub(self.channel)
        self.images = api_pb2_grpc.ImageServiceStub(self.channel)

    def disconnect(self) -> None:
        channel = self.__dict__.pop("channel", None)
        if channel is not None:
            channel.close()

    def kill(self, number: int = signal.SIGKILL, seconds: float = 20) -> int:
        """End the daemon and only it; returns its wait status as Popen reports it."""
        assert self.process is not None, "not started"
        process, self.process = self.process, None
        self.disconnect()
        process.send_signal(number)
        return process.wait(seconds)

    def restart(self, number: int = signal.SIGKILL) -> float:
        self.kill(number)
        return self.start()

    def kill_supervisor(self) -> int:
        return self._kill_one("supervisor", self.pids().supervisor)

    def kill_stdio(self) -> int:
        return self._kill_one("stdio", self.pids().stdio)

    def _kill_one(self, name: str, pid: int | None) -> int:
        assert pid is not None, f"no {name} process"
        kill_pid(pid)
        wait_for(f"the end of {name} {pid}", lambda: gone(pid))
        return pid

    def kill_everything(self) -> None:
        """SIGKILL to daemon, supervisor and stdio at once; containers are not touched."""
        pids = self.pids()
        assert self.process is not None
        process, self.process = self.process, None
        self.disconnect()
        for pid in (pids.daemon, pids.supervisor, pids.stdio):
            if pid is not None:
                kill_pid(pid)
        process.wait(20)
        wait_for("the end of all our processes", lambda: all(gone(p) for p in pids.all() if p not in pids.others))

    def pids(self) -> Pids:
        daemon = self.process.pid if self.process is not None and self.process.poll() is None else None
        members = cgroup_pids(self.runtime_cgroup) - {daemon}
        titles = {pid: title(pid) for pid in members}
        supervisor = next((p for p, t in titles.items() if "supervisor" in t), None)
        stdio = next((p for p, t in titles.items() if "stdio" in t), None)
        return Pids(daemon, supervisor, stdio, tuple(sorted(members - {supervisor, stdio})))  # type: ignore[arg-type]

    def tail(self, lines: int = 60) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    # -- pods

    def pod_config(self, name: str = "", **fields: Any) -> v1.PodSandboxConfig:
        """``builders.pod_config`` under this daemon's cgroup, with a log directory of its own."""
        name = name or builders.unique()
        parent = f"{self.cgroup_parent}/{name}"
        if self.slice:  # as the kubelet names them
            parent = f"{self.cgroup_parent}/{self.slice}-burstable.slice/{self.slice}-burstable-pod{name.replace('-', '_')}.slice"
        fields.setdefault("cgroup_parent", parent)
        fields.setdefault("log_directory", str(self.logs / name))
        return builders.pod_config(name, **fields)

    def run_pod(self, config: v1.PodSandboxConfig | None = None, **fields: Any) -> tuple[str, v1.PodSandboxConfig]:
        config = config or self.pod_config(**fields)
        reply = self.runtime.RunPodSandbox(v1.RunPodSandboxRequest(config=config), timeout=30)
        return reply.pod_sandbox_id, config

    def create(self, pod: tuple[str, v1.PodSandboxConfig], image: str, *command: str, **fields: Any) -> str:
        config = builders.container_config(image, *command, pod=pod[1], **fields)
        request = v1.CreateContainerRequest(pod_sandbox_id=pod[0], config=config, sandbox_config=pod[1])
        return self.runtime.CreateContainer(request, timeout=30).container_id

    def run(self, pod: tuple[str, v1.PodSandboxConfig], image: str, *command: str, **fields: Any) -> str:
        """Create and start."""
        container = self.create(pod, image, *command, **fields)
        self.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=30)
        return container

    def container(self, container_id: str) -> v1.ContainerStatus:
        return self.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container_id), timeout=10).status

    def wait_exit(self, container_id: str, seconds: float = 15) -> v1.ContainerStatus:
        def exited() -> v1.ContainerStatus | None:
            status = self.container(container_id)
            return status if status.state == v1.CONTAINER_EXITED else None

        return wait_for(f"the exit of {container_id[:12]}", exited, seconds)

    def log_text(self, container_id: str) -> str:
        """The CRI log file as it stands."""
        return Path(self.container(container_id).log_path).read_text(errors="replace")

    def exec(self, container_id: str, *command: str, timeout: int = 10) -> v1.ExecSyncResponse:
        request = v1.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
        return self.runtime.ExecSync(request, timeout=timeout + 20)

    def remove_pods(self) -> None:
        """Stop and remove every pod there is."""
        for pod in self.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=10).items:
            self.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=30)
            self.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=30)

    # -- end

    def close(self) -> None:
        """Stop everything this daemon started, by pid, and remove every trace; never raises for what a test has broken."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(grpc.RpcError, AttributeError):  # it may never have served
                self.remove_pods()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.kill(signal.SIGTERM, 10)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.disconnect()
        if self.slice:
            subprocess.run(["systemctl", "kill", "--signal=KILL", f"{self.slice}.slice"], check=False)
            subprocess.run(["systemctl", "stop", f"{self.slice}.slice"], check=False)
        end_cgroup(self.cgroup_parent)
        unmount_below(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running(node: Node, **options: Any) -> Iterator[Daemon]:
    """A started daemon, for tests that need one with a configuration of its own."""
    daemon = Daemon(node, **options)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()
