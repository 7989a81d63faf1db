from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cri import config, startup
from cri.errors import StartError


def configured(tmp_path: Path) -> config.Config:
    return config.load(flags={"root": str(tmp_path / "root"), "state": str(tmp_path / "state")}, environ={})


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.18.44-fc-v595", (6, 18)), ("5.15.0-1043-azure", (5, 15)), ("6.1", (6, 1)), ("5.4.0", (5, 4)), ("weird", (0, 0))],
)
def test_kernel_version(release: str, version: tuple[int, int]) -> None:
    assert startup.kernel_version(release) == version


def test_an_old_kernel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "KERNEL_FLOOR", (99, 0))
    with pytest.raises(StartError, match=r"too old: cri-shim needs 99\.0 or later"):
        startup.check_host()


def test_one_daemon_per_directory(tmp_path: Path) -> None:
    ours = configured(tmp_path)
    startup.directories(ours)
    held = startup.lock(ours)
    with pytest.raises(StartError, match=rf"another cri-shim \(pid {os.getpid()}\) is using {tmp_path}/root"):
        startup.lock(ours)
    other = config.load(flags={"root": str(tmp_path / "other"), "state": str(tmp_path / "state")}, environ={})
    startup.directories(other)
    with pytest.raises(StartError, match=f"is using {tmp_path}/state"):
        startup.lock(other)
    for fd in held.fds:
        os.close(fd)
    for fd in startup.lock(ours).fds:
        os.close(fd)


def test_directories_are_private_and_repaired(tmp_path: Path) -> None:
    ours = configured(tmp_path)
    (tmp_path / "root").mkdir(mode=0o755)
    startup.directories(ours)
    assert [Path(d).stat().st_mode & 0o7777 for d in (ours.root, ours.state)] == [0o700, 0o700]
    (tmp_path / "link").symlink_to(tmp_path / "root")
    with pytest.raises(StartError, match="not a directory of user"):
        startup.directories(config.load(flags={"root": str(tmp_path / "link"), "state": str(tmp_path / "state")}, environ={}))
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="file"):
        startup.directories(config.load(flags={"root": str(tmp_path / "file"), "state": str(tmp_path / "state")}, environ={}))


def test_nothing_before_the_supervisor_imports_grpc() -> None:
    """A supervisor spawned after grpc would be forked from a process with threads."""
    code = (
        "import sys, cri.cli, cri.startup, shim.client; print([m for m in ('grpc', 'google', 'asyncio', 'threading') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    imported = done.stdout.strip()
    assert "grpc" not in imported and "google" not in imported, imported


def test_mistakes_are_one_line_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rooot = 1\n")
    command = [sys.executable, "-m", "cri.cli", "serve", "--config", str(tmp_path / "c.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (1, f"cri-shim: {tmp_path}/c.toml: unknown key `rooot`\n")


def test_config_prints_what_loads_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cri.cli", "config", "--network", "bridge", "--network-subnets", "10.9.0.0/24"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    (tmp_path / "c.toml").write_text(done.stdout)
    assert config.load(tmp_path / "c.toml", environ={}).network.subnets == ("10.9.0.0/24",)
