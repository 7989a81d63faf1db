"""SELinux labels of pods and containers, from options and the policy's lxc_contexts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import host, selinux
from cri.spec.inputs import HostFacts
from protos.runtime.v1 import api_pb2 as v1
from tests.unit.spec.conftest import Build

POLICY = selinux.Contexts("system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0")
LEVEL = "s0:c1,c2"
Option = v1.SELinuxOption


def labels(contexts: selinux.Contexts | None = POLICY, *, privileged: bool = False, **options: str) -> tuple[str, str]:
    return tuple(selinux.labels(Option(**options), LEVEL, contexts, privileged=privileged, field="f"))  # type: ignore[return-value]


def test_labels() -> None:
    file = f"system_u:object_r:container_file_t:{LEVEL}"
    assert labels() == (f"system_u:system_r:container_t:{LEVEL}", file)
    assert labels(type="spc_t") == (f"system_u:system_r:spc_t:{LEVEL}", file)
    assert labels(user="u", role="r", type="t", level="s1:c5") == ("u:r:t:s1:c5", "system_u:object_r:container_file_t:s1:c5")
    assert labels(privileged=True) == ("", file), "a privileged process is not confined"
    assert labels(privileged=True, type="spc_t")[0] == f"system_u:system_r:spc_t:{LEVEL}"
    assert labels(None) == labels(None, level=LEVEL) == ("", ""), "a policy that knows no containers"
    with pytest.raises(FailedPrecondition, match="f: the loaded SELinux policy"):
        labels(None, type="t")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"user": "a:b"}, "user"),
        ({"role": "a b"}, "role"),
        ({"type": "a\n"}, "type"),
        ({"type": "a,b"}, "type"),
        ({"level": "c1"}, "level"),
        ({"level": "s0:c1;reboot"}, "level"),
        ({"level": "s0:c1,"}, "level"),
        ({"level": "s0\n"}, "level"),
    ],
)
def test_parts_refused(build: Build, options: dict[str, str], field: str) -> None:
    for facts in (HostFacts(), HostFacts(selinux=True, selinux_contexts=POLICY)):
        with pytest.raises(InvalidArgument) as caught:
            build(context={"selinux_options": Option(**options)}, host=facts)
        assert caught.value.field == f"config.linux.security_context.selinux_options.{field}"


def test_levels_that_pass() -> None:
    for level in ("s0", "s0:c1", "s0:c1,c2", "s0:c1.c5", "s0-s0:c0.c1023", "s0:c0,c5-s0:c0.c1023"):
        selinux.check(Option(level=level), "f")


def test_in_the_specification(build: Build) -> None:
    host_facts: dict[str, Any] = {"host": HostFacts(selinux=True, selinux_contexts=POLICY), "selinux_level": LEVEL}
    spec = build(**host_facts)
    assert (spec.process.selinux_label, spec.linux.mount_label) == labels()
    of_pod = build(pod_context={"selinux_options": Option(type="spc_t")}, **host_facts)
    assert of_pod.process.selinux_label == f"system_u:system_r:spc_t:{LEVEL}", "what the container leaves open is the pod's"
    both = build(context={"selinux_options": Option(level="s0:c9")}, pod_context={"selinux_options": Option(type="spc_t")}, **host_facts)
    assert both.process.selinux_label == "system_u:system_r:spc_t:s0:c9"
    without = build(context={"selinux_options": Option(type="spc_t")})
    assert (without.process.selinux_label, without.linux.mount_label) == ("", ""), "no SELinux on this host: ignored as by the peers"


def test_parse_contexts(tmp_path: Any) -> None:
    text = '# a policy\nprocess = "system_u:system_r:container_t:s0"\ncontent = "x"\nfile = "system_u:object_r:container_file_t:s0"\n'
    assert selinux.parse_contexts(text) == POLICY
    assert selinux.parse_contexts('process = "a:b:c"') is None
    (tmp_path / "mine/contexts").mkdir(parents=True)
    assert host.selinux_contexts(str(tmp_path)) is None
    (tmp_path / "config").write_text("SELINUX=enforcing\nSELINUXTYPE=mine\n")
    assert host.selinux_contexts(str(tmp_path)) is None
    (tmp_path / "mine/contexts/lxc_contexts").write_text(text)
    assert host.selinux_contexts(str(tmp_path)) == POLICY


@given(st.text())
def test_any_text_is_contexts_or_none(text: str) -> None:
    selinux.parse_contexts(text)


def test_levels_of_pods_differ() -> None:
    taken: set[str] = set()
    for _ in range(200):
        level = selinux.pick_level(POLICY, taken)
        selinux.check(Option(level=level), "f")
        assert level not in taken
        taken.add(level)
    almost = {f"s0:c{a},c{b}" for a in range(1024) for b in range(a + 1, 1024)}
    with pytest.raises(FailedPrecondition, match="categories"):
        selinux.pick_level(POLICY, almost)
