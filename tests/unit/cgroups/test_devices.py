"""Device rules: the policy they come to, version 1's files and version 2's program, which must all say the same."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.cgroups import bpf, devices
from shim.cgroups.devices import ALL, Except, Policy
from shim.errors import Failure
from shim.oci.spec import DeviceCgroup

DENY_ALL, ALLOW_ALL = DeviceCgroup(False), DeviceCgroup(True, "a")
KINDS, BITS = {1: "b", 2: "c"}, {"m": 1, "r": 2, "w": 4}


def allowed(policy: Policy, kind: str, major: int, minor: int, access: int) -> bool:
    """The kernel's devcgroup_check_permission."""
    for entry in policy.exceptions:
        if entry.kind == kind and entry.major in (None, major) and entry.minor in (None, minor):
            if not policy.allow and not access & ~entry.access:
                return True
            if policy.allow and access & entry.access:
                return False
    return policy.allow


def run(code: bytes, kind: str, major: int, minor: int, access: int) -> bool:
    """The instructions that bpf.program uses, on a struct bpf_cgroup_dev_ctx."""
    context = (access << 16 | {"b": 1, "c": 2}[kind], major, minor)
    registers = [0] * 11
    pc = 0
    while True:
        op, reg, offset, value = struct.unpack_from("<BBhi", code, pc * 8)
        dst, src, pc = reg & 15, reg >> 4, pc + 1
        if op == 0x61:
            registers[dst] = context[offset // 4]
        elif op == 0xB4:
            registers[dst] = value & 0xFFFFFFFF
        elif op == 0xBC:
            registers[dst] = registers[src]
        elif op == 0x54:
            registers[dst] &= value & 0xFFFFFFFF
        elif op == 0x74:
            registers[dst] >>= value
        elif op in (0x16, 0x56):
            equal = registers[dst] == value & 0xFFFFFFFF
            pc += offset if equal is (op == 0x16) else 0
        elif op == 0x95:
            return bool(registers[0])
        else:
            raise AssertionError(f"instruction {op:#x}")


def test_default_devices_come_with_any_denial() -> None:
    policy = devices.policy([DENY_ALL])
    assert not policy.allow
    for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 77)):
        assert allowed(policy, "c", major, minor, ALL)
    assert allowed(policy, "b", 8, 0, 1) and not allowed(policy, "b", 8, 0, 2) and not allowed(policy, "c", 1, 1, 4)


def test_a_privileged_container_needs_no_writes() -> None:
    policy = devices.policy([DENY_ALL, ALLOW_ALL])
    assert policy == Policy(True, ())
    assert devices.v1_writes(policy, None) == []
    assert devices.v1_writes(policy, "c 1:3 rwm") == [("devices.allow", (b"a",))]


def test_version_1_files_for_a_new_group() -> None:
    (deny, allow) = devices.v1_writes(devices.policy([DENY_ALL, DeviceCgroup(True, "b", 8, 0, "wr")]), None)
    assert deny == ("devices.deny", (b"a",))
    assert allow[0] == "devices.allow" and allow[1][0] == b"b 8:0 rw" and b"c 136:* rwm" in allow[1] and b"c *:* m" in allow[1]


def test_version_1_files_for_a_group_in_use() -> None:
    first = devices.policy([DENY_ALL, DeviceCgroup(True, "c", 10, 200, "rw")])
    present = "\n".join(value.decode() for value in devices.v1_writes(first, None)[1][1])
    assert devices.v1_writes(first, present) == []
    second = devices.policy([DENY_ALL, DeviceCgroup(True, "c", 10, 229)])
    assert devices.v1_writes(second, present) == [("devices.deny", (b"c 10:200 rw",)), ("devices.allow", (b"c 10:229 rwm",))]
    assert devices.v1_writes(second, "a *:* rwm")[0] == ("devices.deny", (b"a",))


def test_rules_in_order() -> None:
    rules = [DENY_ALL, DeviceCgroup(True, "c", 10, 1, "rw"), DeviceCgroup(True, "c", 10, 1, "m"), DeviceCgroup(False, "c", 10, 1, "w")]
    assert Except("c", 10, 1, 3) in devices.policy(rules).exceptions
    assert not allowed(devices.policy([*rules, DENY_ALL]), "c", 10, 1, 2)
    assert not allowed(devices.policy([*rules, DeviceCgroup(False, "c", 10, -1)]), "c", 10, 1, 2)


@pytest.mark.parametrize(
    "rules",
    [
        [DENY_ALL, DeviceCgroup(True, "c", 10, None), DeviceCgroup(False, "c", 10, 1)],
        [DeviceCgroup(True, "x", 1, 1)],
        [DeviceCgroup(True, "c", 1, 1, "rx")],
        [DeviceCgroup(True, "c", 1, 1, "rr")],
    ],
)
def test_rules_that_cannot_be(rules: list[DeviceCgroup]) -> None:
    with pytest.raises(Failure):
        devices.policy(rules)


number = st.sampled_from([None, 0, 1, 3, 10, 4294967295])
exceptions = st.builds(Except, st.sampled_from("bc"), number, number, st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(exceptions, max_size=8).map(tuple), st.data())
def test_the_program_decides_as_version_1_does(allow: bool, entries: tuple[Except, ...], data: st.DataObject) -> None:
    policy = Policy(allow, entries)
    code = bpf.program(policy)
    for _ in range(10):
        kind = data.draw(st.sampled_from("bc"))
        major, minor = data.draw(st.sampled_from([0, 1, 3, 10, 4294967295])), data.draw(st.sampled_from([0, 1, 3, 10, 77]))
        access = data.draw(st.integers(1, 7))
        assert run(code, kind, major, minor, access) == allowed(policy, kind, major, minor, access)
