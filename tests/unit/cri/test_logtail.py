from __future__ import annotations

import itertools
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cri.commands.logtail import Lines, Tail

TEXT = b"2026-01-02T03:04:05.123456789Z stdout F hello\n2026-01-02T03:04:05Z stderr P par\n2026-01-02T03:04:05Z stderr F tial\nx\n"


def test_lines_of_both_streams() -> None:
    assert list(Lines().feed(TEXT)) == [("stdout", b"hello\n"), ("stderr", b"par"), ("stderr", b"tial\n"), ("stdout", b"x\n")]


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_any_split_of_the_file_reads_the_same(cuts: list[int]) -> None:
    lines, edges = Lines(), [0, *sorted(cuts), len(TEXT)]
    pieces = [item for a, b in itertools.pairwise(edges) for item in lines.feed(TEXT[a:b])]
    assert pieces == list(Lines().feed(TEXT))


@given(st.binary(max_size=200).filter(lambda b: b"\n" not in b))
def test_text_comes_back_as_it_was(text: bytes) -> None:
    assert list(Lines().feed(b"2026-01-02T03:04:05Z stdout F " + text + b"\n")) == [("stdout", text + b"\n")]


def test_a_file_that_comes_later_and_grows(tmp_path: Path) -> None:
    out, err = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR), os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR)
    tail, outputs = Tail(str(tmp_path / "log")), {"stdout": out, "stderr": err}
    assert tail.copy(outputs) == 0
    with (tmp_path / "log").open("wb", buffering=0) as log:
        log.write(TEXT[:30])
        tail.copy(outputs)
        log.write(TEXT[30:])
    tail.copy(outputs)
    assert tail.copy(outputs) == 0
    tail.close()
    assert (tmp_path / "out").read_bytes() == b"hello\nx\n"
    assert (tmp_path / "err").read_bytes() == b"partial\n"
