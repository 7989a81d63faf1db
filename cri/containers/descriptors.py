"""Descriptors that a streaming session holds: each closed once, whoever is first; pipes; and when output is over."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import termios
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from cri.streaming.pump import FdSource

PIPE: Final = 1 << 20  # bytes, best effort: few large reads instead of many small ones
QUIET: Final = 1.0  # s without output after which a background child that still holds it is not waited for


class Descriptor:
    """One that closes with ``stack``, or before."""

    __slots__ = ("fd",)

    def __init__(self, stack: ExitStack, fd: int) -> None:
        self.fd = fd
        stack.callback(self.close)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def pipe(ours: ExitStack, theirs: ExitStack, *, we_read: bool) -> tuple[Descriptor, Descriptor]:
    """(our end, their end). Ours does not block; theirs does, as a program expects of its stdio."""
    read, write = os.pipe2(os.O_CLOEXEC)
    mine, other = (Descriptor(ours, read), Descriptor(theirs, write)) if we_read else (Descriptor(ours, write), Descriptor(theirs, read))
    os.set_blocking(mine.fd, False)
    if we_read:
        try:
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, PIPE)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY):  # above the user's soft limit: it stays small
                raise
    return mine, other


def set_size(console: int, height: int, width: int) -> None:
    """Of a terminal, by its master. The kernel tells the programs on it."""
    try:
        fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))
    except OSError as error:
        if error.errno != errno.EIO:  # hung up meanwhile
            raise


async def drain(sources: Sequence[FdSource], lost: asyncio.Future[None]) -> None:
    """Wait until all output is with the client, however slowly it reads; at most ``QUIET`` for output of which nothing more comes."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while left := [source for source in sources if source.open]:
        now = loop.time()
        since = max(now if source.held_up else max(began, source.active) for source in left)
        if lost.done() or now - since >= QUIET:
            return
        await asyncio.wait((lost, *(source.over for source in left)), timeout=QUIET - (now - since), return_when=asyncio.FIRST_COMPLETED)
