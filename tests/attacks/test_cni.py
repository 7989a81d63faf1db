"""CVE-2021-20206: a plugin's type is a path. And a pod that adds arguments of its own for plugins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.daemon.cni import Plugins, cni_daemon, network_condition
from tests.daemon.harness import Daemon, Node


@pytest.fixture(scope="module")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Plugins]]:
    with cni_daemon(node, tmp_path_factory.mktemp("cni")) as world:
        yield world


@pytest.fixture(scope="module")
def daemon(world: tuple[Daemon, Plugins]) -> Daemon:
    return world[0]


def test_a_type_that_is_a_path_is_never_executed(world: tuple[Daemon, Plugins], sentinel: Path) -> None:
    daemon, plugins = world
    script = plugins.directory / "x"
    script.write_text(f"#!/bin/sh\ntouch {sentinel}/executed\n")
    script.chmod(0o755)
    for kind in ("../x", f"../../../..{script}", str(script), "..", "a\\b"):
        for plugin in ({"type": kind}, {**plugins.bridge(), "ipam": {"type": kind}}):
            plugins.install(plugin)
            assert "not a plain file name" in network_condition(daemon).message
            with pytest.raises(grpc.RpcError, match="not a plain file name"):
                daemon.run_pod()
    for name in ("../../x", "/x", "a/b"):
        plugins.install(name=name)
        assert "10-test.conflist: name:" in network_condition(daemon).message, "it becomes part of a file's name"


def test_a_pods_name_adds_no_argument_for_plugins(world: tuple[Daemon, Plugins]) -> None:
    daemon, plugins = world
    plugins.install(plugins.scripted())
    for fields in ({"namespace": "default;IP=10.231.0.1"}, {"uid": "u;IP=10.231.0.1"}, {"namespace": "a=b"}):
        with pytest.raises(grpc.RpcError) as refused:
            daemon.run_pod(**fields)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not plugins.calls()
    assert plugins.held(daemon)["results"] == []
