from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from cri.containers import hostpaths
from cri.errors import DeadlineExceeded, InvalidArgument
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure


def mount(path: object) -> v1.Mount:
    return v1.Mount(container_path="/x", host_path=str(path))


async def test_what_exists_stays_and_what_is_missing_becomes_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    await hostpaths.ensure([mount(tmp_path / "file"), mount(tmp_path / "link"), mount(tmp_path / "a/b"), v1.Mount(container_path="/image")])
    assert (tmp_path / "a/b").is_dir()
    assert (tmp_path / "file").read_text() == "x"


async def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Failure, match="file/below"):
        await hostpaths.ensure([mount(tmp_path / "file/below")])


@pytest.mark.parametrize("path", ["relative", "a/b", "/nul\0"])
async def test_only_absolute_paths(path: str) -> None:
    with pytest.raises(InvalidArgument):
        await hostpaths.ensure([mount(path)])


async def test_a_source_that_does_not_answer_is_given_up_and_its_thread_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    asked = 0

    def never(path: str) -> bool:
        nonlocal asked
        asked += 1
        answer.wait()
        return True

    monkeypatch.setattr(hostpaths, "PATIENCE", 0.1)
    monkeypatch.setattr(hostpaths, "_known", lambda path: False)
    monkeypatch.setattr(os.path, "exists", never)
    wanted = mount(tmp_path / "dead")
    try:
        results = await asyncio.gather(*(hostpaths.ensure([wanted]) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(r, DeadlineExceeded) and "dead" in str(r) for r in results)
        with pytest.raises(DeadlineExceeded):
            await hostpaths.ensure([wanted])
        assert asked == 1
    finally:
        answer.set()
    for _ in range(100):
        if not hostpaths._waiting:
            break
        await asyncio.sleep(0.01)
    assert not hostpaths._waiting
