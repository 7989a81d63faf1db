"""``python -m hack.bench.images REGISTRY PROGRAMS MEGABYTES``: builds the benchmark's images and pushes them. Runs inside the node."""

from __future__ import annotations

import sys
from pathlib import Path

from hack.images import Layer, Pusher, assemble, base_layer, big


def main(registry: str, programs: Path, megabytes: int) -> None:
    pusher = Pusher(f"http://{registry}")
    pause = Layer().file("pause", (programs / "pause").read_bytes(), 0o755).finish()
    pusher.push(assemble([pause], {"Entrypoint": ["/pause"]}), "bench/pause")
    spew = Layer().file("bin/spew", (programs / "spew").read_bytes(), 0o755).finish()
    config = {"Env": ["PATH=/bin"], "Cmd": ["sleep", "86400"]}
    pusher.push(assemble([base_layer(), spew], config), "bench/tools")
    if megabytes:
        pusher.push(big(megabytes, layers=8, files=50 * megabytes), "bench/big")
    pusher.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
