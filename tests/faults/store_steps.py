"""Runs an image store's day again and again, each time stopping at another step of it: SIGKILL, or a full disk. Started by test_store.py.

A step is a call that changes a file or directory of the store (an audit event of the interpreter); the unpack helper's own are not among
them. Every child is forked from a process that has everything imported, so that a round takes a tenth of a second.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from cri import config
from cri.errors import CriError, status_of
from cri.images import store as stores
from cri.images.store import Images
from shim.errors import Failure

_CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.link", "os.symlink"})


class Steps:
    """Counts them, and stops at one. ``root`` limits them to a directory."""

    def __init__(self) -> None:
        self.root, self.count, self.stop_at, self.kill = "\0", 0, -1, True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or flags & os.O_ACCMODE == os.O_RDONLY:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(self.root):
            return
        if self.stop_at < 0:
            return
        self.count += 1
        if self.count == self.stop_at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


steps = Steps()


def make(root: str) -> Images:
    store = Images(Path(root), config.Images(registry_dir=f"{root}/none", progress_timeout=config.Seconds(10)))
    store.load()
    return store


async def day(store: Images, host: str) -> None:
    """Two images with a layer in common, a container that outlives its image, another pull."""
    try:
        one = await store.pull(f"{host}/r:one")
        await store.pull(f"{host}/r:two")
        await store.prepare(one, "c1")
        await store.remove(one.id)
        await store.release("c1")
        await store.pull(f"{host}/r:one")
    finally:
        steps.stop_at = -1
        await store.close()


async def check(root: str, host: str, expected: dict[str, list[str]]) -> None:
    """What a crash left is whole and can be gone on with; in the end nothing is left over."""
    store = make(root)
    whole(store, expected)
    await store.sweep(())
    for tag in expected:
        await store.pull(f"{host}/r:{tag}")
    whole(store, expected)
    assert {t.rpartition(":")[2] for i in store.list() for t in i.repo_tags} == set(expected)
    for image in list(store.list()):
        await store.remove(image.id)
    await store.close()
    store = make(root)
    store.snapshots.empty_trash()
    await store.close()
    left = [p.relative_to(root) for d in ("records", "documents", "ingest", "containers-rw", "trash") for p in Path(root, d).iterdir()]
    left += [p.relative_to(root) for p in Path(root, "snapshots").iterdir() if p.name != "empty"]
    assert not left, f"left over: {left}"


def whole(store: Images, expected: dict[str, list[str]]) -> None:
    """Every image that is listed has all its files, and nothing lies about that no image needs."""
    for image in store.list():
        for tag in (t.rpartition(":")[2] for t in image.repo_tags):
            lowers = store.view(image).lower
            found = [hashlib.sha256((Path(lower) / "file").read_bytes()).hexdigest() for lower in reversed(lowers)]
            assert found == expected[tag], f"{tag}: {found}"
        store.details(image)
    root = store.root
    documents = {d.partition(":")[2] for r in store._records.values() for d in (r.config_digest, r.image.manifest_digest)}
    assert {p.name for p in (root / "documents").iterdir()} == documents
    assert {p.name for p in (root / "records").iterdir()} == {f"{i.id[7:]}.json" for i in store.list()}
    assert not list((root / "ingest").iterdir())
    for tag in Path(root, "containers-rw").iterdir():
        assert (tag / "uses.json").exists()


def child(function: Any, *arguments: Any) -> int:
    """The wait status of ``function`` run by asyncio in a fork."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            asyncio.run(function(*arguments))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed(root: str, host: str, expected: dict[str, list[str]], stride: int, first: int) -> int:
    """Rounds until the day ends before its step comes."""
    at, rounds = first, 0
    while True:
        here = f"{root}/{at}"

        async def doomed(here: str = here, at: int = at) -> None:
            steps.root, steps.stop_at, steps.kill = here, at, True
            await day(make(here), host)

        status = child(doomed)
        if status == 0:
            return rounds
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"step {at}: status {status}"
        assert child(check, here, host, expected) == 0, f"after a kill at step {at}"
        at, rounds = at + stride, rounds + 1


def full(root: str, host: str, expected: dict[str, list[str]], stride: int, first: int) -> int:
    at, rounds = first, 0
    while True:
        here = f"{root}/{at}"

        async def failing(here: str = here, at: int = at) -> None:
            store = make(here)
            steps.root, steps.stop_at, steps.kill, steps.count = here, at, False, 0
            try:
                await day(store, host)
            except (OSError, Failure, CriError) as error:
                assert "ENOSPC" in status_of(error)[1], error
                await store.release("c1")
                whole(store, expected)  # at once, without a restart
                needed = {c for i in store.list() for c in i.chain_ids}
                assert {m.chain_id for m in store.snapshots.all()} <= needed | store.pulls.spared()
            os._exit(7 if steps.count >= at else 8)

        code = os.waitstatus_to_exitcode(child(failing))
        if code == 8:  # the day has fewer steps
            return rounds
        assert code == 7, f"step {at}: exit code {code}"
        assert child(check, here, host, expected) == 0, f"after a full disk at step {at}"
        at, rounds = at + stride, rounds + 1


def main() -> NoReturn:
    mode, root, host, expected, stride, first = sys.argv[1:]
    verb = {"kill": killed, "full": full}[mode]
    print(verb(root, host, json.loads(expected), int(stride), int(first)))
    sys.exit(0)


if __name__ == "__main__":
    assert stores
    main()
