"""Lists of processors as cpuset(7) writes them: "0-3,8"."""

from __future__ import annotations

_MOST = 8192  # processors: more than any kernel is built for


def parse(text: str) -> tuple[int, ...]:
    """The processors in a list, ascending. Raises ValueError for what is none."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isascii() or not first.isdigit() or (dash and not (last.isascii() and last.isdigit())):
            raise ValueError(f"{text!r} is not a list of processors")
        low, high = int(first), int(last or first)
        if not low <= high < _MOST:
            raise ValueError(f"{text!r} is not a list of processors")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def mask(text: str) -> bytes:
    """The list as sched_setaffinity(2) takes it."""
    processors = parse(text)
    size = (processors[-1] // 64 + 1) * 8
    return sum(1 << number for number in processors).to_bytes(size, "little")
