"""Bundles, sandbox records and exit records on a real file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci import bundle
from shim.oci.bundle import ExitRecord, Recipe
from shim.oci.sandbox import Sandbox
from shim.oci.spec import NamespaceType, Process, Root, Spec

SPEC = Spec("1.2.0", Root("rootfs"), Process(("true",), env=("SECRET=x",)))
RECIPE = Recipe("overlay", lower=("/top", "/bottom"), upper="/u", work="/w")


@pytest.mark.parametrize(
    ("stdin", "tty", "fifos"),
    [(False, False, {"stdout", "stderr"}), (True, False, {"stdin", "stdout", "stderr"}), (False, True, {"stdout"})],
)
def test_write(tmp_path: Path, stdin: bool, tty: bool, fifos: set[str]) -> None:
    old = os.umask(0)
    try:
        bundle.write(tmp_path / "b", SPEC, RECIPE, stdin=stdin, tty=tty)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700
    entries = {p.name: p.stat().st_mode for p in (tmp_path / "b").iterdir()}
    assert {n for n, m in entries.items() if stat.S_ISFIFO(m)} == fifos
    assert entries.keys() - fifos == {"config.json", "rootfs.json"}
    assert {stat.S_IMODE(m) for m in entries.values()} == {0o600}
    dirfd = os.open(tmp_path / "b", os.O_RDONLY)
    try:
        assert bundle.load_spec(dirfd) == SPEC
        assert bundle.load_recipe(dirfd) == RECIPE
        assert bundle.read_exit(dirfd) is None
        bundle.write_exit(dirfd, ExitRecord(3, 17))
        bundle.write_exit(dirfd, ExitRecord(137, 18, oom_killed=True, signal=9, reason="OOMKilled"))
        assert bundle.read_exit(dirfd) == ExitRecord(137, 18, oom_killed=True, signal=9, reason="OOMKilled")
        (tmp_path / "b" / ".exit.json.new").write_text("{torn")  # a writer died here
        bundle.write_exit(dirfd, ExitRecord(0, 19))
        assert bundle.read_exit(dirfd) == ExitRecord(0, 19)
    finally:
        os.close(dirfd)


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="EEXIST"):
        bundle.write(tmp_path, SPEC, RECIPE, stdin=False, tty=False)


def test_sandbox(tmp_path: Path) -> None:
    one = Sandbox("a" * 64, (NamespaceType.NETWORK, NamespaceType.UTS), hostname="h", netns_path="/run/x", shm_size=1 << 26)
    for sandbox in (one, Sandbox("b", ())):
        bundle.write_sandbox(tmp_path, sandbox)
        dirfd = os.open(tmp_path, os.O_RDONLY)
        try:
            assert bundle.load_sandbox(dirfd) == sandbox
        finally:
            os.close(dirfd)


def test_bad_files(tmp_path: Path) -> None:
    dirfd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(Failure, match=r"read config\.json: ENOENT"):
            bundle.load_spec(dirfd)
        (tmp_path / "config.json").symlink_to("/etc/passwd")
        with pytest.raises(Failure, match="ELOOP"):
            bundle.load_spec(dirfd)
        (tmp_path / "exit.json").write_text('{"exitCode": 0')
        with pytest.raises(Failure, match="decode"):
            bundle.read_exit(dirfd)
        with (tmp_path / "rootfs.json").open("wb") as f:
            f.truncate(33 << 20)
        with pytest.raises(Failure, match="at most"):
            bundle.load_recipe(dirfd)
    finally:
        os.close(dirfd)
