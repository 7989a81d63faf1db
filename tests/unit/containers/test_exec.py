from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.containers import exec as exec_verb
from cri.containers.exec import _Stream, fit, go_duration


@pytest.mark.parametrize("seconds, text", [(1, "1s"), (59, "59s"), (60, "1m0s"), (90, "1m30s"), (3600, "1h0m0s"), (7265, "2h1m5s")])
def test_durations_as_go_prints_them(seconds: int, text: str) -> None:
    assert go_duration(seconds) == text


@given(st.integers(0, 40), st.integers(0, 40))
def test_output_fits_one_message(out: int, err: int) -> None:
    limit = exec_verb.MESSAGE
    try:
        exec_verb.MESSAGE = 32  # type: ignore[misc]
        stdout, stderr = fit(b"o" * out, b"e" * err)
    finally:
        exec_verb.MESSAGE = limit  # type: ignore[misc]
    assert len(stdout) + len(stderr) == min(out + err, 32)
    assert len(stdout) >= min(out, 16)
    assert len(stderr) >= min(err, 16)


async def test_a_stream_read_on_demand() -> None:
    stream = _Stream(asyncio.get_running_loop())
    os.write(stream.write_fd, b"x" * 60_000)
    stream.read_all()
    assert not stream.closed
    stream.close_write()
    stream.read_all()
    assert stream.closed
    assert stream.data() == b"x" * 60_000
    stream.close()


async def test_a_watched_stream_is_read_while_it_is_written() -> None:
    stream = _Stream(asyncio.get_running_loop())
    stream.watch()
    total = 5_000_000

    def write() -> None:
        left = total
        while left:
            left -= os.write(stream.write_fd, b"y" * min(left, 1 << 20))

    await asyncio.to_thread(write)
    stream.close_write()
    await stream.wait_closed(5)
    assert stream.closed
    assert len(stream.data()) == total
    stream.close()


async def test_output_above_the_cap_is_read_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_verb, "CAP", 100_000)
    stream = _Stream(asyncio.get_running_loop())
    stream.watch()

    def write() -> None:
        for _ in range(100):
            os.write(stream.write_fd, b"z" * 10_000)

    await asyncio.wait_for(asyncio.to_thread(write), 10)
    stream.close_write()
    await stream.wait_closed(5)
    assert len(stream.data()) == 100_000
    stream.close()


async def test_waiting_for_a_holder_of_the_pipe_is_bounded() -> None:
    loop = asyncio.get_running_loop()
    stream = _Stream(loop)
    stream.watch()
    began = loop.time()
    await stream.wait_closed(0.1)
    assert 0.05 < loop.time() - began < 2
    assert not stream.closed
    stream.close()
    stream.close()
