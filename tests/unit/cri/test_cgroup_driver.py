"""Which driver is used, and where the runtime itself goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri import cgroups
from cri.config import Cgroup, Config
from cri.errors import InvalidArgument, StartError
from cri.spec import cgroups as spec


@pytest.fixture(params=[True, False], ids=["systemd", "another init"])
def booted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    monkeypatch.setattr(cgroups, "_BOOTED", tmp_path if request.param else tmp_path / "none")
    return bool(request.param)


def test_auto_is_what_pid_1_is(booted: bool) -> None:
    chosen = cgroups.choose(Config())
    expected = ("systemd", "system.slice:cri-shim:runtime") if booted else ("cgroupfs", "/cri-shim")
    assert (chosen.name, chosen.runtime) == expected


def test_cgroupfs(booted: bool) -> None:
    assert cgroups.choose(Config(cgroup=Cgroup("cgroupfs", "/a/b"))).runtime == "/a/b"
    with pytest.raises(StartError, match=r"cgroup.runtime_cgroup: 'runtime.slice' is a slice"):
        cgroups.choose(Config(cgroup=Cgroup("cgroupfs", "runtime.slice")))


def test_systemd(booted: bool) -> None:
    config = Config(cgroup=Cgroup("systemd", "runtime.slice"), state="/run/other")
    if not booted:
        with pytest.raises(StartError, match="needs systemd as PID 1"):
            cgroups.choose(config)
        return
    assert cgroups.choose(config).runtime.startswith("runtime.slice:cri-shim:runtime-")  # two daemons on a machine have two scopes
    with pytest.raises(StartError, match="is not a slice"):
        cgroups.choose(Config(cgroup=Cgroup("systemd", "/cri-shim")))


@pytest.mark.parametrize("parent", ["/kubepods/pod1", "kubepods--x.slice", "-a.slice", "a b.slice", "a:b.slice", "ä.slice", "/a.slice/b"])
def test_parents_that_are_no_slices(parent: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a slice, but the cgroup driver is systemd"):
        spec.path(parent, "id", "systemd")
