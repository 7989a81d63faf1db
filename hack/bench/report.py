"""The table, with what it was measured on."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from hack.bench.endpoints import Endpoint
from hack.bench.measure import Row

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def machine() -> str:
    """CPU, memory, kernel, cgroups, distribution."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    system = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())
    cgroup = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    return ", ".join(
        (
            f"{os.cpu_count()} × {cpu.group(1).strip() if cpu else platform.machine()}",
            f"{int(memory.group(1)) // 2**20 if memory else '?'} GiB",
            f"Linux {platform.release()}",
            f"cgroup {cgroup}",
            system.group(1) if system else platform.system(),
        )
    )


def markdown(rows: Sequence[Row], endpoints: Sequence[Endpoint]) -> str:
    """The table. The ratio is how many times better the first endpoint is than the second."""
    names = [e.name for e in endpoints]
    ours, peer = names[0], names[1] if len(names) > 1 else ""
    extra = sorted({n for row in rows for n in row.values} - set(names))
    columns = [*names, *extra]
    today = datetime.date.today().isoformat()
    lines = [
        f"Measured {today} by `hack/bench/run` on {machine()}. " + "; ".join(f"{e.name}: {e.version}" for e in endpoints) + ".",
        "Both in the same network namespace, taking turns; pods use the host network where no CNI is named; "
        "median unless it says otherwise.",
        "",
        "| | unit | " + " | ".join(columns) + (" | ratio |" if peer else " |"),
        "|---|---|" + "---:|" * (len(columns) + bool(peer)),
    ]
    for row in rows:
        cells = [row.notes.get(c) or (number(row.values[c]) if c in row.values else "") for c in columns]
        line = f"| {row.label} | {row.unit} | " + " | ".join(cells)
        if peer:
            mine, theirs = row.values.get(ours, math.nan), row.values.get(peer, math.nan)
            noise = mine <= 0 or theirs <= 0 or (row.unit == "MiB" and mine < 0.05)  # of a difference
            ratio = math.nan if noise else (mine / theirs if row.more else theirs / mine)
            line += f" | {'' if math.isnan(ratio) else f'{ratio:.1f}'}"
        lines.append(line + " |")
    return "\n".join(lines) + "\n"


def insert(file: Path, table: str) -> None:
    """Put the table between the markers of a Markdown file."""
    text = file.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{file} has no {BEGIN} … {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    file.write_text(f"{head}{BEGIN}\n{table}{END}{tail}")
