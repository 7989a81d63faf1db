"""Limits and their merge, cgroup paths."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import InvalidArgument
from cri.spec import cgroups, resources
from cri.spec.inputs import HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import CPU, HugepageLimit, Memory, Resources

R = v1.LinuxContainerResources


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Resources()),
        ({"cpu_shares": 2, "cpu_quota": -1, "cpu_period": 100000}, Resources(cpu=CPU(shares=2, quota=-1, period=100000))),
        ({"cpuset_cpus": "0-3,5", "cpuset_mems": "0"}, Resources(cpu=CPU(cpus="0-3,5", mems="0"))),
        ({"memory_limit_in_bytes": 5}, Resources(memory=Memory(limit=5, swap=5))),
        ({"memory_limit_in_bytes": 5, "memory_swap_limit_in_bytes": 9}, Resources(memory=Memory(limit=5, swap=9))),
        ({"memory_limit_in_bytes": 5, "memory_swap_limit_in_bytes": -1}, Resources(memory=Memory(limit=5, swap=-1))),
        ({"memory_limit_in_bytes": -1}, Resources(memory=Memory(limit=-1, swap=-1))),
        (
            {"hugepage_limits": [v1.HugepageLimit(page_size="2MB", limit=0), v1.HugepageLimit(page_size="1GB", limit=2**63)]},
            Resources(hugepage_limits=(HugepageLimit("2MB", 0), HugepageLimit("1GB", 2**63))),
        ),
        ({"unified": {"memory.high": "5"}}, Resources(unified={"memory.high": "5"})),
    ],
)
def test_build(fields: dict[str, Any], expected: Resources) -> None:
    assert resources.build(R(**fields), HostFacts()) == expected


def test_controllers_the_host_lacks() -> None:
    wanted = R(memory_limit_in_bytes=5, hugepage_limits=[v1.HugepageLimit(page_size="2MB", limit=0)])
    assert resources.build(wanted, HostFacts(swap=False, hugetlb=False)) == Resources(memory=Memory(limit=5))
    pages = R(hugepage_limits=[v1.HugepageLimit(page_size="2MB", limit=1)])
    with pytest.raises(InvalidArgument, match=r"hugepage_limits\[0\]\.limit: the hugetlb cgroup"):
        resources.build(pages, HostFacts(hugetlb=False))
    with pytest.raises(InvalidArgument, match=r"hugepage_limits\[0\]\.page_size: this host has pages of 1GB"):
        resources.build(pages, HostFacts(hugepage_sizes=frozenset({"1GB"})))
    none = R(hugepage_limits=[v1.HugepageLimit(page_size="32MB", limit=0)])
    assert resources.build(none, HostFacts(hugepage_sizes=frozenset({"2MB"}))).hugepage_limits == (HugepageLimit("32MB", 0),)
    with pytest.raises(InvalidArgument, match="unified"):
        resources.build(R(unified={"memory.high": "5"}), HostFacts(cgroup_version=1))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cpu_period": -1}, "cpu_period"),
        ({"cpu_shares": -1}, "cpu_shares"),
        ({"cpu_quota": -2}, "cpu_quota"),
        ({"memory_limit_in_bytes": -2}, "memory_limit_in_bytes"),
        ({"memory_limit_in_bytes": 5, "memory_swap_limit_in_bytes": 4}, "memory_swap_limit_in_bytes"),
        ({"memory_swap_limit_in_bytes": 4}, "memory_swap_limit_in_bytes"),
        ({"cpu_period": 999}, "cpu_period"),
        ({"cpu_period": 1000001}, "cpu_period"),
        ({"cpu_quota": 999}, "cpu_quota"),
        ({"oom_score_adj": 1001}, "oom_score_adj"),
        ({"cpuset_cpus": "0;reboot"}, "cpuset_cpus"),
        ({"cpuset_mems": "0\n1"}, "cpuset_mems"),
        ({"cpuset_cpus": "٣"}, "cpuset_cpus"),
        ({"hugepage_limits": [v1.HugepageLimit(page_size="2MB.max/../x")]}, "hugepage_limits[0].page_size"),
        ({"unified": {"../cgroup.procs": "1"}}, "unified"),
        ({"unified": {"memory": "1"}}, "unified"),
        ({"unified": {"memory.max\n": "1"}}, "unified"),
        ({"unified": {"memory.max": "1\0"}}, "unified[memory.max]"),
    ],
)
def test_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resources.build(R(**fields), HostFacts(), field="r")
    assert caught.value.field == f"r.{field}"


STORED = {"cpu_shares": 10, "cpu_quota": 2000, "memory_limit_in_bytes": 100, "cpuset_cpus": "0", "oom_score_adj": 5}


@pytest.mark.parametrize(
    ("stored", "update", "expected"),
    [
        (STORED, {}, STORED),
        (STORED, {"oom_score_adj": 7}, STORED),
        (STORED, {"cpu_shares": 11}, STORED | {"cpu_shares": 11}),
        (STORED, {"memory_limit_in_bytes": 50, "cpuset_cpus": "1"}, STORED | {"memory_limit_in_bytes": 50, "cpuset_cpus": "1"}),
        (
            {"memory_limit_in_bytes": 100, "memory_swap_limit_in_bytes": 150},
            {"memory_limit_in_bytes": 200},
            {"memory_limit_in_bytes": 200, "memory_swap_limit_in_bytes": 200},
        ),
        (
            {"memory_limit_in_bytes": 100, "memory_swap_limit_in_bytes": 150},
            {"memory_limit_in_bytes": 120},
            {"memory_limit_in_bytes": 120, "memory_swap_limit_in_bytes": 150},
        ),
        ({"unified": {"a.b": "1", "a.c": "1"}}, {"unified": {"a.c": "2"}}, {"unified": {"a.b": "1", "a.c": "2"}}),
        (
            {"hugepage_limits": [v1.HugepageLimit(page_size="2MB", limit=1), v1.HugepageLimit(page_size="1GB", limit=1)]},
            {"hugepage_limits": [v1.HugepageLimit(page_size="2MB", limit=0)]},
            {"hugepage_limits": [v1.HugepageLimit(page_size="2MB", limit=0), v1.HugepageLimit(page_size="1GB", limit=1)]},
        ),
    ],
)
def test_merge(stored: dict[str, Any], update: dict[str, Any], expected: dict[str, Any]) -> None:
    before = R(**stored)
    assert resources.merge(before, R(**update)) == R(**expected)
    assert before == R(**stored)


def test_merge_checks_the_update() -> None:
    with pytest.raises(InvalidArgument, match=r"^linux\.cpu_shares"):
        resources.merge(R(), R(cpu_shares=-5))


numbers = st.integers(0, 2**40)


quotas = st.just(-1) | st.just(0) | st.integers(1000, 2**40)


@given(*[st.builds(R, cpu_shares=numbers, memory_limit_in_bytes=numbers, cpu_quota=quotas) for _ in range(2)])
def test_merge_is_idempotent(stored: R, update: R) -> None:
    once = resources.merge(stored, update)
    assert resources.merge(once, update) == once
    assert resources.merge(once, R()) == once


@pytest.mark.parametrize(
    ("parent", "driver", "expected"),
    [
        ("/kubepods/burstable/pod1", "cgroupfs", "/kubepods/burstable/pod1/id"),
        ("kubepods//pod1/", "cgroupfs", "/kubepods/pod1/id"),
        ("/a.slice", "cgroupfs", "/a.slice/id"),
        ("", "cgroupfs", "/cri-shim.pods/id"),
        ("/kubepods.slice/kubepods-pod1.slice", "systemd", "kubepods-pod1.slice:cri-shim:id"),
        ("kubepods-pod1.slice", "systemd", "kubepods-pod1.slice:cri-shim:id"),
        ("", "systemd", "system.slice:cri-shim:id"),
    ],
)
def test_cgroup_paths(parent: str, driver: str, expected: str) -> None:
    assert cgroups.path(parent, "id", driver) == expected


@pytest.mark.parametrize(
    ("parent", "driver"),
    [
        ("/a/../b", "cgroupfs"),
        ("..", "cgroupfs"),
        ("/a\n", "cgroupfs"),
        ("/a\0", "cgroupfs"),
        ("/kubepods", "systemd"),
        ("a:b.slice", "systemd"),
    ],
)
def test_cgroup_parents_refused(parent: str, driver: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^sandbox_config\.linux\.cgroup_parent"):
        cgroups.path(parent, "id", driver)
