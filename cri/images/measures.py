"""What pulls have done since the daemon began, in plain numbers: ``cri.metrics`` shows them, and reads them from a thread of its own."""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from cri.errors import AccessDenied, ImageNotFound, InvalidArgument, RegistryUnavailable, SignatureValidationFailed
from cri.images.progress import Phase, Progress
from shim.errors import Failure

#: Seconds, as upper bounds.
BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
REASONS = ("cancelled", "denied", "disk_full", "image", "invalid_reference", "not_found", "other", "signature", "unavailable")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Measures:
    """``in_flight`` lists the pulls at work."""

    def __init__(self, in_flight: Callable[[], list[Progress]]) -> None:
        self._in_flight = in_flight
        self._finished: Counter[str] = Counter()  # of pulls that are over: bytes, skipped, layers, reused
        self.running = self.succeeded = 0
        self.failed: Counter[str] = Counter()
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS) + 1)  # of successful pulls, not cumulated

    @contextmanager
    def pull(self) -> Iterator[None]:
        """Around each pull that somebody asked for."""
        began = monotonic()
        self.running += 1
        try:
            yield
        except BaseException as error:
            self.failed[reason(error)] += 1
            raise
        else:
            took = monotonic() - began
            self.succeeded += 1
            self.seconds += took
            self.buckets[bisect_left(BUCKETS, took)] += 1
        finally:
            self.running -= 1

    def finished(self, progress: Progress) -> None:
        """The work on one manifest is over; several callers may have shared it."""
        if not progress.over:
            progress.over = True
            self._finished += _sums(progress)

    def sums(self) -> Counter[str]:
        """bytes (received, also what had to be fetched again), skipped (not fetched because the layer was here), layers, reused."""
        found = self._finished.copy()
        for progress in self._in_flight():
            if not progress.over:
                found += _sums(progress)
        return found


def _sums(progress: Progress) -> Counter[str]:
    reused = [layer for layer in progress.layers if layer.phase is Phase.EXISTS]
    return Counter(
        bytes=sum(layer.received for layer in progress.layers),
        skipped=sum(layer.size for layer in reused),
        layers=sum(layer.phase is Phase.DONE for layer in progress.layers),
        reused=len(reused),
    )


def reason(error: BaseException) -> str:
    """One of REASONS."""
    match error:
        case asyncio.CancelledError():
            return "cancelled"
        case AccessDenied():
            return "denied"
        case ImageNotFound():
            return "not_found"
        case RegistryUnavailable():
            return "unavailable"
        case SignatureValidationFailed():
            return "signature"
        case InvalidArgument():
            return "invalid_reference"
        case Failure() | OSError() if error.errno in _FULL:
            return "disk_full"
        case Failure() if error.errno is None:
            return "image"  # what the registry has cannot be used
    return "other"
