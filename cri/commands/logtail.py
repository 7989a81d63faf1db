"""Reads a CRI log file that somebody else is writing: ``<time> <stream> <P|F> <text>`` lines back to the bytes the container wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator


class Lines:
    """Sans-IO: bytes of the file in, (stream, bytes) out. A partial line (tag P) ends without a newline of the container's."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """What complete lines of the file say. Anything that is not a log line is passed on as it is, to stdout."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            fields = line.split(b" ", 3)
            if len(fields) != 4 or fields[1] not in (b"stdout", b"stderr"):
                yield "stdout", line + b"\n"
                continue
            tag = fields[2].split(b":")[0]
            yield fields[1].decode(), fields[3] + (b"" if tag == b"P" else b"\n")


class Tail:
    """The file, from its beginning; it may appear later."""

    def __init__(self, path: str) -> None:
        self._path, self._fd = path, -1
        self._lines = Lines()

    def copy(self, outputs: dict[str, int]) -> int:
        """Writes everything that is there to the file descriptors by stream; how many bytes of the file that was."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return 0
        total = 0
        while data := os.read(self._fd, 1 << 16):
            total += len(data)
            for stream, text in self._lines.feed(data):
                view = memoryview(text)
                while view:
                    view = view[os.write(outputs[stream], view) :]
        return total

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
