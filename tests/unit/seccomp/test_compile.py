"""Compiled filters as data: run by an interpreter of classic BPF and compared with what libseccomp alone makes of the same profile."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim import seccomp
from shim.errors import Failure
from shim.oci.spec import Seccomp, SeccompArg, SeccompRule
from shim.oci.validate import LAUNCH
from shim.seccomp import filter as filters
from shim.seccomp import libseccomp, profile, tree
from shim.seccomp.compile import _ACTIONS, _OPERATORS, _TOKENS, _comparisons

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers below are of x86_64")

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
KILL_THREAD = 0
MARKER = Seccomp(seccomp.RUNTIME_DEFAULT)


def verdict(bpf: bytes, nr: int, *args: int, arch: int = X86_64) -> int:
    """What the kernel's interpreter would return."""
    padded = [*args, *(0,) * (6 - len(args))]
    data = struct.pack("<IIQ6Q", nr, arch, 0x1000, *padded)
    accumulator = pc = 0
    while True:
        code, true, false, value = struct.unpack_from("<HBBI", bpf, pc * 8)
        pc += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            pc += value
        elif code in (0x15, 0x25, 0x35, 0x45):
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
            pc += true if holds[code] else false
        elif code == 0x06:
            return int(value)
        else:
            raise AssertionError(f"instruction {code:#x}")


def plainly(wanted: Seccomp) -> bytes:
    """libseccomp alone, the way the peers use it."""
    with libseccomp.Builder(_ACTIONS[wanted.default_action] | (wanted.default_errno_ret or 0)) as builder:
        for name in wanted.architectures:
            builder.architecture(_TOKENS["x86_64"][name])
        for rule in wanted.syscalls:
            for name in rule.names:
                number = libseccomp.resolve(name)
                if number != libseccomp.UNKNOWN:
                    for args in _comparisons(rule):
                        compared = [libseccomp.Comparison(a.index, _OPERATORS[a.op], a.value, a.value_two) for a in args]
                        builder.rule(name, number, _ACTIONS[rule.action] | (rule.errno_ret or 0), compared)
        return builder.export()


@pytest.mark.parametrize("caps", [(), ("CAP_SYS_ADMIN",), ("CAP_SYS_PTRACE", "CAP_SYS_TIME", "CAP_CHOWN")])
def test_the_default_profile_means_what_libseccomp_makes_of_it(caps: tuple[str, ...]) -> None:
    expanded = profile.default(caps, "x86_64")
    ours, theirs = seccomp.compile(MARKER, caps), plainly(expanded)
    assert len(ours) < len(theirs) / 2
    for arch in (X86_64, I386):
        for nr in range(440):  # beyond, the library may know less than we do
            if nr == 335 and arch == X86_64:
                continue
            for args in ((0, 0), (2, 1), (0x20000, 0), (0x10000011, 0), (38, 5), (39, 0), (40, 1), (0xFFFFFFFF, 0)):
                assert verdict(ours, nr, *args, arch=arch) == verdict(theirs, nr, *args, arch=arch), (hex(arch), nr, args)
    assert verdict(ours, 1, arch=0xC00000B7) == verdict(theirs, 1, arch=0xC00000B7) == KILL_THREAD


def test_the_default_profile() -> None:
    bpf = seccomp.compile(MARKER, ())
    names = {"read": 0, "execve": 59, "prctl": 157, "capset": 126, "setresuid": 117, "setresgid": 119, "setgroups": 116, "clone": 56}
    for name, nr in names.items():  # what the runtime itself does between the filter and execve, among others
        assert verdict(bpf, nr) == ALLOW, name
    refused = {
        "mount": 165,
        "unshare": 272,
        "setns": 308,
        "bpf": 321,
        "io_uring_setup": 425,
        "keyctl": 250,
        "userfaultfd": 323,
        "reboot": 169,
    }
    for name, nr in refused.items():
        assert verdict(bpf, nr) == EPERM, name
    for family in range(64):
        assert verdict(bpf, 41, family) == (EPERM if family in (12, 19, 20, 23, 25, 34, 37, 38, 40) or family >= 46 else ALLOW), family
        assert verdict(bpf, 41, family | 1 << 32) == verdict(bpf, 41, family), "the kernel looks at 32 bits"
    assert verdict(bpf, 435) == ENOSYS, "clone3"
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(bpf, 56, flag | 17) == EPERM
    assert verdict(bpf, 56, 0x1200011) == ALLOW
    assert verdict(bpf, 452) == verdict(bpf, 462) == verdict(bpf, 452, arch=I386) == verdict(bpf, 335) == ALLOW, "newer than the library"
    assert verdict(bpf, 999) == verdict(bpf, 999, arch=I386) == ENOSYS, "newer than the profile"
    assert verdict(bpf, 0x40000000) == ENOSYS, "x32"
    assert verdict(bpf, 161) == EPERM
    assert verdict(seccomp.compile(MARKER, ("CAP_SYS_CHROOT",)), 161) == ALLOW
    admin = seccomp.compile(MARKER, ("CAP_SYS_ADMIN",))
    assert verdict(admin, 56, 0x10000011) == verdict(admin, 435) == verdict(admin, 165) == verdict(admin, 459) == ALLOW


def test_compare_operators_and_actions() -> None:
    rules = [
        SeccompRule(("read",), "SCMP_ACT_ERRNO", 71, (SeccompArg(2, 5, "SCMP_CMP_GT"), SeccompArg(0, 3, "SCMP_CMP_EQ"))),
        SeccompRule(("write",), "SCMP_ACT_TRAP", None, (SeccompArg(0, 1, "SCMP_CMP_NE"),)),
        SeccompRule(("open",), "SCMP_ACT_LOG", None, (SeccompArg(1, 3, "SCMP_CMP_MASKED_EQ", 1),)),
        SeccompRule(("close",), "SCMP_ACT_KILL_PROCESS", None, (SeccompArg(0, 4, "SCMP_CMP_LE"), SeccompArg(0, 90, "SCMP_CMP_GE"))),
        SeccompRule(("dup", "no_such_call"), "SCMP_ACT_NOTIFY"),
        SeccompRule(("dup2",), "SCMP_ACT_TRACE", 9),
        SeccompRule(("pipe",), "SCMP_ACT_ALLOW"),
        SeccompRule(("pause",), "SCMP_ACT_KILL"),
        SeccompRule(("mseal",), "SCMP_ACT_ERRNO"),
    ]
    bpf = seccomp.compile(Seccomp("SCMP_ACT_ALLOW", syscalls=tuple(rules)), ())
    assert verdict(bpf, 0, 3, 0, 6) == ERRNO | 71
    assert verdict(bpf, 0, 3, 0, 5) == verdict(bpf, 0, 4, 0, 6) == ALLOW
    assert (verdict(bpf, 1, 1), verdict(bpf, 1, 2)) == (ALLOW, 0x00030000)
    assert (verdict(bpf, 2, 0, 5), verdict(bpf, 2, 0, 3)) == (0x7FFC0000, ALLOW)
    assert [verdict(bpf, 3, fd) for fd in (4, 5, 89, 90)] == [0x80000000, ALLOW, ALLOW, 0x80000000], "alternatives on one argument"
    assert verdict(bpf, 32) == 0x7FC00000
    assert verdict(bpf, 33) == 0x7FF00009
    assert verdict(bpf, 34) == KILL_THREAD
    assert verdict(bpf, 462) == EPERM, "refused although the library has never heard of it"
    assert verdict(bpf, 999) == ALLOW, "no ENOSYS where everything else is allowed"


@pytest.mark.parametrize(
    "wrong",
    [
        Seccomp("SCMP_ACT_MAYBE"),
        Seccomp("SCMP_ACT_NOTIFY"),
        Seccomp("SCMP_ACT_ALLOW", architectures=("AMIGA",)),
        Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("read",), "SCMP_ACT_ERRNO", 70000),)),
        Seccomp("SCMP_ACT_ALLOW", syscalls=(SeccompRule(("read",), "SCMP_ACT_ERRNO", None, (SeccompArg(0, 0, "SCMP_CMP_IS"),)),)),
    ],
)
def test_what_is_no_profile(wrong: Seccomp) -> None:
    with pytest.raises(Failure):
        seccomp.compile(wrong, ())


def test_flags() -> None:
    notify = SeccompRule(("mkdir",), "SCMP_ACT_NOTIFY")
    names = ("SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG")
    assert filters.flags(MARKER) == filters.SPEC_ALLOW
    assert filters.flags(Seccomp("SCMP_ACT_ALLOW", flags=names)) == 3
    assert filters.flags(Seccomp("SCMP_ACT_ALLOW", flags=names, syscalls=(notify,))) == filters.LOG | filters.NEW_LISTENER
    with pytest.raises(Failure):
        filters.flags(Seccomp("SCMP_ACT_ALLOW", flags=("SECCOMP_FILTER_FLAG_X",)))
    with pytest.raises(Failure):
        filters.flags(Seccomp("SCMP_ACT_ALLOW", flags=("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",)))
    for size in (0, 7, 4097 * 8):
        with pytest.raises(Failure):
            seccomp.Filter(bytes(size))


def test_the_cache_is_whole_or_not_used(tmp_path: Path) -> None:
    cache = os.open(tmp_path, os.O_RDONLY)
    bpf = seccomp.compile(MARKER, ("CAP_CHOWN",), cache)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert seccomp.compile(MARKER, ("CAP_KILL",), cache) == bpf
    assert len(list(tmp_path.iterdir())) == 1, "capabilities that change nothing share a filter"
    whole = file.read_bytes()
    for torn in (b"", whole[:40], whole[:-8], whole[:-1] + b"\xff", b"x" + whole[1:]):
        file.write_bytes(torn)
        assert seccomp.compile(MARKER, (), cache) == bpf
        assert file.read_bytes() == whole
    file.write_bytes(whole)
    seccomp.compile(MARKER, ("CAP_SYS_ADMIN",), cache)
    assert len(list(tmp_path.iterdir())) == 2
    os.close(cache)


def test_a_cached_profile_does_not_load_the_library(tmp_path: Path) -> None:
    program = (
        "import os, sys; from shim import seccomp; from shim.oci.spec import Seccomp; "
        f"seccomp.prepare(Seccomp('RuntimeDefault'), (), os.open({str(tmp_path)!r}, os.O_RDONLY)); "
        "print('libseccomp' in open('/proc/self/maps').read())"
    )
    said = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.strip() for _ in range(2)]
    assert said == [b"True", b"False"]


def test_version() -> None:
    assert libseccomp.version() >= (2, 5, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 2000), st.sampled_from([ALLOW, EPERM, 0x7FC00000]), max_size=900),
    st.sampled_from([(), ((500, 0x3FFFFFFF, ENOSYS),), ((900, 1500, ENOSYS), (0x40000000, 0xFFFFFFFF, EPERM))]),
)
def test_the_search_finds_every_verdict(numbers: dict[int, int], regions: tuple[tuple[int, int, int], ...]) -> None:
    fallback = struct.pack("<HBBI", 0x06, 0, 0, 0x1234)
    bpf = tree.program(X86_64, tree.segments(numbers, regions)) + fallback
    for nr in (*range(0, 2002), 0x3FFFFFFF, 0x40000000, 0xFFFFFFFF):
        expected = numbers.get(nr)
        if expected is None:
            expected = next((value for first, last, value in regions if first <= nr <= last), 0x1234)
        assert verdict(bpf, nr) == expected
    assert verdict(bpf, 1, arch=I386) == 0x1234


def test_counting_asks_about_every_refusal_but_those_of_a_launch() -> None:
    plain, asking = seccomp.compile(MARKER, ()), seccomp.compile(replace(MARKER, notifier="log"), ())
    notify = 0x7FC00000
    launch = {libseccomp.resolve(name) for name in LAUNCH}
    highest = max(nr for nr in range(500) if verdict(plain, nr, 0xFFFFFFFF) == ALLOW)
    for nr in range(500):
        before, after = verdict(plain, nr), verdict(asking, nr)
        wanted = notify if before == EPERM and nr not in launch and nr <= highest else before
        assert after == wanted or (nr > highest and after in (before, notify)), nr
    assert verdict(asking, 41, 38, 5) == EPERM, "calls that are refused for their arguments are not asked about"
    assert verdict(asking, 161) == verdict(asking, 155) == notify, "chroot and pivot_root"
    assert filters.flags(replace(MARKER, notifier="log")) & filters.NEW_LISTENER
