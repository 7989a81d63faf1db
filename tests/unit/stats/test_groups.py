"""Where groups are, for both versions and both drivers."""

from __future__ import annotations

import pytest

from cri.stats import groups
from shim.cgroups.layout import Layout

V1 = Layout(1, "/c", {"cpuacct": "/c/cpuacct", "memory": "/c/memory", "name=systemd": "/c/systemd"})
V2 = Layout(2, "/c", {"memory": "/c"})


def test_cgroupfs() -> None:
    assert groups.of(V1, "/kubepods/pod1/x").paths == {"cpuacct": "/c/cpuacct/kubepods/pod1/x", "memory": "/c/memory/kubepods/pod1/x"}
    assert groups.of(V2, "/kubepods/pod1/x").paths == {"": "/c/kubepods/pod1/x"}


@pytest.mark.parametrize(
    "path, expected",
    [
        (
            "kubepods-burstable-pod1.slice:cri-shim:x",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-shim-x.scope",
        ),
        (":cri-shim:x", "/system.slice/cri-shim-x.scope"),
        ("-.slice:cri-shim:x", "/cri-shim-x.scope"),
        ("/a:b/c:d", "/a:b/c:d"),
    ],
)
def test_systemd(path: str, expected: str) -> None:
    assert groups.expand(path) == expected


@pytest.mark.parametrize(
    "parent, expected",
    [
        ("/kubepods/pod1", "/kubepods/pod1"),
        ("kubepods/pod1/", "/kubepods/pod1"),
        ("//a//b", "/a/b"),
        ("/kubepods.slice/kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"),
        ("kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"),
    ],
)
def test_parents(parent: str, expected: str) -> None:
    assert groups.parent(V2, parent).path == expected
