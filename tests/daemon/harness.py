"""A node to test on: a network namespace of its own, a registry, and the daemon as a process that can be killed at any moment."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc
from tests.daemon import builders

REPOSITORY = Path(__file__).resolve().parents[2]
MESSAGE_LIMIT = 16 * 1024 * 1024
_serial = itertools.count(1)


def wait_for(what: str, test: Callable[[], Any], seconds: float = 10) -> Any:
    """Poll ``test`` until it is true and return its value; AssertionError naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        value = test()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


class Node:
    """A network namespace with loopback and a blind uplink, so that "the default route" exists and nothing leaves it."""

    def __init__(self) -> None:
        self.name = f"crishim-{os.getpid()}-{next(_serial)}"
        self.netns = f"/run/netns/{self.name}"
        self.directory = Path(tempfile.mkdtemp(prefix="csn"))

    def up(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        for line in (
            "link set lo up",
            "link add up0 type veth peer name up1",
            "addr add 192.0.2.1/24 dev up0",
            "link set up1 up",
            "link set up0 up",
            "route add default via 192.0.2.254 dev up0",
        ):
            self.run("ip", *line.split())

    def command(self, *argv: str) -> list[str]:
        """``argv`` run inside the node. Not `ip netns exec`, which hides /sys/fs/cgroup behind a fresh /sys."""
        return ["nsenter", f"--net={self.netns}", "--", *argv]

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*argv), check=True, text=True, capture_output=True, timeout=60, **options)

    def down(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Pids:
    """Our processes, told apart by their titles; ``others`` are helpers and containers of the runtime's own cgroup."""

    daemon: int | None
    supervisor: int | None
    stdio: int | None
    others: tuple[int, ...] = ()

    def all(self) -> tuple[int, ...]:
        return tuple(p for p in (self.daemon, self.supervisor, self.stdio) if p is not None) + self.others


def cgroup_directories(path: str) -> list[Path]:
    """Every directory that is the cgroup ``path``, in whatever hierarchies this host has."""
    top = Path("/sys/fs/cgroup")
    candidates = [top, *(d for d in top.iterdir() if d.is_dir() and not d.is_symlink())]
    return [d for c in candidates if (d := c / path.strip("/")).is_dir()]


def cgroup_pids(path: str) -> set[int]:
    """Processes in the cgroup ``path`` or below it."""
    pids: set[int] = set()
    for top in cgroup_directories(path):
        for directory, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                pids.update(int(p) for p in (Path(directory) / "cgroup.procs").read_text().split())
    return pids


def kill_pid(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody has reaped yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def unmount_below(directory: Path) -> None:
    """Undo what a killed daemon left mounted, deepest first."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in sorted((t for t in targets if t.startswith(f"{directory}/")), key=len, reverse=True):
        subprocess.run(["umount", "-l", target], check=False, capture_output=True)


def remove_cgroup(path: str) -> None:
    for top in cgroup_directories(path):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


@dataclass
class Daemon:
    """One daemon with a root and a state of its own. ``runtime`` and ``images`` are the gRPC stubs, made anew at every start."""

    node: Node
    extra: str = ""  # TOML appended to the configuration
    env: dict[str, str] = field(default_factory=dict)
    registry_dir: str = ""
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="csd")))
    process: subprocess.Popen[bytes] | None = None
    runtime: api_pb2_grpc.RuntimeServiceStub = field(init=False)
    images: api_pb2_grpc.ImageServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.cgroup_parent = f"/crishim-test-{os.getpid()}-{next(_serial)}"
        self.runtime_cgroup = f"{self.cgroup_parent}/runtime"
        self.root, self.state = self.directory / "root", self.directory / "state"
        self.logs = self.directory / "logs"
        self.log = self.directory / "daemon.log"
        self.socket = self.state / "cri-shim.sock"
        self.config = self.directory / "config.toml"
        self.logs.mkdir()
        self.write_config()

    def write_config(self) -> None:
        images = f'[images]\nregistry_dir = "{self.registry_dir}"\n' if self.registry_dir else ""
        self.config.write_text(
            f'root = "{self.root}"\nstate = "{self.state}"\nlisten = "unix://{self.socket}"\n'
            f'[log]\nlevel = "debug"\n'
            f'[cgroup]\ndriver = "cgroupfs"\nruntime_cgroup = "{self.runtime_cgroup}"\n'
            f'[network]\nmode = "bridge"\nsubnets = ["10.213.0.0/16"]\n'
            f"{images}{self.extra}\n"
        )

    # -- life

    def spawn(self) -> subprocess.Popen[bytes]:
        """The daemon's process, without waiting for it to serve."""
        argv = self.node.command(sys.executable, "-m", "cri.cli", "serve", "--config", str(self.config))
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **self.env}
        with self.log.open("ab") as log:
            return subprocess.Popen(argv, cwd="/", env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def start(self, seconds: float = 20) -> float:
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
        fields.setdefault("cgroup_parent", f"{self.cgroup_parent}/{name}")
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
            with contextlib.suppress(grpc.RpcError):
                self.remove_pods()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.kill(signal.SIGTERM, 10)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.disconnect()
        for _ in range(100):
            left = cgroup_pids(self.cgroup_parent)
            if not left:
                break
            for pid in left:
                kill_pid(pid)
            time.sleep(0.05)
        unmount_below(self.directory)
        remove_cgroup(self.cgroup_parent)
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
