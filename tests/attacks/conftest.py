"""Fixtures of the attack pack: hostile programs compiled from tests/attacks/c, and a host path that must not change."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hack import images
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.builders import unique
from tests.daemon.harness import Daemon
from tests.registry import DockerRegistry

SOURCES = Path(__file__).with_name("c")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``hostile("memscan")``: the directory that holds that program, static, so that it runs in any image."""

    def build(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(directory / name), str(SOURCES / f"{name}.c")]
        subprocess.run(command, check=True, timeout=120)
        directory.chmod(0o755)
        return directory

    return build


@pytest.fixture
def image(daemon: Daemon, registry: DockerRegistry) -> Callable[..., str]:
    """``image(layer, User="1:2")``: the reference of a pulled image with that layer on top of busybox's and that configuration."""

    def make(*layers: images.Layer, **config: Any) -> str:
        made = images.assemble([images.base_layer(), *(layer.finish() for layer in layers)], {"Cmd": ["sh"], **config})
        reference = registry.push(made, unique("hostile"))
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
        return reference

    return make


def climbing(target: Path) -> str:
    """A relative symlink that would reach ``target`` from anywhere, were it not clamped to the root."""
    return "../" * 20 + str(target).lstrip("/")


def digest(path: Path) -> str:
    """SHA-256 over names, modes and contents of a file or tree."""
    found = hashlib.sha256()
    for item in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(f"{item} {item.lstat().st_mode:o}".encode())
        if item.is_file() and not item.is_symlink():
            found.update(item.read_bytes())
    return found.hexdigest()


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host with a file in it; the test fails if anything in there has changed when it is over."""
    directory = tmp_path / "sentinel"
    directory.mkdir()
    (directory / "secret").write_text("host-secret-7f3a\n")
    before = digest(directory)
    yield directory
    assert digest(directory) == before, f"{directory} was changed from inside a container"
