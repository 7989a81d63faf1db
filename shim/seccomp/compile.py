"""Profile → BPF: through libseccomp, once per profile, capabilities and machine; from then on out of the cache directory."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Collection, Iterator

from shim.errors import Failure
from shim.linux import path
from shim.oci.spec import Seccomp, SeccompArg, SeccompRule
from shim.seccomp import profile
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
_X86_64, _X32_BIT = 0xC000003E, 0x40000000

# System calls that libraries in use do not know yet. From 424 on a number is the same on every architecture.
_RECENT = {
    **{"cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456},
    **{"statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460, "lsm_list_modules": 461, "mseal": 462},
    **{"setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468},
    **{"file_setattr": 469, "listns": 470, "memfd_secret": 447, "process_mrelease": 448, "futex_waitv": 449},
    **{"set_mempolicy_home_node": 450},
}
_RECENT_HERE = {_X86_64: {"uretprobe": 335}}


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
    bpf = _build(profile.default(caps, _MACHINE) if marker else seccomp)
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


def _build(seccomp: Seccomp) -> bytes:
    from shim.seccomp import libseccomp  # dlopens nothing yet; most children never come here

    default = _action(seccomp.default_action, seccomp.default_errno_ret)
    if seccomp.default_action == "SCMP_ACT_NOTIFY":
        raise Failure("seccomp", path="defaultAction", message="SCMP_ACT_NOTIFY would ask about execve before anyone listens")
    tokens = _architectures(seccomp.architectures)
    missing: dict[str, int] = {}  # name → action, for what the library does not know but we do
    with libseccomp.Builder(default) as builder:
        for token in tokens:
            builder.architecture(token)
        builder.attribute(libseccomp.CTL_OPTIMIZE, 2)
        for rule in seccomp.syscalls:
            action = _action(rule.action, rule.errno_ret)
            if action == default:
                continue  # says nothing; the library calls it an error
            for name in rule.names:
                number = libseccomp.resolve(name)
                if number != libseccomp.UNKNOWN:
                    for comparisons in _comparisons(rule):
                        converted = [libseccomp.Comparison(arg.index, _OPERATORS[arg.op], arg.value, arg.value_two) for arg in comparisons]
                        builder.rule(name, number, action, converted)
                elif not rule.args:
                    missing.setdefault(name, action)
        bpf = builder.export()
    names = {name for rule in seccomp.syscalls for name in rule.names}
    heads = []
    for token in tokens:
        if token == _TOKENS["x86_64"]["SCMP_ARCH_X32"]:
            continue
        newest = max((libseccomp.resolve_for(token, name) for name in names), default=-1)
        heads.append(_head(token, _numbers(token, missing), newest if _wants_enosys(seccomp) else -1))
    return b"".join(heads) + bpf


def _wants_enosys(seccomp: Seccomp) -> bool:
    """What is newer than the profile does not exist, instead of being forbidden: C libraries try new system calls first and fall back
    on ENOSYS only. A profile that says ENOSYS already, or that allows by default, needs nothing."""
    return seccomp.default_action not in _PERMISSIVE and seccomp.default_errno_ret != errno.ENOSYS


def _numbers(token: int, missing: dict[str, int]) -> dict[int, int]:
    known = {**_RECENT, **_RECENT_HERE.get(token, {})}
    return {known[name]: action for name, action in missing.items() if name in known}


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


_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_GE, _RETURN, _JUMP = 0x20, 0x15, 0x25, 0x35, 0x06, 0x05
_NR_OFFSET, _ARCH_OFFSET = 0, 4  # in struct seccomp_data
_instruction = struct.Struct("<HBBI")


def _head(arch: int, numbers: dict[int, int], newest: int) -> bytes:
    """Runs before libseccomp's code, for one architecture: numbers that it does not know, then ENOSYS for what is newer than
    ``newest`` (negative: for nothing). Falls through otherwise."""
    body: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _NR_OFFSET)]
    for number, action in numbers.items():
        body += [(_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, action)]
    if newest >= 0:
        enosys = (_RETURN, 0, 0, _ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS)
        if arch == _X86_64:  # x32 numbers are all higher; libseccomp's code has them, or kills for the foreign architecture
            body += [(_JUMP_GE, 2, 0, _X32_BIT), (_JUMP_GT, 0, 1, newest), enosys]
        else:
            body += [(_JUMP_GT, 0, 1, newest), enosys]
    if len(body) == 1:
        return b""
    code = [(_LOAD, 0, 0, _ARCH_OFFSET), (_JUMP_EQ, 1, 0, arch), (_JUMP, 0, 0, len(body)), *body]
    return b"".join(_instruction.pack(*each) for each in code)
