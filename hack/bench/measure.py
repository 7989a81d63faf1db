"""The measurements. Each gives rows of the table; where endpoints can take turns, they do, so that all meet the same machine."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hack.bench.endpoints import Endpoint
from protos.runtime.v1 import api_pb2 as v1

SLEEP = ("sleep", "86400")
LINE = 100


@dataclass
class Row:
    """One line of the table. ``values`` by endpoint; less is better unless ``more``; ``notes`` are for endpoints without a figure."""

    label: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    more: bool = False
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How much of everything: full, or --quick."""

    rounds: int = 30
    execs: int = 100
    exec_load: int = 400
    burst: int = 60
    idle_pods: int = 50
    idle_seconds: int = 20
    crowd: int = 500
    lines: int = 2_000_000
    pulls: int = 3
    stream_megabytes: int = 300

    @classmethod
    def quick(cls) -> Sizes:
        return cls(6, 30, 80, 20, 10, 5, 60, 200_000, 1, 64)


@dataclass
class Bench:
    """What a measurement works with."""

    endpoints: Sequence[Endpoint]
    registry: str
    sizes: Sizes
    scratch: Path
    crowd_all: bool = False
    netns: str = ""  # the node's

    @property
    def image(self) -> str:
        return f"{self.registry}/bench/tools:latest"


class Samples:
    """Milliseconds by operation and endpoint."""

    def __init__(self) -> None:
        self.all: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    @contextmanager
    def time(self, operation: str, endpoint: Endpoint, *also: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = (time.perf_counter() - began) * 1000
        self.all[operation][endpoint.name].append(spent)
        for name in also:
            self.all[name][endpoint.name][-1] += spent

    def begin(self, operation: str, endpoint: Endpoint) -> None:
        self.all[operation][endpoint.name].append(0.0)

    def rows(self, *operations: str) -> list[Row]:
        rows = []
        for operation in operations:
            rows.append(Row(f"{operation}, median", "ms", {e: statistics.median(v) for e, v in self.all[operation].items()}))
            rows.append(Row(f"{operation}, p95", "ms", {e: percentile(v, 95) for e, v in self.all[operation].items()}))
        return rows


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def up(endpoint: Endpoint, image: str, **fields: object) -> tuple[str, str]:
    """A pod with one sleeping container, host network."""
    config = endpoint.pod_config(**fields)
    pod = endpoint.run_pod(config)
    container = endpoint.create(pod, config, image, *SLEEP)
    endpoint.start(container)
    return pod, container


def down(endpoint: Endpoint, pod: str, container: str) -> None:
    endpoint.stop(container)
    endpoint.remove(container)
    endpoint.stop_pod(pod)
    endpoint.remove_pod(pod)


def turns(bench: Bench, rounds: int) -> Iterator[Endpoint]:
    """Endpoints alternately, each going first as often as the other."""
    for number in range(rounds):
        yield from bench.endpoints if number % 2 == 0 else reversed(bench.endpoints)


def many(count: int, action: Callable[[int], object], workers: int = 10) -> float:
    """Run ``action`` ``count`` times, ``workers`` at once; seconds it took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(action, range(count)))
    return time.perf_counter() - began


# -- latencies and what they cost


def life_cycle(bench: Bench) -> list[Row]:
    """Every call of a pod's life, one pod at a time."""
    samples = Samples()
    for endpoint in bench.endpoints:
        down(endpoint, *up(endpoint, bench.image))  # first use of everything is not what is measured
    for endpoint in turns(bench, bench.sizes.rounds):
        config = endpoint.pod_config()
        samples.begin("pod up (run + create + start)", endpoint)
        total = "pod up (run + create + start)"
        with samples.time("RunPodSandbox", endpoint, total):
            pod = endpoint.run_pod(config)
        with samples.time("CreateContainer", endpoint, total):
            container = endpoint.create(pod, config, bench.image, *SLEEP)
        with samples.time("StartContainer", endpoint, total):
            endpoint.start(container)
        total = "pod down (stop + remove, both)"
        samples.begin(total, endpoint)
        with samples.time("StopContainer", endpoint, total):
            endpoint.stop(container)
        with samples.time("RemoveContainer", endpoint, total):
            endpoint.remove(container)
        with samples.time("StopPodSandbox", endpoint, total):
            endpoint.stop_pod(pod)
        with samples.time("RemovePodSandbox", endpoint, total):
            endpoint.remove_pod(pod)
    return samples.rows(
        "pod up (run + create + start)",
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "pod down (stop + remove, both)",
        "StopContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    )


def pod_network(bench: Bench) -> list[Row]:
    """A pod with a network of its own: a bridge, host-local and portmap, one host port; the same configuration list for each."""
    samples, port = Samples(), itertools.count(20000)
    run, stop = "RunPodSandbox, CNI bridge + host-local + portmap", "StopPodSandbox of it"

    def one(endpoint: Endpoint) -> None:
        mapping = v1.PortMapping(host_port=next(port), container_port=80)
        config = endpoint.pod_config(host_network=False, port_mappings=[mapping])
        with samples.time(run, endpoint):
            pod = endpoint.run_pod(config)
        with samples.time(stop, endpoint):
            endpoint.stop_pod(pod)
        endpoint.remove_pod(pod)

    for endpoint in bench.endpoints:
        one(endpoint)  # the bridge and the rules that pods share
    samples.all.clear()
    for endpoint in turns(bench, bench.sizes.rounds):
        one(endpoint)
    return samples.rows(run, stop)


def life_cycle_cpu(bench: Bench) -> list[Row]:
    row = Row("CPU per pod up and down", "CPU-ms")
    for endpoint in bench.endpoints:
        count = max(5, bench.sizes.rounds // 2)
        before = endpoint.cpu()
        for _ in range(count):
            down(endpoint, *up(endpoint, bench.image))
        time.sleep(1)  # what is cleaned up in the background belongs to it
        row.values[endpoint.name] = (endpoint.cpu() - before) / count * 1000
    return [row]


def exec_sync(bench: Bench) -> list[Row]:
    """Latency one at a time, taking turns; CPU and rate with eight clients."""
    samples = Samples()
    pods = {e.name: up(e, bench.image) for e in bench.endpoints}
    for endpoint in turns(bench, bench.sizes.execs):
        with samples.time("ExecSync", endpoint):
            endpoint.exec(pods[endpoint.name][1], "true")
    cpu, rate = Row("CPU per ExecSync, 8 clients", "CPU-ms"), Row("ExecSync rate, 8 clients", "/s", more=True)
    for endpoint in bench.endpoints:
        container = pods[endpoint.name][1]
        before = endpoint.cpu()
        seconds = many(bench.sizes.exec_load, lambda _, e=endpoint, c=container: e.exec(c, "true"), 8)  # type: ignore[misc]
        time.sleep(0.5)
        cpu.values[endpoint.name] = (endpoint.cpu() - before) / bench.sizes.exec_load * 1000
        rate.values[endpoint.name] = bench.sizes.exec_load / seconds
    for endpoint in bench.endpoints:
        down(endpoint, *pods[endpoint.name])
    return [*samples.rows("ExecSync"), cpu, rate]


def burst(bench: Bench) -> list[Row]:
    row = Row("pods started with 10 in flight", "/s", more=True)
    for endpoint in bench.endpoints:
        seconds = many(bench.sizes.burst, lambda _, e=endpoint: up(e, bench.image))  # type: ignore[misc]
        row.values[endpoint.name] = bench.sizes.burst / seconds
        endpoint.clear()
    return [row]


# -- many pods


def idle(bench: Bench) -> list[Row]:
    """Memory and CPU with pods that do nothing, and lists of a hundred containers."""
    count = bench.sizes.idle_pods
    base = Row("PSS of the runtime without pods", "MiB")
    each = Row(f"PSS per idle pod, of {count}", "MiB")
    alone = Row(f"idle CPU with {count} pods, alone", "CPU-ms/s")
    polled = Row(f"idle CPU with {count} pods, List and {count} PodSandboxStatus at 1 Hz", "CPU-ms/s")
    listing = Row(f"ListContainers with {2 * count} containers, median", "ms")
    for endpoint in bench.endpoints:
        time.sleep(1)
        before = endpoint.pss()
        base.values[endpoint.name] = before / 2**20
        pods: list[tuple[str, v1.PodSandboxConfig]] = []
        for _ in range(count):
            config = endpoint.pod_config()
            pod = endpoint.run_pod(config)
            endpoint.start(endpoint.create(pod, config, bench.image, *SLEEP))
            pods.append((pod, config))
        time.sleep(2)
        each.values[endpoint.name] = (endpoint.pss() - before) / count / 2**20
        alone.values[endpoint.name] = cpu_rate(endpoint, bench.sizes.idle_seconds, None)
        polled.values[endpoint.name] = cpu_rate(endpoint, bench.sizes.idle_seconds, [pod for pod, _ in pods])
        for pod, config in pods:
            endpoint.start(endpoint.create(pod, config, bench.image, *SLEEP))
        times = []
        for _ in range(50):
            began = time.perf_counter()
            reply = endpoint.runtime.ListContainers(v1.ListContainersRequest(), timeout=30)
            times.append((time.perf_counter() - began) * 1000)
            assert len(reply.containers) == 2 * count
        listing.values[endpoint.name] = statistics.median(times)
        endpoint.clear()
    return [base, each, alone, polled, listing]


def cpu_rate(endpoint: Endpoint, seconds: int, polled: Sequence[str] | None) -> float:
    """CPU milliseconds per second of the runtime's own processes; with ``polled``, asked once a second as the kubelet's PLEG asks."""
    before, began = endpoint.cpu("runtime"), time.monotonic()
    for second in range(seconds):
        if polled is not None:
            endpoint.runtime.ListPodSandbox(v1.ListPodSandboxRequest(), timeout=30)
            endpoint.runtime.ListContainers(v1.ListContainersRequest(), timeout=30)
            for pod in polled:
                endpoint.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=30)
        time.sleep(max(0.0, began + second + 1 - time.monotonic()))
    return (endpoint.cpu("runtime") - before) * 1000 / (time.monotonic() - began)


def crowd(bench: Bench) -> list[Row]:
    """Does a pod start slower where there are many? The peer is asked only on demand: its 500 shims need 6 GB."""
    count = bench.sizes.crowd
    none, some = Row("pod up with no other pod, median", "ms"), Row(f"pod up with {count} pods present, median", "ms")
    growth = Row(f"pod up with {count} pods / with none", "times")
    for endpoint in bench.endpoints:
        if endpoint.name == "containerd" and not bench.crowd_all:
            continue
        none.values[endpoint.name] = start_median(endpoint, bench)
        many(count, lambda _, e=endpoint: up(e, bench.image), 4)  # type: ignore[misc]
        some.values[endpoint.name] = start_median(endpoint, bench)
        growth.values[endpoint.name] = some.values[endpoint.name] / none.values[endpoint.name]
        endpoint.clear()
    return [none, some, growth]


def start_median(endpoint: Endpoint, bench: Bench) -> float:
    times = []
    for _ in range(max(10, bench.sizes.rounds)):
        began = time.perf_counter()
        pod, container = up(endpoint, bench.image)
        times.append((time.perf_counter() - began) * 1000)
        down(endpoint, pod, container)
    return statistics.median(times)


# -- logs


def logs(bench: Bench) -> list[Row]:
    """A container that writes lines of 100 bytes, each by a write of its own, as fast as it can."""
    lines = bench.sizes.lines
    megabytes = lines * LINE // 10**6
    seconds, cpu = Row(f"{megabytes} MB of {LINE}-byte log lines", "s"), Row("the same, CPU of the runtime", "CPU-s")
    wrong = Row("the same, lines lost, repeated or partial", "lines")
    for endpoint in bench.endpoints:
        config = endpoint.pod_config()
        pod = endpoint.run_pod(config)
        container = endpoint.create(pod, config, bench.image, "spew", str(lines))
        before, began = endpoint.cpu("runtime"), time.perf_counter()
        endpoint.start(container)
        status = wait_exit(endpoint, container, 600)
        seconds.values[endpoint.name] = time.perf_counter() - began
        cpu.values[endpoint.name] = endpoint.cpu("runtime") - before
        if status.exit_code != 0:
            seconds.notes[endpoint.name] = f"exit code {status.exit_code}"
        wrong.values[endpoint.name] = bad_lines(Path(status.log_path), lines)
        endpoint.stop_pod(pod)
        endpoint.remove_pod(pod)
        Path(status.log_path).unlink()
    return [seconds, cpu, wrong]


def wait_exit(endpoint: Endpoint, container: str, limit: float) -> v1.ContainerStatus:
    deadline = time.monotonic() + limit
    while True:
        status: v1.ContainerStatus = endpoint.runtime.ContainerStatus(v1.ContainerStatusRequest(container_id=container), timeout=30).status
        if status.state == v1.CONTAINER_EXITED:
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(f"{endpoint.name}: still running after {limit} s")
        time.sleep(0.02)


def bad_lines(log: Path, expected: int) -> int:
    """Records that are not the next line whole, plus those that are missing."""
    bad = seen = 0
    with log.open("rb") as file:
        for record in file:
            fields = record.split(b" ", 4)
            whole = len(fields) == 5 and fields[2] == b"F" and len(fields[3]) == 10 and len(fields[3]) + len(fields[4]) == LINE - 1
            if not whole or int(fields[3]) != seen:
                bad += 1
            seen += 1
    return bad + abs(expected - seen)


# -- the floor


def baseline(bench: Bench, programs: Path) -> list[Row]:
    """The C program, taking turns with our pod up: as near to the same moment of the machine as it gets."""
    lower, work = bench.scratch / "lower", bench.scratch / "baseline"
    for name in ("bin", "dev", "proc", "sys", "etc"):
        (lower / name).mkdir(parents=True, exist_ok=True)
    (lower / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (lower / "bin" / "busybox").chmod(0o755)
    ours = next((e for e in bench.endpoints if e.name == "cri-shim"), None)
    c_times: list[float] = []
    our_times: list[float] = []
    for number in range(max(5, bench.sizes.rounds // 2)):
        directory = work / str(number)
        directory.mkdir(parents=True)
        output = subprocess.run([programs / "baseline", lower, directory, "2"], capture_output=True, text=True, timeout=60, check=True)
        c_times.append(float(output.stdout.split()[-1]))
        if ours is not None:
            began = time.perf_counter()
            pod, container = up(ours, bench.image)
            our_times.append((time.perf_counter() - began) * 1000)
            down(ours, pod, container)
    floor = statistics.median(c_times)
    rows = [Row("C program making the system calls of a pod up, median", "ms", {"C": floor})]
    if our_times:
        rows.append(Row("pod up / C program", "times", {"cri-shim": statistics.median(our_times) / floor}))
    return rows


class Watchdog:
    """Ends a measurement that takes too long by killing nothing: it only makes the next call raise, through the endpoint's channel."""

    def __init__(self, endpoints: Sequence[Endpoint], seconds: float) -> None:
        self._timer = threading.Timer(seconds, lambda: [e.channel.close() for e in endpoints])
        self._endpoints = endpoints
        self.fired = False

    def __enter__(self) -> Watchdog:
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fired = not self._timer.is_alive()
        self._timer.cancel()
        if self.fired:
            for endpoint in self._endpoints:
                endpoint.connect()
