"""mountinfo → layout."""

from __future__ import annotations

import pytest

from shim.cgroups import layout
from shim.cgroups.group import Group, checked_path
from shim.cgroups.layout import Layout
from shim.errors import Failure

ROOT = "/sys/fs/cgroup"
V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
HYBRID = """\
29 25 0:25 / /sys/fs/cgroup ro,nosuid shared:4 - tmpfs tmpfs ro,mode=755
30 29 0:26 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw,nsdelegate
31 29 0:27 / /sys/fs/cgroup/systemd rw shared:6 - cgroup cgroup rw,xattr,name=systemd
32 29 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
33 29 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory,release_agent=/x
34 29 0:32 / /mnt/elsewhere/pids rw - cgroup cgroup rw,pids
35 29 0:33 / /proc rw - proc proc rw
"""


def test_version_2() -> None:
    assert layout.parse(V2, ROOT) == Layout(2, ROOT, {})


def test_hybrid_counts_as_version_1() -> None:
    found = layout.parse(HYBRID, ROOT)
    assert found.version == 1
    assert found.unified == f"{ROOT}/unified"
    assert found.controllers == {
        "name=systemd": f"{ROOT}/systemd",
        "cpu": f"{ROOT}/cpu,cpuacct",
        "cpuacct": f"{ROOT}/cpu,cpuacct",
        "memory": f"{ROOT}/memory",
    }
    assert found.hierarchies == (f"{ROOT}/systemd", f"{ROOT}/cpu,cpuacct", f"{ROOT}/memory")


def test_escaped_mount_points() -> None:
    line = "30 25 0:26 / /sys/fs/c\\040g rw - cgroup2 cgroup2 rw\n"
    assert layout.parse(line, "/sys/fs/c g").root == "/sys/fs/c g"


def test_nothing_mounted() -> None:
    with pytest.raises(Failure):
        layout.parse("35 29 0:33 / /proc rw - proc proc rw\n", ROOT)


def test_groups_as_json() -> None:
    group = Group(1, "/a", {"cpu": "/x/cpu/a", "cpuacct": "/x/cpu/a", "memory": "/x/memory/a"})
    assert Group.from_json(group.to_json()) == group
    assert group.directories == ("/x/cpu/a", "/x/memory/a")
    assert group.directory("pids") is None
    assert Group(2, "/a", {"": "/x/a"}).directory("pids") == "/x/a"


def test_paths() -> None:
    assert checked_path("kubepods/pod1/c/") == checked_path("/kubepods/pod1/c") == "/kubepods/pod1/c"
