"""Builds the benchmark's images and pushes them. Runs inside the node.

``python -m hack.bench.images REGISTRY tools PROGRAMS``; ``… REGISTRY bulk MEGABYTES LAYERS FILES COMPRESSION NAME:TAG...``
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from hack.images import Layer, Pusher, assemble, base_layer, bulk


def tools(pusher: Pusher, programs: Path) -> None:
    """What pods run."""
    pause = Layer().file("pause", (programs / "pause").read_bytes(), 0o755).finish()
    pusher.push(assemble([pause], {"Entrypoint": ["/pause"]}), "bench/pause")
    spew = Layer().file("bin/spew", (programs / "spew").read_bytes(), 0o755).finish()
    config = {"Env": ["PATH=/bin"], "Cmd": ["sleep", "86400"]}
    pusher.push(assemble([base_layer(), spew], config), "bench/tools")


def many(pusher: Pusher, size: Sequence[int], compression: str, names: Sequence[str]) -> None:
    """Images that share nothing."""
    for name in names:
        layers = bulk(*size, seed=zlib.crc32(name.encode()))
        repository, _, tag = name.partition(":")
        pusher.push(assemble(layers, {"Cmd": ["true"]}, compression=compression, level=1), repository, tag)  # type: ignore[arg-type]


def main(registry: str, what: str, *arguments: str) -> None:
    pusher = Pusher(f"http://{registry}")
    if what == "tools":
        tools(pusher, Path(arguments[0]))
    else:
        many(pusher, [int(a) for a in arguments[:3]], arguments[3], arguments[4:])
    pusher.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
