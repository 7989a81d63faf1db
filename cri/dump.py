"""SIGUSR1: where every thread and task is, on standard error.

Between two bytecodes of the main thread, holding the GIL. faulthandler would also work in a C call that never returns, but it walks the
frames of running threads without the GIL: it crashed a daemon that was importing a module.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterable
from types import FrameType

#: Frames of each stack, innermost last.
DEPTH = 40


def dump(loop: asyncio.AbstractEventLoop) -> None:
    """Past the buffers of sys.stderr, which the interrupted code may be in the middle of using."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [f"--- stacks of process {os.getpid()} ---"]
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        lines += _where(_outwards(frame))
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    for task in tasks:
        lines.append(f"task {task.get_name()}: {task.get_coro()}")
        lines += _where(reversed(task.get_stack(limit=DEPTH)))
    lines.append(f"--- {len(names)} threads, {len(tasks)} tasks ---")
    data = memoryview(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    while data:
        data = data[os.write(2, data) :]


def _outwards(frame: FrameType | None) -> Iterable[FrameType]:
    depth = 0
    while frame is not None and depth < DEPTH:
        yield frame
        frame, depth = frame.f_back, depth + 1


def _where(frames: Iterable[FrameType]) -> list[str]:
    # No source lines: linecache reads files, and a frame may be between two lines.
    return [f"  {f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_name}" for f in list(frames)[::-1]]
