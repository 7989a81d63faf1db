"""User notifications: which calls are asked about, the kernel's protocol of questions and answers, and what is counted of them."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from shim.oci import bundle as bundles
from shim.oci.bundle import Refusals
from shim.oci.spec import Seccomp
from shim.oci.validate import LAUNCH

_LOCK = "seccomp.lock"  # in the bundle
_NOTIFY = "SCMP_ACT_NOTIFY"
_KILLS = frozenset({"SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS"})

_RECV, _SEND, _ID_VALID = 0xC0502100, 0xC0182101, 0x40082102  # SECCOMP_IOCTL_NOTIF_*
_notification = struct.Struct("=QIIiIQ6Q")  # id pid flags | nr arch instruction_pointer args
_response = struct.Struct("=QqiI")  # id val error flags


def refuses(action: str, errno_ret: int | None) -> bool:
    """Whether a rule forbids. ENOSYS does not: it says that a call does not exist, so that the C library falls back on another."""
    return action in _KILLS or (action == "SCMP_ACT_ERRNO" and errno_ret != errno.ENOSYS)


def counted(profile: Seccomp) -> Seccomp:
    """The profile with its refusals turned into questions, but for calls that a launch makes itself. Rules with arguments included."""
    rules = []
    for rule in profile.syscalls:
        if not refuses(rule.action, rule.errno_ret):
            rules.append(rule)
            continue
        asked, kept = tuple(n for n in rule.names if n not in LAUNCH), tuple(n for n in rule.names if n in LAUNCH)
        rules += [replace(rule, names=names, action=action, errno_ret=value) for names, action, value in (
            (asked, _NOTIFY, None), (kept, rule.action, rule.errno_ret)) if names]  # fmt: skip
    return replace(profile, syscalls=tuple(rules))


def answers(profile: Seccomp) -> tuple[dict[str, int], int]:
    """What ``profile`` does to the calls that ``counted`` asks about: errno by name, 0 for killing the process; and to all others."""

    def verdict(action: str, value: int | None) -> int:
        return 0 if action in _KILLS else errno.EPERM if value is None else value

    by_name = {
        name: verdict(rule.action, rule.errno_ret)
        for rule in profile.syscalls
        if refuses(rule.action, rule.errno_ret)
        for name in rule.names
    }
    return by_name, verdict(profile.default_action, profile.default_errno_ret)


class Question(NamedTuple):
    """``pid`` is a thread's, as the reader's PID namespace has it."""

    id: int
    pid: int
    number: int
    arch: int


def receive(fd: int) -> Question | None:
    """The next question; None where it was withdrawn meanwhile (its thread was killed). May block for the same reason."""
    buffer = bytearray(_notification.size)
    try:
        fcntl.ioctl(fd, _RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    name, pid, _, number, arch, *_ = _notification.unpack(buffer)
    return Question(name, pid, number, arch)


def refuse(fd: int, question: Question, number: int) -> None:
    """The call fails with this errno. Nothing happens to a question whose thread is gone."""
    try:
        fcntl.ioctl(fd, _SEND, bytearray(_response.pack(question.id, 0, -number, 0)))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def is_listener(fd: int) -> bool:
    """Whether ``fd`` is open and the listener of a filter: any other kind of file knows no such request."""
    try:
        fcntl.ioctl(fd, _ID_VALID, struct.pack("=Q", 0))
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def count(bundle: int, calls: Mapping[str, int], *, stopped: bool = False) -> Refusals:
    """Add to the record in the bundle. Several may count for one container (each exec session does): the lock puts them in a row."""
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=bundle)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = bundles.read_refusals(bundle) or Refusals()
        total = dict(before.calls)
        for name, number in calls.items():
            total[name] = total.get(name, 0) + number
        now = Refusals(total, before.stopped or stopped)
        bundles.write_refusals(bundle, now)
        return now
    finally:
        os.close(lock)
