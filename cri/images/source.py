"""Where an image's documents and layers come from: a registry, or an archive on this machine."""

from __future__ import annotations

from typing import Protocol

from cri.images.registry import Document, Sink


class Source(Protocol):
    """One repository. Everything it gives is verified against the digest it was asked for, by it or by the sink."""

    @property
    def remote(self) -> bool:
        """Whether fetching something a second time costs more than keeping it."""

    async def document(self, selector: str, *, capability: str = "pull") -> Document:
        """A manifest or index, by digest or tag."""

    async def small_blob(self, digest: str, size: int) -> bytes:
        """A blob of at most ``size`` bytes."""

    async def stream_blob(self, digest: str, sink: Sink, avoid: frozenset[str] = frozenset()) -> None:
        """A blob, from where the sink stands; not from places in ``avoid``, which gave wrong bytes before."""

    async def close(self) -> None: ...
