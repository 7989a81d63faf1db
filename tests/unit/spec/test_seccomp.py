"""Localhost profiles in Docker's format."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import InvalidArgument
from cri.spec import seccomp
from shim.oci.spec import Seccomp, SeccompArg, SeccompRule


def parse(document: Any, caps: tuple[str, ...] = (), arch: str = "x86_64", kernel: tuple[int, int] = (6, 1)) -> Seccomp:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return seccomp.parse(text, field="ref", caps=caps, arch=arch, kernel=kernel)


def names(rule: dict[str, Any], **host: Any) -> tuple[str, ...]:
    found = parse({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"} | rule]}, **host)
    return tuple(n for r in found.syscalls for n in r.names)


def test_whole_profile() -> None:
    found = parse(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "comment": "unknown keys are ignored",
            "archMap": [
                {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            ],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"name": "read", "action": "SCMP_ACT_ALLOW", "args": None, "comment": "old style"},
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 22,
                    "args": [{"index": 0, "value": 16, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}],
                    "includes": {},
                    "excludes": None,
                },
            ],
        }
    )
    assert found == Seccomp(
        "SCMP_ACT_ERRNO",
        38,
        ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
        ("SECCOMP_FILTER_FLAG_LOG",),
        syscalls=(
            SeccompRule(("read",), "SCMP_ACT_ALLOW"),
            SeccompRule(("socket",), "SCMP_ACT_ERRNO", 22, (SeccompArg(0, 16, "SCMP_CMP_MASKED_EQ", 1),)),
        ),
    )


def test_architectures_as_given() -> None:
    assert parse({"defaultAction": "SCMP_ACT_LOG", "architectures": ["SCMP_ARCH_X86"]}).architectures == ("SCMP_ARCH_X86",)
    arm = {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": None}
    assert parse({"defaultAction": "SCMP_ACT_LOG", "archMap": [arm]}).architectures == ()
    assert parse({"defaultAction": "SCMP_ACT_LOG", "archMap": [arm]}, arch="aarch64").architectures == ("SCMP_ARCH_AARCH64",)


@pytest.mark.parametrize(
    ("rule", "host", "kept"),
    [
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, {}, False),
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, {"caps": ("CAP_SYS_ADMIN",)}, True),
        ({"includes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}}, {"caps": ("CAP_BPF",)}, False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, {}, True),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}}, {"caps": ("CAP_BPF",)}, False),
        ({"includes": {"arches": ["amd64", "x32"]}}, {}, True),
        ({"includes": {"arches": ["arm64"]}}, {}, False),
        ({"includes": {"arches": ["arm64"]}}, {"arch": "aarch64"}, True),
        ({"includes": {"arches": []}}, {}, True),
        ({"excludes": {"arches": ["amd64"]}}, {}, False),
        ({"includes": {"minKernel": "4.8"}}, {}, True),
        ({"includes": {"minKernel": "6.2"}}, {}, False),
        ({"includes": {"minKernel": "5.10"}}, {"kernel": (5, 9)}, False),
        ({"excludes": {"minKernel": "4.8"}}, {}, False),
        ({"includes": {"minKernel": ""}}, {}, True),
        ({"includes": {"caps": ["CAP_BPF"]}, "excludes": {"arches": ["amd64"]}}, {"caps": ("CAP_BPF",)}, False),
    ],
)
def test_conditions(rule: dict[str, Any], host: dict[str, Any], kept: bool) -> None:
    assert names(rule, **host) == (("read",) if kept else ())


OK = {"defaultAction": "SCMP_ACT_ALLOW"}


@pytest.mark.parametrize(
    "bad",
    [
        b"",  # CVE-2023-2431
        b" \n\t",
        b"{}",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 200_000,
        {"defaultAction": ""},
        {"defaultAction": 1},
        {"defaultAction": "SCMP_ACT_ALLOW\0"},
        OK | {"defaultErrnoRet": "1"},
        OK | {"defaultAction": "ALLOW"},
        OK | {"defaultAction": "RuntimeDefault"},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_MAYBE"}]},
        OK | {"syscalls": {}},
        OK | {"syscalls": [1]},
        OK | {"syscalls": [{"action": "SCMP_ACT_LOG"}]},
        OK | {"syscalls": [{"names": ["a"], "name": "b", "action": "SCMP_ACT_LOG"}]},
        OK | {"syscalls": [{"names": [1], "action": "SCMP_ACT_LOG"}]},
        OK | {"syscalls": [{"names": ["a"]}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 0}]}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "includes": []}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "includes": {"caps": "CAP_BPF"}}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "includes": {"moon": "full"}}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "includes": {"minKernel": "new"}}]},
        OK | {"syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "excludes": {"minKernel": 5}}]},
        OK | {"archMap": [1]},
        OK | {"archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": 1}]},
        OK | {"archMap": [{}], "architectures": ["SCMP_ARCH_X86"]},
    ],
)
def test_refused(bad: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(bad)
    assert str(caught.value).startswith("ref")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda c: (
        st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(["caps", "arches", "minKernel", "names", "action", "architecture"]), c)
    ),
)


@given(
    st.dictionaries(st.sampled_from(["defaultAction", "syscalls", "archMap", "architectures", "flags", "defaultErrnoRet"]), json_values)
    | st.fixed_dictionaries(
        {
            "defaultAction": st.just("SCMP_ACT_LOG"),
            "syscalls": st.lists(st.fixed_dictionaries({"names": json_values, "includes": json_values})),
        }
    )
)
def test_any_json_is_a_profile_or_a_refusal(document: Any) -> None:
    with contextlib.suppress(InvalidArgument):
        parse(document)


def test_notifier_annotation() -> None:
    default = Seccomp("RuntimeDefault")
    crio, newer, ours = seccomp.NOTIFIER_ANNOTATIONS

    def notifier(annotations: dict[str, str], allowed: tuple[str, ...] = (crio, newer, ours)) -> str:
        found = seccomp.with_notifier(default, annotations, allowed)
        assert found is not None
        return found.notifier

    assert notifier({}) == ""
    assert notifier({crio: "stop"}, allowed=()) == "", "exact names of the handler only"
    assert notifier({crio: "stop"}, allowed=(crio.lower(), crio + ".x")) == ""
    assert [notifier({name: "stop"}) for name in (crio, newer, ours)] == ["stop"] * 3
    assert notifier({crio: ""}) == notifier({crio: "log"}) == notifier({crio: "log", ours: ""}) == "log"
    assert seccomp.with_notifier(None, {crio: "stop"}, (crio,)) is None, "an unconfined container has nothing to count"
    for wrong in ({crio: "Stop"}, {crio: "stop", ours: "log"}):
        with pytest.raises(InvalidArgument, match="sandbox_config.annotations"):
            notifier(wrong)
    asking = Seccomp("SCMP_ACT_ALLOW", listener_path="/a", syscalls=(SeccompRule(("mkdir",), "SCMP_ACT_NOTIFY"),))
    with pytest.raises(InvalidArgument, match="listener of its own"):
        seccomp.with_notifier(asking, {crio: "log"}, (crio,))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}, "listenerPath"),
        ({"listenerPath": "a", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}, "not an absolute path"),
        ({"listenerPath": "/a", "syscalls": [{"names": ["execve"], "action": "SCMP_ACT_NOTIFY"}]}, "execve"),
        ({"listenerPath": "/a"}, "nothing of the profile"),
        ({"listenerMetadata": "a"}, "without listenerPath"),
        ({"notifier": "log"}, "not a word"),
    ],
)
def test_listeners_that_could_not_work(document: dict[str, Any], complaint: str) -> None:
    text = json.dumps({"defaultAction": "SCMP_ACT_ALLOW"} | document).encode()
    with pytest.raises(InvalidArgument, match=complaint):
        seccomp.parse(text, field="f", caps=(), arch="x86_64", kernel=(6, 1))
