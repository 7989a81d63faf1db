"""The log file on a real file system: whole records, repair, rotation, refusal of anything that is not a regular file."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.stdio.logfile import LogFile


def test_rotation_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogFile(str(path))
    log.append(b"one\n")
    path.rename(tmp_path / "0.log.1")
    log.append(b"two\n")
    log.reopen()
    log.append(b"three\n")
    log.close()
    assert (tmp_path / "0.log.1").read_bytes() == b"one\ntwo\n"
    assert path.read_bytes() == b"three\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_torn_record_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"whole\ntorn recor")
    log = LogFile(str(path))
    log.append(b"next\n")
    log.close()
    assert path.read_bytes() == b"whole\nnext\n"


def test_only_regular_files(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "absent/log"):
        with pytest.raises(Failure) as failure:
            LogFile(str(tmp_path / name))
        assert failure.value.path == str(tmp_path / name)
    assert (tmp_path / "target").read_bytes() == b"keep"


def test_reopen_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "dir" / "log"
    path.parent.mkdir()
    log = LogFile(str(path))
    (tmp_path / "dir").rename(tmp_path / "moved")
    with pytest.raises(Failure):
        log.reopen()
    log.append(b"still\n")
    log.close()
    assert (tmp_path / "moved" / "log").read_bytes() == b"still\n"


def test_a_failed_write_leaves_no_partial_record(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel write a part and then refuse, as a full disk does."""
    path = tmp_path / "log"
    log = LogFile(str(path))
    log.append(b"first\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            log.append(b"x" * 5000 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    log.append(b"after\n")
    log.close()
    assert path.read_bytes() == b"first\nafter\n"


def test_an_empty_path_discards() -> None:
    log = LogFile("")
    log.append(b"gone\n")
    with pytest.raises(Failure):
        log.reopen()
    log.close()
