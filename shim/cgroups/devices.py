"""Which device nodes a container may use: rules in their order → one policy → version 1 files, or a BPF program (``bpf``)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from typing import NamedTuple, TypeAlias

from shim.errors import Failure
from shim.oci.spec import DeviceCgroup

_BITS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*
ALL = 7
# Every spelling of an access, in any order: looked up per rule in a freshly forked child, where each object touched is a page copied.
_MASKS = {"".join(each): sum(_BITS[letter] for letter in each) for length in (1, 2, 3) for each in permutations("rwm", length)} | {"": ALL}


class Except(NamedTuple):
    """Devices that are treated against the default. ``kind`` is "c" or "b"; None is any number; ``access`` a mask of _BITS."""

    kind: str
    major: int | None
    minor: int | None
    access: int


class Policy(NamedTuple):
    """Everything is allowed (or denied) except the exceptions: the one shape that version 1 can hold."""

    allow: bool
    exceptions: tuple[Except, ...]


def _default(kind: str, major: int | None, minor: int | None, access: str = "rwm") -> DeviceCgroup:
    return DeviceCgroup(True, kind, major, minor, access)


# config-linux.md "Default Devices", which every runtime has to supply, and mknod of anything: a node is no use without access.
DEFAULTS = (
    _default("c", None, None, "m"),
    _default("b", None, None, "m"),
    _default("c", 1, 3),  # null
    _default("c", 1, 5),  # zero
    _default("c", 1, 7),  # full
    _default("c", 1, 8),  # random
    _default("c", 1, 9),  # urandom
    _default("c", 5, 0),  # tty
    _default("c", 5, 2),  # ptmx
    _default("c", 136, None),  # pts
)


_Key: TypeAlias = "tuple[str, int | None, int | None]"


def _fold(rules: Iterable[DeviceCgroup], allow: bool, exceptions: dict[_Key, int]) -> tuple[bool, dict[_Key, int]]:
    for rule in rules:
        mask = _mask(rule)
        if rule.type in ("", "a"):
            allow, exceptions = rule.allow, {}
            continue
        key = (rule.type, _number(rule.major), _number(rule.minor))
        if rule.allow is allow:
            _take_out(exceptions, key, mask)
        else:
            exceptions[key] = exceptions.get(key, 0) | mask
    return allow, exceptions


def _mask(rule: DeviceCgroup) -> int:
    mask = _MASKS.get(rule.access)
    if mask is None or rule.type not in ("", "a", "c", "b"):
        raise Failure("cgroup", path="devices", message=f"not a device rule: type {rule.type!r}, access {rule.access!r}")
    return mask


def _number(value: int | None) -> int | None:
    return None if value is None or value < 0 else value  # -1 is "any" in older specifications


def _take_out(exceptions: dict[_Key, int], key: _Key, mask: int) -> None:
    kind, major, minor = key
    for other in list(exceptions):
        if other[0] != kind or not exceptions[other] & mask:
            continue
        inside = (major is None or major == other[1]) and (minor is None or minor == other[2])
        apart = _differ(major, other[1]) or _differ(minor, other[2])
        if inside:
            exceptions[other] &= ~mask
            if not exceptions[other]:
                del exceptions[other]
        elif not apart:
            raise Failure("cgroup", path="devices", message=f"rule for {_text(*key)} takes a part out of {_text(*other)}")


_DEFAULT_MASKS = _fold(DEFAULTS, False, {})[1]


def policy(rules: Iterable[DeviceCgroup]) -> Policy:
    """The rules applied one after the other to "nothing is allowed", and the default devices after them.

    Raises Failure for a rule that takes a part out of a wider exception: version 1 cannot express it, and the versions must agree.
    """
    allow, exceptions = _fold(rules, False, {})
    if not allow:
        for key, mask in _DEFAULT_MASKS.items():
            exceptions[key] = exceptions.get(key, 0) | mask
    return Policy(allow, tuple(Except(*key, mask) for key, mask in exceptions.items()))


def _text(kind: str, major: int | None, minor: int | None) -> str:
    return f"{kind} {'*' if major is None else major}:{'*' if minor is None else minor}"


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def v1_writes(policy: Policy, present: str | None) -> list[tuple[str, tuple[bytes, ...]]]:
    """(file, one rule per write) in order. ``present`` is the devices.list of a group in use, None for a new one.

    A new group has its parent's rules: where everything is to be allowed, that is all one can have. In a group in use only what
    differs is written, so that no open(2) fails meanwhile.
    """
    wanted = [f"{_text(e.kind, e.major, e.minor)} {_letters(e.access)}" for e in policy.exceptions]
    if policy.allow:
        writes = [] if present is None else [("devices.allow", ["a"])]
        return _nonempty([*writes, ("devices.deny", wanted)])
    if present is None or present.startswith("a "):
        return _nonempty([("devices.deny", ["a"]), ("devices.allow", wanted)])
    have = present.splitlines()
    gone = [line for line in have if line not in wanted]
    # Denying an exact entry takes it away; those with other letters are added again in full.
    return _nonempty([("devices.deny", gone), ("devices.allow", [line for line in wanted if line not in have])])


def _nonempty(writes: list[tuple[str, list[str]]]) -> list[tuple[str, tuple[bytes, ...]]]:
    return [(file, tuple(value.encode() for value in values)) for file, values in writes if values]


def _letters(mask: int) -> str:
    return "".join(letter for letter in "rwm" if _BITS[letter] & mask)  # the order in devices.list
