"""How far each pull is: for ImageStatus's verbose info, the command line and metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Of a pull or of one of its layers."""

    RESOLVING = "resolving"
    WAITING = "waiting"  # for a slot, or for another pull that has the layer
    DOWNLOADING = "downloading"
    UNPACKING = "unpacking"  # all bytes are here
    DONE = "done"
    EXISTS = "exists"  # nothing to fetch


@dataclass(slots=True)
class LayerProgress:
    digest: str
    size: int
    fetched: int = 0
    received: int = 0  # bytes, also those that had to be fetched again; never less than before
    phase: Phase = Phase.WAITING


@dataclass(slots=True)
class Progress:
    """One pull. ``references`` are all names it was asked for by."""

    references: list[str]
    phase: Phase = Phase.RESOLVING
    layers: list[LayerProgress] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first_byte: float = 0.0  # when it came; 0: not yet
    over: bool = False  # counted as finished

    def arrived(self, layer: LayerProgress, count: int) -> None:
        """Bytes of a layer."""
        self.first_byte = self.first_byte or time.monotonic()
        layer.received += count

    def to_json(self) -> dict[str, Any]:
        total = sum(layer.size for layer in self.layers)
        fetched = sum(layer.fetched for layer in self.layers if layer.phase is not Phase.EXISTS)
        wanted = sum(layer.size for layer in self.layers if layer.phase is not Phase.EXISTS)
        now = time.monotonic()
        seconds = now - self.started
        # Since the first byte, as a pull that waited for its turn is not slow; and without what an earlier pull has left.
        flowing = now - self.first_byte if self.first_byte else 0.0
        rate = sum(layer.received for layer in self.layers) / flowing if flowing > 0 else 0.0
        return {
            "references": list(self.references),
            "phase": str(self.phase),
            "size": total,
            "wanted": wanted,
            "fetched": fetched,
            "seconds": round(seconds, 3),
            "bytesPerSecond": round(rate),
            "etaSeconds": round((wanted - fetched) / rate, 1) if rate else None,
            "layers": [{"digest": x.digest, "size": x.size, "fetched": x.fetched, "phase": str(x.phase)} for x in self.layers],
        }
