"""Fixtures of the attack pack: hostile programs compiled from tests/attacks/c, and a host path that must not change."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
