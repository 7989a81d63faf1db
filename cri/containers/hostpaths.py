"""Sources of bind mounts. A missing hostPath is made as a directory, as every runtime does; one that does not answer must not hurt.

A lookup on a dead network or FUSE file system blocks for ever. So the common case asks the kernel for an answer from its caches only
(openat2 RESOLVE_CACHED fails with EAGAIN instead of sleeping), and everything else happens in a thread that is waited for with a
bound. Such a thread cannot be ended: one per path hangs until the file system answers, and retries join it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable
from typing import Final

from cri.errors import DeadlineExceeded, InvalidArgument
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.linux import libc

PATIENCE: Final = 10.0  # seconds
_AT_FDCWD: Final = -100
_RESOLVE_CACHED: Final = 0x20

_waiting: dict[str, asyncio.Future[None]] = {}


async def ensure(mounts: Iterable[v1.Mount]) -> None:
    """Make every missing source. Raises DeadlineExceeded or Failure naming the path."""
    slow = []
    for mount in mounts:
        path = mount.host_path
        if not path:
            continue
        if not path.startswith("/") or "\0" in path:
            raise InvalidArgument(f"{path!r} is not an absolute path", field="config.mounts.host_path")
        if not _known(path):
            slow.append(path)
    for path in dict.fromkeys(slow):
        await _wait(path)


def _known(path: str) -> bool:
    """Whether the path exists according to the kernel's caches; False also means "not known without asking a file system"."""
    try:
        fd = libc.openat2(_AT_FDCWD, path, os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
    except OSError:
        return False
    os.close(fd)
    return True


async def _wait(path: str) -> None:
    future = _waiting.get(path)
    if future is None:
        loop = asyncio.get_running_loop()
        future = _waiting[path] = loop.create_future()
        future.add_done_callback(lambda done: (_waiting.pop(path, None), done.exception()))
        threading.Thread(target=_ask, args=(path, loop, future), name=f"mount source {path}", daemon=True).start()
    done, _ = await asyncio.wait((future,), timeout=PATIENCE)
    if not done:
        raise DeadlineExceeded(f"mount source {path}: no answer within {PATIENCE:g} s", hint="is its file system alive?")
    future.result()


def _ask(path: str, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    error: Exception | None = None
    try:
        # Like containerd: whatever is there counts, a file or a device too.
        if not os.path.exists(path):
            os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as e:
        error = Failure.wrap("create container", "make mount source", e, path)
    try:
        loop.call_soon_threadsafe(_tell, future, error)
    except RuntimeError:
        return  # the loop is closed: the daemon ended while the file system slept


def _tell(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
