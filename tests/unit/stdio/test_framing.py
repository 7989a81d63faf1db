"""Log framing: every byte once, in order, in records that the kubelet's parser puts together again."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from shim.stdio.framing import LIMIT, Clock, Framer

STAMP = b"2026-11-24T08:18:55.123456789Z"
RECORD = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([FP]) (.*)\Z", re.S)


def joined(records: bytes) -> list[bytes]:
    """The lines as the kubelet shows them: P records are continued by what follows."""
    assert records == b"" or records.endswith(b"\n")
    lines, partial = [], b""
    for record in records.split(b"\n")[:-1]:
        match = RECORD.match(record)
        assert match, record
        assert len(match[4]) <= LIMIT
        partial += match[4]
        if match[3] == b"F":
            lines.append(partial)
            partial = b""
    assert not partial
    return lines


line = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda c, n: c * n, st.sampled_from([b"x", b"ab"]), st.integers(LIMIT // 4, LIMIT * 2 + 3)),
    st.sampled_from([b"x" * (LIMIT - 1), b"x" * LIMIT, b"x" * (LIMIT + 1), b"y" * (2 * LIMIT), b"", b"\r"]),
).map(lambda text: text.replace(b"\n", b" "))


@settings(max_examples=200, deadline=None)
@given(st.lists(line, max_size=8), st.booleans(), st.lists(st.integers(1, 3 * LIMIT), max_size=12))
def test_any_split_gives_the_same_lines(lines: list[bytes], newline: bool, cuts: list[int]) -> None:
    data = b"\n".join(lines) + (b"\n" if newline and lines else b"")
    framer, out, rest = Framer("stdout"), b"", data
    for cut in cuts:
        part, rest = rest[:cut], rest[cut:]
        if part:
            out += framer.feed(part, STAMP)
            assert len(framer.tail) <= LIMIT
    if rest:
        out += framer.feed(rest, STAMP)
    out += framer.finish(STAMP)
    expected = data.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert joined(out) == expected


def test_many_short_lines_are_whole_records() -> None:
    data = b"".join(b"%099d\n" % i for i in range(5000))
    out = Framer("stderr").feed(data, STAMP)
    assert out == b"".join(STAMP + b" stderr F %099d\n" % i for i in range(5000))


def test_a_line_of_exactly_the_limit_is_one_record() -> None:
    assert Framer("stdout").feed(b"x" * LIMIT + b"\n", STAMP) == STAMP + b" stdout F " + b"x" * LIMIT + b"\n"


def test_a_megabyte_line_is_cut_as_it_arrives() -> None:
    framer = Framer("stdout")
    out = framer.feed(b"z" * (1 << 20), STAMP)
    assert out.count(b" P ") == 63
    assert framer.feed(b"\n", STAMP) == STAMP + b" stdout F " + b"z" * LIMIT + b"\n"


def test_no_trailing_newline() -> None:
    framer = Framer("stdout")
    assert framer.feed(b"done", STAMP) == b""
    assert framer.finish(STAMP) == STAMP + b" stdout F done\n"
    assert framer.finish(STAMP) == b""


def test_hand_over_marks_the_line_as_unfinished() -> None:
    framer = Framer("stdout")
    framer.feed(b"a\nhalf", STAMP)
    out = framer.interrupt(STAMP) + Framer("stdout").feed(b"line\n", STAMP)
    assert joined(out) == [b"halfline"]


def test_terminals_lose_their_carriage_returns_across_reads() -> None:
    framer = Framer("stdout", crlf=True)
    out = framer.feed(b"one\r\ntwo\r", STAMP) + framer.feed(b"\nthr\ree\r\n", STAMP)
    assert joined(out) == [b"one", b"two", b"thr\ree"]


def test_clock_is_rfc3339_with_nanoseconds() -> None:
    clock = Clock()
    first, second = clock.now(), clock.now()
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", first)
    assert first <= second
