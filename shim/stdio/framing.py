"""CRI log records, sans-IO: bytes of one stream in, ``RFC3339Nano stream F|P text`` records out.

Lines longer than ``LIMIT`` are cut into P records, as containerd's max_container_log_line_size does; a line's last piece is F.
"""

from __future__ import annotations

import time

LIMIT = 16 * 1024  # bytes of text per record
_HALF = LIMIT // 2


class Clock:
    """Time stamps with nanoseconds in UTC; the part up to the second is rendered once per second."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = b""

    def now(self) -> bytes:
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = b"%04d-%02d-%02dT%02d:%02d:%02d." % time.gmtime(second)[:6]
        return self._prefix + b"%09dZ" % nanoseconds


def _short(body: bytes) -> bool:
    """True only if no line of ``body`` can be longer than LIMIT: every aligned half-limit block holds a newline.

    Costs a memchr that stops early per 8 KiB instead of a pass over every line; a False for a shorter line just takes the slow path.
    """
    find = body.find
    return all(find(b"\n", start, start + _HALF) >= 0 for start in range(0, len(body) - _HALF + 1, _HALF))


class Framer:
    """One stream's state: the bytes of a line whose end has not been read yet, at most LIMIT of them."""

    __slots__ = ("_crlf", "_stream", "tail")

    def __init__(self, stream: str, *, crlf: bool = False) -> None:
        """``stream`` is stdout or stderr; ``crlf``: a terminal ends lines with CR LF, of which CR is dropped."""
        self._stream = b" " + stream.encode("ascii")
        self._crlf = crlf
        self.tail = b""

    def feed(self, data: bytes, stamp: bytes) -> bytes:
        """The records that ``data`` completes; the rest of it is kept."""
        cut = data.rfind(b"\n") + 1
        if not cut:
            self.tail += data
            return self._cut_tail(stamp, b"") if len(self.tail) > LIMIT else b""
        body = self.tail + data[: cut - 1] if self.tail else data[: cut - 1]
        self.tail = data[cut:]
        if self._crlf:
            body = (body + b"\n").replace(b"\r\n", b"\n")[:-1]
        full = stamp + self._stream + b" F "
        if _short(body):
            records = full + body.replace(b"\n", b"\n" + full) + b"\n"
        else:
            records = b"".join([self._line(line, stamp) for line in body.split(b"\n")])
        return self._cut_tail(stamp, records) if len(self.tail) > LIMIT else records

    def finish(self, stamp: bytes) -> bytes:
        """At end of file: the last line, which has no newline, is whole (F), as in containerd."""
        line, self.tail = self.tail, b""
        return self._line(line, stamp) if line else b""

    def interrupt(self, stamp: bytes) -> bytes:
        """When the process hands over to another: what it holds of a line goes out as P, and its successor continues the line."""
        line, self.tail = self.tail, b""
        return b"%b%b P %b\n" % (stamp, self._stream, line) if line else b""

    def _line(self, line: bytes, stamp: bytes) -> bytes:
        head = stamp + self._stream
        if len(line) <= LIMIT:
            return b"%b F %b\n" % (head, line)
        last = (len(line) - 1) // LIMIT * LIMIT
        parts = [b"%b P %b\n" % (head, line[i : i + LIMIT]) for i in range(0, last, LIMIT)]
        return b"".join([*parts, b"%b F %b\n" % (head, line[last:])])

    def _cut_tail(self, stamp: bytes, records: bytes) -> bytes:
        """Whole pieces of a tail that is already longer than a record may be."""
        tail, head = self.tail, stamp + self._stream
        last = (len(tail) - 1) // LIMIT * LIMIT
        self.tail = tail[last:]
        return b"".join([records, *(b"%b P %b\n" % (head, tail[i : i + LIMIT]) for i in range(0, last, LIMIT))])
