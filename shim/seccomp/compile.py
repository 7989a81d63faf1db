"""Profile → BPF: through libseccomp, once per profile, capabilities and machine; from then on out of the cache directory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator

from shim.errors import Failure
from shim.linux import path
from shim.oci.spec import Seccomp, SeccompArg, SeccompRule
from shim.oci.validate import LAUNCH
from shim.seccomp import notify, profile, tree
from shim.seccomp.filter import Filter, flags

RUNTIME_DEFAULT = "RuntimeDefault"
_FORMAT = "1"  # of what compile() makes of a profile: count up when that changes
_MAGIC = b"cri-shim bpf 1\n\0"
_MACHINE = os.uname().machine

_ACTIONS = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_VALUE = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")

_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}

# libseccomp's token, which is the AUDIT_ARCH_* the kernel reports except for x32: that one is x86_64 with bit 30 in the number.
_TOKENS = {
    "x86_64": {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E},
    "aarch64": {"SCMP_ARCH_AARCH64": 0xC00000B7, "SCMP_ARCH_ARM": 0x40000028},
}
_X86_64, _X32, _X32_BIT, _MAX = 0xC000003E, 0x4000003E, 0x40000000, 0xFFFFFFFF

# System calls that libraries in use do not know yet. From 424 on a number is the same on every architecture.
_RECENT = {
    **{"cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456},
    **{"statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460, "lsm_list_modules": 461, "mseal": 462},
    **{"setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468},
    **{"file_setattr": 469, "listns": 470, "memfd_secret": 447, "process_mrelease": 448, "futex_waitv": 449},
    **{"set_mempolicy_home_node": 450},
}
_RECENT_HERE = {_X86_64: {**_RECENT, "uretprobe": 335}, _X32: {}}


def prepare(seccomp: Seccomp, caps: Collection[str], cache: int | None = None) -> Filter:
    """``compile`` and its flags as a Filter."""
    return Filter(compile(seccomp, caps, cache), flags(seccomp))


def compile(seccomp: Seccomp, caps: Collection[str], cache: int | None = None) -> bytes:
    """The BPF of a profile; RuntimeDefault is expanded for a container with the capabilities ``caps`` (those it may have: bounding).

    ``cache`` is a directory fd. Raises Failure for what is no profile, or without libseccomp.
    """
    marker = seccomp.default_action == RUNTIME_DEFAULT
    # libseccomp asks the kernel what it can do, and each table here may differ in the next version of this program.
    about = (profile.DIGEST, profile.relevant(caps)) if marker else ()
    key = hashlib.sha256(repr((_FORMAT, os.uname().release, _MACHINE, _RECENT, about, seccomp)).encode()).hexdigest()
    if cache is not None and (found := _load(cache, f"{key}.bpf")) is not None:
        return found
    expanded = profile.default(caps, _MACHINE) if marker else seccomp
    bpf = _build(notify.counted(expanded), counts=True) if seccomp.notifier else _build(expanded)
    if cache is not None:
        path.write_atomic(cache, f"{key}.bpf", _MAGIC + hashlib.sha256(bpf).digest() + bpf, mode=0o600)
    return bpf


def _load(cache: int, name: str) -> bytes | None:
    """A cached filter, None for one that is missing or not whole: half a filter may allow what the whole one does not."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=cache)
    except FileNotFoundError:
        return None
    try:
        data = os.read(fd, 1 << 17)
    finally:
        os.close(fd)
    head = len(_MAGIC)
    digest, bpf = data[head : head + 32], data[head + 32 :]
    if data[:head] != _MAGIC or not bpf or hashlib.sha256(bpf).digest() != digest:
        return None
    return bpf


def _build(seccomp: Seccomp, *, counts: bool = False) -> bytes:
    """``counts``: what the profile does not mention and refuses is notified, too."""
    from shim.seccomp import libseccomp  # dlopens nothing yet; most children never come here

    default = _action(seccomp.default_action, seccomp.default_errno_ret)
    if seccomp.default_action == "SCMP_ACT_NOTIFY":
        raise Failure("seccomp", path="defaultAction", message="SCMP_ACT_NOTIFY would ask about execve before anyone listens")
    tokens = _architectures(seccomp.architectures)
    rules = [(rule, action) for rule in seccomp.syscalls if (action := _action(rule.action, rule.errno_ret)) != default]
    plain = _plain(rules)
    names = {name for rule in seccomp.syscalls for name in rule.names} | (LAUNCH if counts else set())
    numbers = {token: {name: _number(token, name) for name in names} for token in tokens}
    # What one architecture multiplexes (socketcall and ipc on x86 and arm) has a pseudo-number there that only libseccomp can expand.
    ours = {name for name in plain if all(number not in _MULTIPLEXED for number in (numbers[token][name] for token in tokens))}
    with libseccomp.Builder(default) as builder:
        for token in tokens:
            builder.architecture(token)
        builder.attribute(libseccomp.CTL_OPTIMIZE, 2)
        for rule, action in rules:
            for name in rule.names:
                if name not in ours and (number := libseccomp.resolve(name)) != libseccomp.UNKNOWN:
                    for comparisons in _comparisons(rule):
                        converted = [libseccomp.Comparison(arg.index, _OPERATORS[arg.op], arg.value, arg.value_two) for arg in comparisons]
                        builder.rule(name, number, action, converted)
        rest = builder.export()
    rest_of_it = _ACTIONS["SCMP_ACT_NOTIFY"] if counts and notify.refuses(seccomp.default_action, seccomp.default_errno_ret) else None
    heads = _heads(tokens, numbers, {name: plain[name] for name in ours}, enosys=_wants_enosys(seccomp), unmentioned=rest_of_it)
    return b"".join(heads) + rest


_MULTIPLEXED = range(-300, -100)


def _plain(rules: list[tuple[SeccompRule, int]]) -> dict[str, int]:
    """Names that get one action whatever their arguments. Where rules disagree, libseccomp decides which of them counts."""
    actions: dict[str, set[int]] = {}
    unconditional: set[str] = set()
    for rule, action in rules:
        for name in rule.names:
            actions.setdefault(name, set()).add(action)
            if not rule.args:
                unconditional.add(name)
    return {name: next(iter(actions[name])) for name in unconditional if len(actions[name]) == 1}


def _number(token: int, name: str) -> int:
    from shim.seccomp import libseccomp

    number = libseccomp.resolve_for(token, name)
    return _RECENT_HERE.get(token, _RECENT).get(name, number) if number == libseccomp.UNKNOWN else number


def _heads(
    tokens: list[int], numbers: dict[int, dict[str, int]], plain: dict[str, int], *, enosys: bool, unmentioned: int | None
) -> Iterator[bytes]:
    """``unmentioned`` is the verdict on numbers between those of the profile; None leaves them to what follows."""
    refusal = _ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS
    for token in tokens:
        if token == _X32:
            continue  # numbers of its own within x86_64's architecture
        regions = []
        sets = [(token, 0, _X32_BIT - 1 if token == _X86_64 else _MAX)]
        if token == _X86_64:
            sets.append((_X32, _X32_BIT, _MAX))
        verdicts: dict[int, int] = {}
        for each, first, last in sets:
            known = {name: number for name, number in numbers.get(each, {}).items() if first <= number <= last}
            verdicts |= {number: plain[name] for name, number in known.items() if name in plain}
            if unmentioned is not None and known:
                regions += [(start, end, unmentioned) for start, end in _gaps(sorted(known.values()))]
            if enosys:
                regions.append((max(known.values(), default=first - 1) + 1, last, refusal))
        yield tree.program(token, tree.segments(verdicts, regions))


def _gaps(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of what lies between sorted numbers."""
    for before, after in itertools.pairwise(numbers):
        if after - before > 1:
            yield before + 1, after - 1


def _wants_enosys(seccomp: Seccomp) -> bool:
    """What is newer than the profile does not exist, instead of being forbidden: C libraries try new system calls first and fall back
    on ENOSYS only. A profile that says ENOSYS already, or that allows by default, needs nothing."""
    return seccomp.default_action not in _PERMISSIVE and seccomp.default_errno_ret != errno.ENOSYS


def _action(name: str, value: int | None) -> int:
    if name not in _ACTIONS:
        raise Failure("seccomp", path=name, message="no such action")
    if name not in _WITH_VALUE:
        return _ACTIONS[name]
    value = errno.EPERM if value is None else value
    if not 0 <= value <= 0xFFFF:
        raise Failure("seccomp", path=name, message=f"{value} does not fit into 16 bits")
    return _ACTIONS[name] | value


def _architectures(names: tuple[str, ...]) -> list[int]:
    """Tokens, this machine's first. What this machine cannot execute needs no rules: profiles list every architecture there is."""
    here = _TOKENS[_MACHINE]
    for name in names:
        if not name.startswith("SCMP_ARCH_"):
            raise Failure("seccomp", path="architectures", message=f"no such architecture: {name!r}")
    native = next(iter(here.values()))
    return [native, *(token for name, token in here.items() if name in names and token != native)]


def _comparisons(rule: SeccompRule) -> Iterator[tuple[SeccompArg, ...]]:
    """The conditions of each rule to add. All must hold; but two on one argument are alternatives, as in runc."""
    for arg in rule.args:
        if arg.op not in _OPERATORS:
            raise Failure("seccomp", path=arg.op, message="no such operator")
    indices = [arg.index for arg in rule.args]
    if len(set(indices)) == len(indices):
        yield rule.args
    else:
        yield from ((arg,) for arg in rule.args)
