"""Attach: what a container writes from now on goes to one more client, beside its log; what the client sends goes to its stdin.

stdio copies the output to pipes that end when the container's output does. They end also when stdio is replaced: then they are made anew.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from functools import partial

from cri.containers.descriptors import Descriptor, drain, pipe, set_size
from cri.containers.exec_session import feed, stop, wanted_streams
from cri.containers.model import Container, Containers
from cri.streaming.pump import FdSource
from cri.streaming.remotecommand import Command, Streams
from cri.streaming.server import Server
from cri.streaming.session import Stream
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure

SETTLE = 0.2  # s between the end of output and the news that its container has ended, or that stdio has to be asked again

log = logging.getLogger("cri.containers")


def open_attach(request: v1.AttachRequest, *, containers: Containers, supervisor: Supervisor, streaming: Server) -> v1.AttachResponse:
    """A URL where a client can attach once."""
    container = containers.get(request.container_id)
    container.require_running("attach")

    async def run(streams: Streams) -> int:
        container.require_running("attach")
        with ExitStack() as held:
            await _Attach(container, supervisor, streams, held).run()
        return 0

    command = Command("attach", container.id, wanted_streams(request), run, failure="error attaching to container")
    return v1.AttachResponse(url=streaming.url(command))


class _Attach:
    """One session."""

    def __init__(self, container: Container, supervisor: Supervisor, streams: Streams, held: ExitStack) -> None:
        self._container, self._supervisor, self._streams, self._held = container, supervisor, streams, held
        self._stdin_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until the container's output ends, the client is gone, or, where only stdin is attached, has ended it."""
        streams, ended = self._streams, asyncio.ensure_future(self._container.ended.wait())
        try:
            sources = await self._join(first=True)
            while True:
                over = [source.over for source in sources] or [self._stdin_over]
                await asyncio.wait((streams.lost, ended, asyncio.gather(*over)), return_when=asyncio.FIRST_COMPLETED)
                if streams.lost.done() or not sources:
                    break
                await asyncio.wait((ended,), timeout=SETTLE)
                if ended.done():
                    await drain(sources, streams.lost)
                    break
                stop(sources)
                sources = await self._join(first=False)
        finally:
            ended.cancel()
            stop(sources)
        if streams.lost.done() and streams.stdin is not None:
            await self._last_words()

    async def _last_words(self) -> None:
        """The client is gone; what it has sent is still being written."""
        ended = asyncio.ensure_future(self._container.ended.wait())
        await asyncio.wait((self._stdin_over, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()

    async def _join(self, *, first: bool) -> list[FdSource]:
        """Pipes for what is wanted; at first also the way in."""
        streams, tty = self._streams, self._container.config.tty
        wanted: list[tuple[str, Stream]] = [("stdout", streams.stdout)] if streams.stdout is not None else []
        if streams.stderr is not None and not tty:
            wanted.append(("stderr", streams.stderr))
        with ExitStack() as theirs:
            pairs = {name: pipe(self._held, theirs, we_read=True) for name, _ in wanted}
            given = {name: pairs[name][1].fd if name in pairs else None for name in ("stdout", "stderr")}
            fds = await self._supervisor.attach(self._container.id, **given)
        sources = [FdSource(pairs[name][0].fd, stream, pairs[name][0].close, end=False) for name, stream in wanted]
        ways = {name: Descriptor(self._held, fd) for name, fd in fds.items()}
        if first:
            self._way_in(ways)
        return sources

    def _way_in(self, ways: dict[str, Descriptor]) -> None:
        console, stream = ways.get("console"), self._streams.stdin
        if console is not None:
            self._streams.terminal.connect(lambda height, width: set_size(console.fd, height, width) if console.fd >= 0 else None)
        way = console or ways.get("stdin")
        if stream is None:
            return
        if way is None:  # it has none, or had its one client
            stream.discard()
            self._stdin_over.set_result(None)
            return
        feed(way, stream, self._held, partial(self._stdin_ended, ways.get("stdin")))

    def _stdin_ended(self, way: Descriptor | None) -> None:
        if way is not None:  # opened for reading, too, so that it would keep the container's stdin from ending
            way.close()
        if not self._stdin_over.done():
            self._stdin_over.set_result(None)
        config = self._container.config
        if config.stdin_once and not config.tty and not self._container.facts.finished_at:
            asyncio.get_running_loop().create_task(self._close_stdin())

    async def _close_stdin(self) -> None:
        try:
            await self._supervisor.close_stdin(self._container.id)
        except Failure as failure:
            log.warning("container %s: %s", self._container.id, failure)
