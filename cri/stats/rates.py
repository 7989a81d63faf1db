"""CPU use as a rate, from two samples of a counter."""

from __future__ import annotations

from typing import Final

# Two clients that ask in turn must not make each other's intervals so short that the rate is noise.
_SHORTEST: Final = 1_000_000_000  # ns


class Rate:
    """The last samples of one group's CPU time."""

    __slots__ = ("_newer", "_older")

    def __init__(self) -> None:
        self._older: tuple[int, int] | None = None
        self._newer: tuple[int, int] | None = None

    def next(self, time: int, used: int) -> int | None:
        """Nanoseconds of CPU per second since an earlier sample that is at least a second old; None while there is none.

        ``time`` is of a clock that is never set back, ``used`` the counter, both in ns. A counter that went back begins anew.
        """
        newer = self._newer
        if newer is None or used < newer[1]:
            self._older, self._newer = None, (time, used)
            return None
        if time - newer[0] >= _SHORTEST:
            self._older, self._newer = newer, (time, used)
        if self._older is None:
            return None
        then, before = self._older
        return (used - before) * 1_000_000_000 // (time - then)
