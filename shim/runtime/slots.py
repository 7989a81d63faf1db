"""A page shared with every child, in which the kernel writes the pid of a process forked last.

A container or exec'd process in a PID namespace that others live in is forked after its filter is installed, so its parent may
not be able to tell anybody the pid. clone(2) with CLONE_PARENT_SETTID writes it into this page instead, as part of the call.
"""

from __future__ import annotations

import ctypes
import mmap

_SLOT = ctypes.sizeof(ctypes.c_int)


class PidSlots:
    """``take`` a slot, pass ``address`` to clone(2), read ``pid`` when the launch is over, ``release`` it."""

    def __init__(self, pages: int = 1) -> None:
        self._map = mmap.mmap(-1, pages * mmap.PAGESIZE)  # MAP_SHARED | MAP_ANONYMOUS
        self._pids = (ctypes.c_int * (len(self._map) // _SLOT)).from_buffer(self._map)
        self._free = list(range(len(self._pids)))

    def take(self) -> int | None:
        """A zeroed slot, or None when as many launches as slots are in flight."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._pids[slot] = 0
        return slot

    def address(self, slot: int) -> int:
        return ctypes.addressof(self._pids) + slot * _SLOT

    def pid(self, slot: int) -> int:
        """The pid as the supervisor sees it; 0 when nothing was forked."""
        return self._pids[slot]

    def release(self, slot: int) -> None:
        self._free.append(slot)
