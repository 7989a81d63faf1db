"""Exec and attach on the wire: which streams there are, what the error stream says, terminal sizes. Versions v1 to v5.

====  ============================================================================================================
v1    error stream: text, and only of a failure
v2    the same (v1's clients need streams reset, which nobody has used since 1.0)
v3    a stream of terminal sizes
v4    error stream: metav1.Status, with the exit code as a cause
v5    WebSocket only: the client can end its stdin
====  ============================================================================================================
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cri.streaming.channel_session import ChannelSession
from cri.streaming.http1 import BadRequest
from cri.streaming.session import Session, Stream

SPDY_PROTOCOLS: Final = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
CREATION_TIMEOUT: Final = 30.0  # s for the client to open its streams
STREAM_TYPE: Final = "streamtype"
MAX_SIZES: Final = 4096  # bytes of an unfinished terminal size

#: Channel of a WebSocket, type of a SPDY stream.
CHANNELS: Final = {"stdin": 0, "stdout": 1, "stderr": 2, "error": 3, "resize": 4}

Resize = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a session has, as the CRI request says."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False


@dataclass(slots=True)
class Terminal:
    """The client's last size, and who wants to know about the next."""

    size: tuple[int, int] | None = None  # height, width
    apply: Resize | None = None

    def resized(self, height: int, width: int) -> None:
        self.size = (height, width)
        if self.apply is not None:
            self.apply(height, width)

    def connect(self, apply: Resize) -> None:
        self.apply = apply
        if self.size is not None:
            apply(*self.size)


@dataclass(frozen=True, slots=True)
class Streams:
    """What the process side gets. ``lost`` is done when the client is gone."""

    stdin: Stream | None
    stdout: Stream | None
    stderr: Stream | None
    terminal: Terminal
    lost: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Command:
    """An exec or attach that a token stands for. ``run`` returns the exit code; it raises what the client is told."""

    path: str  # "exec" or "attach"
    owner: str  # container id
    wanted: Wanted
    run: Callable[[Streams], Awaitable[int]]
    failure: str = "error executing command in container"


@dataclass(slots=True)
class Expected:
    """Streams that a SPDY client has still to open."""

    names: set[str]
    streams: dict[str, Stream] = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, wanted: Wanted, protocol: str) -> Expected:
        names = {"error", *(name for name in ("stdin", "stdout", "stderr") if getattr(wanted, name))}
        if wanted.tty and protocol in SPDY_PROTOCOLS[:2]:
            names.add("resize")
        return cls(names)

    def opened(self, stream: Stream) -> bool:
        """Whether this is one of them, and the first of its name."""
        name = stream.headers.get(STREAM_TYPE, "")
        if name not in self.names or name in self.streams:
            return False
        self.streams[name] = stream
        if len(self.streams) == len(self.names):
            self.ready.set()
        return True


def choose(offered: Sequence[str], supported: Iterable[str]) -> str | None:
    """The client's first choice among those we speak; "" where it names none."""
    if not offered:
        return ""
    known = set(supported)
    return next((name for name in offered if name in known), None)


def spdy_protocol(offered: Sequence[str], supported: Sequence[str]) -> str:
    """The version for ``X-Stream-Protocol-Version``. Raises BadRequest, which names those there are."""
    found = choose(offered, supported)
    if found is None:
        names = [("X-Accepted-Stream-Protocol-Versions", name) for name in supported]
        raise BadRequest(403, f"unable to upgrade: unable to negotiate protocol: server supports {', '.join(supported)}", names)
    return found


class Sizes:
    """The sink of a resize stream: JSON objects, one after the other."""

    def __init__(self, stream: Stream, terminal: Terminal) -> None:
        self._stream, self._terminal = stream, terminal
        self._rest = ""
        stream.attach(self)

    def feed(self, data: bytes) -> None:
        self._stream.consumed(len(data))
        sizes, self._rest = parse_sizes(self._rest + data.decode("utf-8", "replace"))
        for height, width in sizes:
            self._terminal.resized(height, width)

    def finish(self) -> None:
        return

    def abort(self) -> None:
        return


_decoder = json.JSONDecoder()


def parse_sizes(text: str) -> tuple[list[tuple[int, int]], str]:
    """(height, width) of the whole objects in ``text``, and what is left. What makes no sense is dropped: it is only a size."""
    found: list[tuple[int, int]] = []
    while text := text.lstrip():
        try:
            value, end = _decoder.raw_decode(text)
        except (ValueError, RecursionError):
            # Either not whole yet, or no JSON: a size is short.
            return found, text if text.startswith("{") and len(text) <= MAX_SIZES else ""
        text = text[end:]
        if isinstance(value, dict):
            height, width = (next((v for k, v in value.items() if k.lower() == name), 0) for name in ("height", "width"))
            if all(type(n) is int and 0 < n < 1 << 16 for n in (height, width)):
                found.append((height, width))
    return found, ""


def success() -> dict[str, Any]:
    return {"metadata": {}, "status": "Success"}


def exit_status(code: int) -> dict[str, Any]:
    """metav1.Status of an exit code, as kubectl takes it apart."""
    if code == 0:
        return success()
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def failure_status(text: str) -> dict[str, Any]:
    """metav1.Status of what went wrong on our side."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {text}",
        "reason": "InternalError",
        "details": {"causes": [{"message": text}]},
        "code": 500,
    }


def write_status(stream: Stream, status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        stream.write(json.dumps(status, separators=(",", ":")).encode())
    elif status["status"] != "Success":
        stream.write(str(status["message"]).encode())
    stream.end()


async def serve(
    session: Session, streams: dict[str, Stream], command: Command, *, as_json: bool, describe: Callable[[Exception], str]
) -> None:
    """Run the command, tell how it ended, close."""
    error = streams["error"]
    error.discard()
    terminal = Terminal()
    if "resize" in streams:
        Sizes(streams["resize"], terminal)
    given = Streams(streams.get("stdin"), streams.get("stdout"), streams.get("stderr"), terminal, session.lost)
    for stream in (given.stdout, given.stderr):
        if stream is not None:
            stream.discard()
    if isinstance(session, ChannelSession):
        # Says that the connection is up: clients wait for the first message.
        (given.stdout or given.stderr or error).write(b"")
    try:
        status = exit_status(await command.run(given))
    except asyncio.CancelledError:
        session.close()
        raise
    except Exception as problem:
        status = failure_status(f"{command.failure}: {describe(problem)}")
    for stream in (given.stdout, given.stderr):
        if stream is not None:
            stream.end()
    write_status(error, status, as_json=as_json)
    if given.stdin is not None:
        given.stdin.end()
    session.close()
