"""The device program of cgroup v2: generated here, loaded and attached through bpf(2).

The kernel runs it at every open and mknod of a device with {access << 16 | type, major, minor} (struct bpf_cgroup_dev_ctx); it
returns 1 to allow. Instructions and constants are those of uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from shim.cgroups.devices import ALL, Policy
from shim.errors import Failure
from shim.linux import libc

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_CGROUP_DEVICE = 6  # attach type
_PROG_TYPE_CGROUP_DEVICE = 15
_ALLOW_MULTI, _REPLACE = 2, 4
_TYPE = {"b": 1, "c": 2}
_MOV_K, _MOV_X, _LOAD_W, _AND_K, _RSH_K, _JNE_K, _EXIT = 0xB4, 0xBC, 0x61, 0x54, 0x74, 0x56, 0x95  # the 32-bit forms
_ATTR = 128  # bytes of attributes passed: more than any command here uses, all zero behind them
_instruction = struct.Struct("<BBhi")


def _op(code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return _instruction.pack(code, src << 4 | dst, offset, value)


def program(policy: Policy) -> bytes:
    """r2 type, r3 access, r4 major, r5 minor; then one block per exception, and the default."""
    code = [
        _op(_LOAD_W, 2, 1, 0),
        _op(_MOV_X, 3, 2),
        _op(_AND_K, 2, value=0xFFFF),
        _op(_RSH_K, 3, value=16),
        _op(_LOAD_W, 4, 1, 4),
        _op(_LOAD_W, 5, 1, 8),
    ]
    for entry in policy.exceptions:
        # As version 1 decides: allowed if one exception covers every bit asked for, denied if one has any of them. A block that does
        # not decide passes on to the next.
        checks: list[tuple[int, int]] = [(2, _TYPE[entry.kind])]
        if entry.major is not None:
            checks.append((4, entry.major))
        if entry.minor is not None:
            checks.append((5, entry.minor))
        test = _access_test(entry.access, deny=policy.allow)
        verdict = [_op(_MOV_K, 0, value=int(not policy.allow)), _op(_EXIT)]
        rest = len(checks) + len(test) + len(verdict)
        for index, (register, value) in enumerate(checks):
            code.append(_op(_JNE_K, register, offset=rest - index - 1, value=_signed(value)))
        code += test + verdict
    code += [_op(_MOV_K, 0, value=int(policy.allow)), _op(_EXIT)]
    return b"".join(code)


_JEQ_K = 0x16


def _access_test(access: int, *, deny: bool) -> list[bytes]:
    """Skips the two instructions of the verdict if it does not apply; r1 is free by now."""
    if deny:
        return [_op(_MOV_X, 1, 3), _op(_AND_K, 1, value=access), _op(_JEQ_K, 1, offset=2, value=0)] if access != ALL else []
    if access == ALL:
        return []
    return [_op(_MOV_X, 1, 3), _op(_AND_K, 1, value=ALL & ~access), _op(_JNE_K, 1, offset=2, value=0)]


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def load(code: bytes) -> int:
    """The program's fd. On refusal the verifier's last line goes into the Failure."""
    instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"Apache-2.0")
    log = ctypes.create_string_buffer(1 << 16)
    address = ctypes.addressof
    head = (_PROG_TYPE_CGROUP_DEVICE, len(code) // 8, address(instructions), address(licence))
    attr = struct.pack("=IIQQIIQII16s", *head, 0, 0, 0, 0, 0, b"crishim_devices")
    try:
        return libc.bpf(_PROG_LOAD, attr.ljust(_ATTR, b"\0"))
    except OSError as error:
        first = error
    attr = attr[:24] + struct.pack("=IIQ", 1, len(log), address(log)) + attr[40:]
    try:
        return libc.bpf(_PROG_LOAD, attr.ljust(_ATTR, b"\0"))
    except OSError:
        said = log.value.decode("utf-8", "replace").strip().splitlines()
        raise Failure("cgroup", "load device program", errno=first.errno, message=said[-1] if said else "") from first


def attached(directory: int) -> list[int]:
    """Program ids attached to the cgroup itself, not those of its ancestors."""
    ids = (ctypes.c_uint32 * 64)()
    attr = ctypes.create_string_buffer(_ATTR)
    struct.pack_into("=IIIIQI", attr, 0, directory, _CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), len(ids))
    libc.bpf(_PROG_QUERY, attr)
    (count,) = struct.unpack_from("=I", attr, 24)
    return list(ids[:count])


def attach(directory: str, policy: Policy, *, in_use: bool = False) -> None:
    """Make ``policy`` the program of the cgroup. In use: replaced in one step, so there is no moment without one or with both.

    The program stays as long as the cgroup. Where several are attached (something else added its own), all must agree for an access.
    """
    group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        old = attached(group) if in_use else []
        if policy.allow and not policy.exceptions and not old:
            return  # what no program does
        new = load(program(policy))
        try:
            _attach(group, new, old)
        finally:
            os.close(new)
    except OSError as error:
        raise Failure.wrap("cgroup", "attach device program", error, directory) from error
    finally:
        os.close(group)


def _attach(group: int, new: int, old: list[int]) -> None:
    held = [libc.bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0).ljust(_ATTR, b"\0")) for number in old]
    try:
        if len(held) == 1:
            try:
                _call(_PROG_ATTACH, group, new, _ALLOW_MULTI | _REPLACE, held[0])
                return
            except OSError as error:
                if error.errno != errno.EINVAL and error.errno != errno.EPERM:  # attached without ALLOW_MULTI
                    raise
        _call(_PROG_ATTACH, group, new, _ALLOW_MULTI)
        for fd in held:  # both apply for a moment: never more than either allows
            _call(_PROG_DETACH, group, fd, 0)
    finally:
        for fd in held:
            os.close(fd)


def _call(command: int, group: int, program_fd: int, flags: int, replace: int = 0) -> None:
    libc.bpf(command, struct.pack("=IIIII", group, program_fd, _CGROUP_DEVICE, flags, replace).ljust(_ATTR, b"\0"))
