"""Cold pulls, taking turns, each endpoint on a file system of its own that is as new as the other's.

Not on the machine's disk: ext4 does not give an inode out again for some minutes after a deletion and looks at every such inode when
it creates a file, which made the same unpacking cost 0.9 or 14 CPU seconds. For the same reason no image is pulled twice: each round has
images of its own, and what is removed is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hack.bench import endpoints
from hack.bench.endpoints import Endpoint
from hack.bench.measure import Bench, Row
from hack.node import REPOSITORY, Node

DISK = 12 << 30  # bytes of a sparse file; the three rounds of containerd take 9
SETTLED = 1.5  # seconds after which what a pull left to the background is over


@dataclass(frozen=True)
class Case:
    """``count`` images at once, each of ``layers`` layers with ``files`` files."""

    name: str
    label: str
    megabytes: int
    layers: int
    files: int
    count: int = 1
    compression: str = "gzip"

    def tags(self, round: int) -> list[str]:
        return [f"bench/{self.name}-{n}:r{round}" for n in range(self.count)]


def cases(quick: bool) -> tuple[Case, ...]:
    """(a) in both compressions, (b) and (c); a tenth of them for --quick."""
    part = 10 if quick else 1
    a = (300 // part, 10, 20_000 // part)
    return (
        Case("a-gzip", f"pull of {a[0]} MB in {a[1]} layers, {a[2]} files, gzip", *a),
        Case("a-zstd", f"pull of {a[0]} MB in {a[1]} layers, {a[2]} files, zstd", *a, compression="zstd"),
        Case("b", f"pull of {1000 // part} MB in one layer", 1000 // part, 1, 4000 // part),
        Case("c", "pull of 20 images of 2 MB at once", 2, 2, 40, count=20),
    )


@contextlib.contextmanager
def disk(directory: Path) -> Iterator[Path]:
    """A new ext4 on a loop device, mounted at ``directory/disk``."""
    image, target = directory / "image", directory / "disk"
    target.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(DISK)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True, timeout=120)
    subprocess.run(["mount", "-o", "loop", image, target], check=True, timeout=60)
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", target], check=True, timeout=60)
        image.unlink()


def taken(directory: Path) -> int:
    """Bytes in use on the file system."""
    subprocess.run(["sync", "-f", directory], check=True, timeout=120)
    facts = os.statvfs(directory)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def push(node: Node, registry: str, case: Case, rounds: int) -> None:
    names = [tag for number in range(rounds) for tag in case.tags(number)]
    size = map(str, (case.megabytes, case.layers, case.files))
    command = [sys.executable, "-m", "hack.bench.images", registry, "bulk", *size, case.compression, *names]
    subprocess.run(node.command(*command), check=True, cwd=REPOSITORY, timeout=900)


def once(endpoint: Endpoint, references: Sequence[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds with what it did afterwards in the background, bytes) of pulling all of them at once."""
    before, used, began = endpoint.cpu(), taken(endpoint.directory), time.perf_counter()
    with ThreadPoolExecutor(len(references)) as pool:
        list(pool.map(endpoint.pull, references))
    seconds = time.perf_counter() - began
    time.sleep(SETTLED)
    return seconds, endpoint.cpu() - before, taken(endpoint.directory) - used


def measured(bench: Bench, node: Node, case: Case, compared: Sequence[Endpoint]) -> list[Row]:
    rounds = bench.sizes.pulls
    push(node, bench.registry, case, rounds)
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for number in range(rounds):
        references = [f"{bench.registry}/{tag}" for tag in case.tags(number)]
        for endpoint in compared if number % 2 == 0 else reversed(compared):
            found[endpoint.name].append(once(endpoint, references))
            print(f"   {case.name} {endpoint.name}: {found[endpoint.name][-1]}", file=sys.stderr, flush=True)
    rows = []
    for position, (label, unit, scale) in enumerate(
        ((case.label, "s", 1.0), ("the same, CPU", "CPU-s", 1.0), ("the same, on disk", "MB", 1e6))
    ):
        values = {name: statistics.median(v[position] for v in values) / scale for name, values in found.items()}
        rows.append(Row(label, unit, values))
    for number in range(rounds):
        for endpoint in compared:
            for tag in case.tags(number):
                endpoint.remove_image(f"{bench.registry}/{tag}")
    return rows


def pulls(bench: Bench, node: Node) -> list[Row]:
    """All cases on daemons started for this; endpoints of somebody else are not asked."""
    makers: dict[str, Callable[[Path], Endpoint]] = {
        "cri-shim": lambda place: endpoints.cri_shim(node, place),
        "containerd": lambda place: endpoints.containerd(node, place, bench.registry),
    }
    rows: list[Row] = []
    for case in cases(bench.sizes.pulls == 1):
        with contextlib.ExitStack() as stack:
            compared = []
            for endpoint in bench.endpoints:
                if endpoint.name in makers:
                    place = stack.enter_context(disk(bench.scratch / "pulls" / case.name / endpoint.name))
                    compared.append(makers[endpoint.name](place))
                    stack.callback(compared[-1].close)
            rows += measured(bench, node, case, compared)
    return rows
