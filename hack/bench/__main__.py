"""``python -m hack.bench``: starts the runtimes, measures, prints the table, removes everything. hack/bench/run prepares the machine."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hack.bench import endpoints, measure, pulls, report, streaming
from hack.bench.measure import Bench, Row, Sizes
from hack.node import REPOSITORY, Node, end_cgroup

LIMIT = 600.0  # seconds that one measurement may take
NAMES = (
    *("life_cycle", "pod_network", "life_cycle_cpu", "exec_sync", "burst", "idle", "crowd", "logs"),
    *("pulls", "streaming", "baseline"),
)
SOURCES = Path(__file__).with_name("c")


def build(directory: Path) -> None:
    """Our C programs; static, so that they run in any image."""
    directory.mkdir()
    for source in SOURCES.glob("*.c"):
        command = ["gcc", "-O2", "-static", "-s", "-Wall", "-o", str(directory / source.stem), str(source)]
        subprocess.run(command, check=True, timeout=120)


def measurements(bench: Bench, programs: Path, node: Node) -> dict[str, Callable[[], list[Row]]]:
    found = {name: partial(getattr(measure, name), bench) for name in NAMES[:8]}
    more = {"pulls": partial(pulls.pulls, bench, node), "streaming": partial(streaming.streaming, bench)}
    return {**found, **more, "baseline": partial(measure.baseline, bench, programs)}


def run(bench: Bench, programs: Path, node: Node, only: Sequence[str]) -> list[Row]:
    """All measurements; one that fails is a row that says so, and the others go on."""
    rows: list[Row] = []
    for name, action in measurements(bench, programs, node).items():
        if only and name not in only:
            continue
        print(f"== {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            with measure.Watchdog(bench.endpoints, LIMIT):
                rows += action()
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            rows.append(Row(f"{name} failed: {first}".replace("|", "/"), ""))
            for endpoint in bench.endpoints:
                with contextlib.suppress(Exception):
                    endpoint.clear()
        print(f"   {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/bench/run")
    parser.add_argument("names", nargs="*", metavar="MEASUREMENT", help="as --only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also put the table between the markers of FILE")
    parser.add_argument("--only", default="", metavar="NAME,...", help="these measurements")
    parser.add_argument("--peer", choices=("containerd", "none"), default="containerd")
    parser.add_argument("--endpoint", action="append", default=[], metavar="NAME=unix:///SOCKET", help="one more; latencies only")
    parser.add_argument("--crowd-all", action="store_true", help="500 pods for the peer too (6 GB)")
    arguments = parser.parse_args()
    sizes = Sizes.quick() if arguments.quick else Sizes()
    only = [name for name in (*arguments.only.split(","), *arguments.names) if name]
    if unknown := set(only) - set(NAMES):
        parser.error(f"no measurement {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="csb"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        build(scratch / "programs")
        node = Node()
        stack.callback(node.down)
        node.up()
        registry = stack.enter_context(node.registry(scratch / "registry", "busybox"))
        push = [sys.executable, "-m", "hack.bench.images", registry, "tools", str(scratch / "programs")]
        subprocess.run(node.command(*push), check=True, cwd=REPOSITORY, timeout=600)
        stack.callback(end_cgroup, endpoints.CGROUP)
        compared = [endpoints.cri_shim(node, scratch)]
        stack.callback(compared[0].close)
        if arguments.peer == "containerd":
            compared.append(endpoints.containerd(node, scratch, registry))
            stack.callback(compared[1].close)
        compared += [endpoints.external(text) for text in arguments.endpoint]
        bench = Bench(compared, registry, sizes, scratch, arguments.crowd_all, node.netns)
        for endpoint in compared:
            endpoint.pull(bench.image)
        rows = run(bench, scratch / "programs", node, only)
        table = report.markdown(rows, compared)
    print(table)
    if arguments.markdown:
        report.insert(arguments.markdown, table)
    return 1 if any("failed:" in row.label for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
