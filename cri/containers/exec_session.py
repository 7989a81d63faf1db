"""Exec: a process whose streams go to a client of the streaming server.

A client that vanishes ends nothing, as with containerd: the process gets end of file on its stdin, and SIGPIPE when it writes on to
pipes that nobody reads; the supervisor keeps its terminal until it has ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from cri.containers.descriptors import Descriptor, drain, pipe, set_size
from cri.containers.exec import exec_process
from cri.containers.model import Container, Containers
from cri.errors import InvalidArgument
from cri.streaming.pump import FdSink, FdSource
from cri.streaming.remotecommand import Command, Streams, Wanted
from cri.streaming.server import Server
from cri.streaming.session import Stream
from cri.supervisor import ExecSession, Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import Box, Process

GRACE: Final = 1.0  # s for a process to die with its container before it is killed


def open_exec(request: v1.ExecRequest, *, containers: Containers, supervisor: Supervisor, streaming: Server) -> v1.ExecResponse:
    """A URL where a client can have the command run once."""
    container = containers.get(request.container_id)
    container.require_running("exec")
    wanted = wanted_streams(request)
    exec_process(container, request.cmd, containers)  # so that a bad command is refused here

    async def run(streams: Streams) -> int:
        container.require_running("exec")
        process = exec_process(container, request.cmd, containers)
        if request.tty:
            process = with_terminal(process, streams.terminal.size)
        return await run_exec(container, process, streams, supervisor)

    return v1.ExecResponse(url=streaming.url(Command("exec", container.id, wanted, run)))


def wanted_streams(request: v1.ExecRequest | v1.AttachRequest) -> Wanted:
    """Raises InvalidArgument for combinations that the CRI forbids."""
    if request.tty and request.stderr:
        raise InvalidArgument("tty and stderr cannot both be true", field="stderr")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("one of stdin, stdout or stderr must be set", field="stdin")
    return Wanted(request.stdin, request.stdout, request.stderr, request.tty)


def with_terminal(process: Process, size: tuple[int, int] | None) -> Process:
    """The process on a terminal of its own, from the beginning of the size that the client's has."""
    env = process.env if any(entry.startswith("TERM=") for entry in process.env) else (*process.env, "TERM=xterm")
    box = Box(height=size[0], width=size[1]) if size is not None else None
    return dataclasses.replace(process, terminal=True, console_size=box, env=env)


async def run_exec(container: Container, process: Process, streams: Streams, supervisor: Supervisor) -> int:
    """The exit code, once all output has been sent."""
    exec_id = secrets.token_hex(16)
    container.execs.add(exec_id)
    try:
        with ExitStack() as held:
            start = _start_on_terminal if process.terminal else _start_on_pipes
            session, sources = await start(container, exec_id, process, streams, supervisor, held)
            streams.lost.add_done_callback(lambda _: stop(sources))
            code = await _ended(session, container, supervisor)
            await drain(sources, streams.lost)
            return code
    finally:
        container.execs.discard(exec_id)


async def _ended(session: ExecSession, container: Container, supervisor: Supervisor) -> int:
    """The exit code. A session does not outlive its container, not even where PID namespaces are shared."""
    over = asyncio.ensure_future(container.ended.wait())
    try:
        await asyncio.wait((session.exited, over), return_when=asyncio.FIRST_COMPLETED)
    finally:
        over.cancel()
    if not session.exited.done():
        await asyncio.wait((session.exited,), timeout=GRACE)
    if not session.exited.done():
        await supervisor.kill_exec(session.id, signal.SIGKILL, tree=True)
    return await asyncio.shield(session.exited)


async def _start_on_terminal(
    container: Container, exec_id: str, process: Process, streams: Streams, supervisor: Supervisor, held: ExitStack
) -> tuple[ExecSession, list[FdSource]]:
    session = await supervisor.exec(container.id, exec_id, process, stdin=None, stdout=None, stderr=None)
    assert session.console is not None
    return session, on_terminal(session.console, streams, held)


def on_terminal(master: int, streams: Streams, held: ExitStack) -> list[FdSource]:
    """Join a client and a terminal, whose master is taken over."""
    console = Descriptor(held, master)
    os.set_blocking(console.fd, False)
    streams.terminal.connect(lambda height, width: set_size(console.fd, height, width) if console.fd >= 0 else None)
    if streams.stdin is not None:
        feed(console, streams.stdin, held, lambda: None)
    # The loop watches a descriptor for one reader and one writer, so the same would do; but they end at different times.
    return read((streams.stdout,), (Descriptor(held, os.dup(console.fd)),), held)


async def _start_on_pipes(
    container: Container, exec_id: str, process: Process, streams: Streams, supervisor: Supervisor, held: ExitStack
) -> tuple[ExecSession, list[FdSource]]:
    wanted = (streams.stdin, streams.stdout, streams.stderr)
    with ExitStack() as theirs:
        pairs = [None if stream is None else pipe(held, theirs, we_read=stream is not streams.stdin) for stream in wanted]
        stdin, stdout, stderr = (None if pair is None else pair[1].fd for pair in pairs)
        session = await supervisor.exec(container.id, exec_id, process, stdin=stdin, stdout=stdout, stderr=stderr)
    ours = [None if pair is None else pair[0] for pair in pairs]
    if streams.stdin is not None and ours[0] is not None:
        feed(ours[0], streams.stdin, held, ours[0].close)
    return session, read(wanted[1:], ours[1:], held)


def feed(end: Descriptor, stream: Stream, held: ExitStack, ended: Callable[[], None]) -> None:
    """Write what the client sends."""
    sink = FdSink(end.fd, stream, ended)
    held.callback(sink.stop)


def read(streams: tuple[Stream | None, ...], ends: list[Descriptor | None] | tuple[Descriptor, ...], held: ExitStack) -> list[FdSource]:
    pairs = [(stream, end) for stream, end in zip(streams, ends, strict=True) if stream is not None and end is not None]
    sources = [FdSource(end.fd, stream, end.close) for stream, end in pairs]
    held.callback(stop, sources)
    return sources


def stop(sources: list[FdSource]) -> None:
    """Read no more, and let go of what was read from. What the client has sent is still written."""
    for source in sources:
        source.stop()
