"""Codec: names, defaults, strictness and round trips of every OCI type."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.errors import Failure
from shim.oci import codec
from shim.oci.bundle import ExitRecord, Recipe
from shim.oci.sandbox import Sandbox
from shim.oci.spec import (
    CPU,
    BlockIO,
    Capabilities,
    DeviceCgroup,
    GroupsPolicy,
    HugepageLimit,
    IDMapping,
    Linux,
    Memory,
    Mount,
    Namespace,
    NamespaceType,
    Process,
    Resources,
    Root,
    Seccomp,
    SeccompRule,
    Spec,
    ThrottleDevice,
    User,
)

text = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


def spec(**changes: Any) -> Spec:
    return Spec(**{"oci_version": "1.2.0", "root": Root("rootfs"), "process": Process(("true",))} | changes)


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (IDMapping(0, 1000, 5), {"containerID": 0, "hostID": 1000, "size": 5}),
        (Memory(limit=1, disable_oom_killer=True, kernel_tcp=2), {"limit": 1, "kernelTCP": 2, "disableOOMKiller": True}),
        (BlockIO(throttle_read_iops_device=(ThrottleDevice(8, 0, 9),)), {"throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 9}]}),
        (BlockIO(throttle_read_bps_device=(ThrottleDevice(8, 0, 9),)), {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}]}),
        (Process(("a",), no_new_privileges=True, oom_score_adj=0), {"args": ["a"], "cwd": "/", "noNewPrivileges": True, "oomScoreAdj": 0}),
        (Seccomp("SCMP_ACT_ERRNO", default_errno_ret=1), {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1}),
        (Namespace(NamespaceType.PID, "pod:pid"), {"type": "pid", "path": "pod:pid"}),
        (User(0, 0, None, (1,), groups_policy=GroupsPolicy.MERGE), {"uid": 0, "gid": 0, "additionalGids": [1], "groupsPolicy": "Merge"}),
        (DeviceCgroup(allow=False), {"allow": False}),  # no default: always written, as the schema requires
        (Linux(cgroups_path="/a"), {"cgroupsPath": "/a"}),
        (Resources(block_io=BlockIO(weight=5), unified={"a": "b"}), {"blockIO": {"weight": 5}, "unified": {"a": "b"}}),
    ],
)
def test_json_names(obj: object, expected: dict[str, Any]) -> None:
    assert codec.to_json(obj) == expected
    assert codec.from_json(type(obj), expected) == obj


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        ("linux.resources.memory.limit", {"linux": {"resources": {"memory": {"limit": "1"}}}}),
        ("linux.resources.memory.limit", {"linux": {"resources": {"memory": {"limit": True}}}}),
        ("linux.resources.memory.limit", {"linux": {"resources": {"memory": {"limit": 1.5}}}}),
        ("mounts[1].destination", {"mounts": [{"destination": "/a"}, {"type": "bind"}]}),
        ("mounts[0].options[1]", {"mounts": [{"destination": "/a", "options": ["ro", 1]}]}),
        ("linux.namespaces[0].type", {"linux": {"namespaces": [{"type": "astral"}]}}),
        ("linux.namespaces[0].type", {"linux": {"namespaces": [{"type": []}]}}),
        ("linux.sysctl.a.b", {"linux": {"sysctl": {"a.b": 1}}}),
        ("process.args", {"process": {"args": "sh"}}),
        ("process.terminal", {"process": {"args": [], "terminal": 1}}),
        ("linux", {"linux": []}),
        ("annotations", {"annotations": ["a"]}),
        ("hostname", {"hostname": "a\0b"}),
        ("process.args[0]", {"process": {"args": ["\ud800"]}}),
    ],
)
def test_wrong_types_name_the_field(path: str, tree: dict[str, Any]) -> None:
    whole = codec.to_json(spec()) | tree
    with pytest.raises(Failure) as caught:
        codec.decode(Spec, json.dumps(whole).encode())
    assert (caught.value.phase, caught.value.path) == ("decode", path)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{", b'{"ociVersion": "\xff"}', b"[" * 100_000, b'{"ociVersion": NaN}', b"9" * 5000]
)
def test_not_a_spec(data: bytes) -> None:
    with pytest.raises(Failure):
        codec.decode(Spec, data)


def test_unknown_keys_and_nulls_read_as_absent() -> None:
    tree = codec.to_json(spec()) | {"vm": {"x": [1]}, "hooks": None, "mounts": None, "hostname": None}
    assert codec.from_json(Spec, tree) == spec()


@pytest.mark.parametrize("bad", ["a\0b", "\ud800", "x\udfff"])
def test_bad_strings_are_not_encoded(bad: str) -> None:
    with pytest.raises(Failure) as caught:
        codec.encode(spec(hostname=bad))
    assert caught.value.path == "hostname"
    with pytest.raises(Failure):
        codec.encode(spec(annotations={bad: "x"}))


def test_an_environment_may_hold_bytes_that_are_not_utf8() -> None:
    raw = b"A=\xff\xfe \xc3\xa9"
    s = spec(process=Process(("true",), env=(os.fsdecode(raw), "B=é")))
    data = codec.encode(s)
    data.decode()  # the file itself stays UTF-8
    assert os.fsencode(codec.decode(Spec, data).process.env[0]) == raw
    assert codec.decode(Spec, data) == s == codec.from_json(Spec, codec.to_json(s))
    for bad in ("A=\ud800", "A=\udc7f", "A=\udd00", "A=\0"):
        with pytest.raises(Failure, match="env"):
            codec.encode(spec(process=Process(("true",), env=(bad,))))


def test_escaped_text_that_looks_like_a_nul_is_kept() -> None:
    s = spec(hostname="\\u0000", annotations={"tab": "\t\x01\x7f é 😀"})
    assert codec.decode(Spec, codec.encode(s)) == s
    assert codec.decode(Spec, json.dumps(codec.to_json(s)).encode()) == s  # surrogate pairs in ASCII JSON are one character


roundtrip = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _with_text(kind: type) -> st.SearchStrategy[Any]:
    return st.from_type(kind)


st.register_type_strategy(str, text)


@roundtrip
@given(
    st.one_of(
        *map(_with_text, (Process, Capabilities, Mount, Resources, CPU, HugepageLimit, SeccompRule, Linux, Sandbox, Recipe, ExitRecord))
    )
)
def test_round_trip(obj: object) -> None:
    assert codec.decode(type(obj), codec.encode(obj)) == obj
    assert codec.from_json(type(obj), json.loads(json.dumps(codec.to_json(obj)))) == obj


@roundtrip
@given(_with_text(Spec))
def test_round_trip_spec(s: Spec) -> None:
    assert codec.decode(Spec, codec.encode(s)) == s


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text, lambda c: st.lists(c) | st.dictionaries(text, c)))
def test_any_json_gives_a_spec_or_a_failure(tree: object) -> None:
    with contextlib.suppress(Failure):  # and nothing else
        codec.decode(Spec, json.dumps({"ociVersion": tree, "process": tree, "root": tree, "linux": tree, "mounts": tree}).encode())


def test_decoding_a_typical_spec_is_fast() -> None:
    """Every container child decodes its spec. 100 µs when idle; the bound leaves room for a loaded machine."""
    s = spec(
        mounts=tuple(Mount(f"/m{i}", "bind", f"/src/{i}", ("rbind", "rprivate", "ro")) for i in range(11)),
        linux=Linux(
            tuple(Namespace(t, "pod:x") for t in NamespaceType),
            resources=Resources(devices=tuple(DeviceCgroup(True, "c", 1, i, "rwm") for i in range(13))),
            masked_paths=("/proc/kcore",) * 10,
        ),
    )
    data = codec.encode(s)
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        codec.decode(Spec, data)
        best = min(best, time.perf_counter() - started)
    assert best < 0.0006
