"""A FUSE server that takes requests and does not answer: whoever waits for one is in state D and cannot be killed.

(A request that nobody has read yet can be given up; one that the server has taken cannot. Hence a server, where a mount that nobody
serves makes a sleep that SIGKILL ends.)
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

import pytest

_LOOKUP, _FORGET, _GETATTR, _INIT, _DESTROY, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 26, 38, 36, 42
_HEAD = struct.Struct("<IIQQIIII")
_ENOSYS, _MNT_DETACH = 38, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Hanging:
    """``with Hanging(directory) as fuse``: a mount whose root can be seen and in which every lookup hangs until ``release``.

    ``slow_end`` (needs a loop device): the last unmount takes that many seconds.
    """

    def __init__(self, directory: Path, slow_end: float = 0.0) -> None:
        self.directory, self._slow_end = directory, slow_end
        self.waiting = threading.Event()  # somebody is stuck
        self._stop = threading.Event()
        self._loop = ""

    def __enter__(self) -> Self:
        if not os.path.exists("/dev/fuse"):
            pytest.skip("no /dev/fuse on this kernel")
        self.directory.mkdir(exist_ok=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        kind, source = "fuse", "hanging"
        if self._slow_end:
            backing = self.directory.with_suffix(".img")
            backing.write_bytes(bytes(1 << 20))
            made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False)
            if made.returncode:
                os.close(self._device)
                pytest.skip(f"no loop device: {made.stderr.strip()}")
            kind, source, options = "fuseblk", made.stdout.strip(), f"{options},blksize=4096"
            self._loop = source
        if _libc.mount(source.encode(), bytes(self.directory), kind.encode(), 0, options.encode()) != 0:
            error = os.strerror(ctypes.get_errno())
            self._close()
            pytest.skip(f"FUSE cannot be mounted: {error}")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        _libc.umount2(bytes(self.directory), _MNT_DETACH)
        if self._loop:
            subprocess.run(["losetup", "-d", self._loop], check=False, capture_output=True)

    def release(self) -> None:
        """Abort the connection: everybody who waits gets an error."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(10)
            self._close()

    def unmount(self) -> None:
        """From the host's point of view; mounts of containers stay."""
        assert _libc.umount2(bytes(self.directory), _MNT_DETACH) == 0

    def _close(self) -> None:
        os.close(self._device)

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not select.select([self._device], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(self._device, 1 << 20)
            except BlockingIOError:
                continue
            except OSError:  # unmounted
                return
            self._take(data)

    def _take(self, data: bytes) -> None:
        _, opcode, unique, *_rest = _HEAD.unpack_from(data)
        if opcode == _INIT:
            self._answer(unique, struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 1, 0, 0, *(0,) * 7))
        elif opcode == _GETATTR:
            attributes = struct.pack("<6Q10I", 1, 4096, 8, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
            self._answer(unique, struct.pack("<QII", 3600, 0, 0) + attributes)
        elif opcode == _LOOKUP:
            self.waiting.set()
        elif opcode == _DESTROY:
            time.sleep(self._slow_end)
            self._answer(unique, b"")
        elif opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            self._answer(unique, b"", -_ENOSYS)

    def _answer(self, unique: int, data: bytes, error: int = 0) -> None:
        os.write(self._device, struct.pack("<IiQ", 16 + len(data), error, unique) + data)
