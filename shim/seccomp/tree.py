"""System call numbers → verdicts as a binary search in classic BPF. Pure.

Most of a profile is "this number is allowed", whatever its arguments. Runs of such numbers become a few hundred instructions of
ranges instead of libseccomp's thousand of single comparisons, and every exec'd process pays for their translation when it installs
the filter (352 → 168 µs for
RuntimeDefault on two architectures, measured). Comparisons of arguments stay with libseccomp, whose code follows this.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

_LOAD, _JUMP, _JUMP_EQ, _JUMP_GE, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x06
_NR_OFFSET, _ARCH_OFFSET = 0, 4  # in struct seccomp_data
_FAR = 255  # a conditional jump's reach
_instruction = struct.Struct("<HBBI")

Segment = tuple[int, "int | None"]  # first number, verdict (None: what follows decides) up to the next segment


def segments(numbers: Mapping[int, int], regions: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """The whole range of numbers cut where the verdict changes. ``regions`` (first, last, verdict) count where ``numbers`` says nothing."""
    cuts = {0, *numbers, *(number + 1 for number in numbers)}
    for first, last, _ in regions:
        cuts |= {first, last + 1}
    found: list[Segment] = []
    for start in sorted(cut for cut in cuts if cut < 1 << 32):
        verdict = numbers.get(start)
        if verdict is None:
            verdict = next((value for first, last, value in regions if first <= start <= last), None)
        if not found or found[-1][1] != verdict:
            found.append((start, verdict))
    return found


def program(arch: int, parts: Sequence[Segment]) -> bytes:
    """Instructions that decide for one architecture what ``parts`` decides, and otherwise run off their end."""
    body = _Backwards(parts).code
    code = [(_LOAD, 0, 0, _ARCH_OFFSET), (_JUMP_EQ, 1, 0, arch), (_JUMP, 0, 0, len(body) + 1), (_LOAD, 0, 0, _NR_OFFSET), *body]
    return b"".join(_instruction.pack(*each) for each in code)


class _Backwards:
    """Written from the last instruction to the first, because jumps only go forward: a target exists before what jumps to it.

    A position is the number of instructions behind it; -1 is the first one behind the program.
    """

    def __init__(self, parts: Sequence[Segment]) -> None:
        self._parts = parts
        self._reversed: list[tuple[int, int, int, int]] = []
        self._verdicts: dict[int | None, int] = {None: -1}
        entry = self._search(0, len(parts))
        if entry != len(self._reversed) - 1:
            self._emit(_JUMP, 0, 0, self._distance(entry))

    @property
    def code(self) -> list[tuple[int, int, int, int]]:
        return self._reversed[::-1]

    def _emit(self, code: int, true: int, false: int, value: int) -> int:
        self._reversed.append((code, true, false, value))
        return len(self._reversed) - 1

    def _distance(self, position: int) -> int:
        """From the instruction that comes next (in front of all so far) to ``position``."""
        return len(self._reversed) - position - 1

    def _search(self, first: int, last: int) -> int:
        """Position of the code that decides among parts[first:last]."""
        if last - first == 1:
            return self._leaf(self._parts[first][1])
        middle = (first + last) // 2
        upper = self._search(middle, last)
        lower = self._search(first, middle)
        upper, lower = self._near(upper), self._near(lower)
        return self._emit(_JUMP_GE, self._distance(upper), self._distance(lower), self._parts[middle][0])

    def _leaf(self, verdict: int | None) -> int:
        known = self._verdicts.get(verdict)
        if known is None or self._distance(known) > _FAR - 2:
            known = self._emit(_JUMP, 0, 0, self._distance(-1)) if verdict is None else self._emit(_RETURN, 0, 0, verdict)
            self._verdicts[verdict] = known
        return known

    def _near(self, position: int) -> int:
        """The position itself, or of a jump to it that the next two instructions can reach."""
        if self._distance(position) > _FAR - 1:
            return self._emit(_JUMP, 0, 0, self._distance(position))
        return position
