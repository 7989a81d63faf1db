"""The image store dies, or finds the disk full, at every step it takes (SCENARIOS 15, 54); a power cut takes what was not flushed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.images import snapshots
from cri.images.store import Images
from hack.images import Assembled, Layer, assemble
from hack.node import REPOSITORY
from tests.daemon.harness import Node
from tests.registry import Fake, inside

BASE = "base" * 1000


def image(*texts: str) -> Assembled:
    return assemble([Layer().file("file", text).finish() for text in texts])


@pytest.fixture
def served(node: Node) -> Iterator[tuple[Fake, dict[str, list[str]]]]:
    """A registry with two images, and what is in their layers."""
    content = {"one": (BASE, "one", "more"), "two": (BASE, "two")}
    with Fake(netns=node.netns) as fake:
        for tag, texts in content.items():
            fake.add(image(*texts), tag)
        yield fake, {tag: [hashlib.sha256(t.encode()).hexdigest() for t in texts] for tag, texts in content.items()}


def rounds(node: Node, served: tuple[Fake, dict[str, list[str]]], tmp_path: Path, mode: str, stride: int, first: int) -> int:
    fake, expected = served
    arguments = mode, str(tmp_path), fake.host, json.dumps(expected), str(stride), str(first)
    script = node.command(sys.executable, "-m", "tests.faults.store_steps", *arguments)
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=110, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.parametrize("mode", ["kill", "full"])
def test_at_some_steps(node: Node, served: Any, tmp_path: Path, mode: str) -> None:
    assert rounds(node, served, tmp_path, mode, 13, 3) > 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_at_more_steps(node: Node, served: Any, tmp_path: Path, mode: str) -> None:
    assert rounds(node, served, tmp_path, mode, 3, 1) > 20


async def test_a_power_cut(node: Node, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was not flushed may be empty or missing after a reboot; what was, is used again."""
    fake, expected = served
    with inside(node.netns):
        store = make(tmp_path)
        ref = f"{fake.host}/r:one"
        one = await store.pull(ref)
        await store.pulls.close()
        for chain in store.snapshots.not_durable():  # the flush may not have come to its end
            store.snapshots.mark_durable([chain])
        await store.close()
        record = tmp_path / "records" / f"{one.id[7:]}.json"
        manifest = tmp_path / "documents" / one.manifest_digest[7:]
        layer = tmp_path / "snapshots" / one.chain_ids[1][7:]
        whole = {path: path.read_bytes() for path in (record, manifest)}
        monkeypatch.setattr(snapshots, "boot_id", lambda: "another boot")
        again = make(tmp_path)
        assert again.get(ref) is not None, "all of it was flushed"
        await again.close()
        for damage in (lambda: record.write_bytes(b""), lambda: manifest.write_bytes(b""), lambda: (layer / "durable").unlink()):
            damage()
            again = make(tmp_path)
            assert again.get(ref) is None and list(again.list()) == []
            assert (await again.pull(ref)).id == one.id
            await again.pulls.close()
            again.snapshots.mark_durable(again.snapshots.not_durable())
            await again.close()
            assert {path: path.read_bytes() for path in (record, manifest)}[manifest] == whole[manifest]
        texts = [hashlib.sha256((tmp_path / "snapshots" / c[7:] / "fs" / "file").read_bytes()).hexdigest() for c in one.chain_ids]
        assert texts == expected["one"]


def make(root: Path) -> Images:
    store = Images(root, config.Images(registry_dir=str(root / "none")))
    store.load()
    return store
