"""What people and monitoring see of pulls: verbose ImageStatus, Prometheus metrics, the command's bars."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri import config
from cri.images.auth import Credentials
from cri.images.store import Images
from hack import images
from hack.images import Assembled, Layer, assemble
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Node, running, wait_for
from tests.registry import DockerRegistry, Fake, inside

pytestmark = pytest.mark.registry


@pytest.fixture
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture
async def store(tmp_path: Path, in_node: None) -> Any:
    store = Images(tmp_path / "images", config.Images(registry_dir=str(tmp_path), progress_timeout=config.Seconds(3)))
    store.load()
    yield store
    await store.close()


def random(count: int, size: int = 200_000) -> Assembled:
    return assemble([Layer().file(f"f{n}", os.urandom(size)).finish() for n in range(count)], compression="none")


async def test_failures_have_a_reason(store: Images, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    strict = Images(tmp_path / "strict", config.Images(signature_policy=str(policy)))
    strict.load()
    with Fake() as fake:
        image = random(1, 10)
        fake.add(image, "latest", "denied", "broken")
        fake.manifests["foreign"] = (image.media_type, b"{}")
        fake.hook = lambda handler, path: "denied" in path and (handler.reply(403) or True)
        cases = [
            (store, "A!", "invalid_reference"),
            (store, f"{fake.host}/r:absent", "not_found"),
            (store, f"{fake.host}/r:denied", "denied"),
            (store, f"{fake.host}/r:foreign", "image"),
            (store, "127.0.0.1:1/r", "unavailable"),
            (strict, f"{fake.host}/r", "signature"),
        ]
        for where, ref, reason in cases:
            with pytest.raises(Exception):  # noqa: B017
                await where.pull(ref, Credentials())
            assert where.pulls.measures.failed[reason] == 1, (ref, where.pulls.measures.failed)
        hanging = asyncio.ensure_future(store.pull(f"{fake.host}/r"))
        await asyncio.sleep(0)
        assert store.pulls.measures.running == 1
        hanging.cancel()
        await asyncio.wait([hanging])
        measures = store.pulls.measures
        assert measures.failed["cancelled"] == 1 and measures.running == 0 and measures.succeeded == 0
    await strict.close()


async def test_bytes_are_counted_once(store: Images) -> None:
    """Three callers of one image, then another that shares a layer with it."""
    base = Layer().file("base", os.urandom(300_000)).finish()
    one, two = (assemble([base, Layer().file(name, "x").finish()], compression="none") for name in ("one", "two"))
    with Fake() as fake:
        fake.add(one, "one")
        fake.add(two, "two")
        await asyncio.gather(*(store.pull(f"{fake.host}/r:one") for _ in range(3)))
        sums = store.pulls.measures.sums()
        assert sums["bytes"] == sum(layer.size for layer in one.layers) and sums["layers"] == 2 and not sums["skipped"]
        await store.pull(f"{fake.host}/r:two")
        sums = store.pulls.measures.sums()
        assert sums["bytes"] == sum(layer.size for layer in (*one.layers, two.layers[1]))
        assert sums["skipped"] == one.layers[0].size and sums["reused"] == 1 and sums["layers"] == 3
        assert store.pulls.measures.succeeded == 4 and sum(store.pulls.measures.buckets) == 4


class Gate:
    """A registry that sends half of each layer, then waits."""

    def __init__(self, image: Assembled) -> None:
        self.open, self.halves = threading.Event(), 0
        self._image = image

    def __call__(self, handler: Any, path: str) -> bool:
        body = self._image.blobs.get(path.rpartition("/")[2])
        if body is None or len(body) < 100_000:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        self.halves += 1
        self.open.wait(20)
        handler.wfile.write(body[len(body) // 2 :])
        return True


def test_a_pull_as_people_see_it(node: Node, registry: DockerRegistry) -> None:
    image = random(3)
    small = registry.push(images.busybox(), "seen/small")
    gate = Gate(image)
    with Fake(hook=gate, netns=node.netns) as fake, running(node, extra='[metrics]\nlisten = "127.0.0.1:19465"\n') as daemon:
        fake.add(image, "latest")
        ref = f"{fake.host}/r"
        asked = v1.ImageSpec(image=ref)
        master, slave = pty.openpty()
        os.set_blocking(master, False)
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "150", "TERM": "xterm"}
        command = [sys.executable, "-m", "cri.cli", "pull", "--socket", str(daemon.socket), ref]
        process = subprocess.Popen(command, stderr=slave, stdout=subprocess.PIPE, env=env)
        os.close(slave)

        def progress() -> dict[str, Any]:
            info = daemon.images.ImageStatus(v1.ImageStatusRequest(image=asked, verbose=True), timeout=5).info
            return json.loads(info.get("progress", "{}"))

        try:
            total = sum(layer.size for layer in image.layers)
            halfway = wait_for("half of it", lambda: gate.halves == 3 and (p := progress()).get("fetched", 0) > total // 3 and p, 20)
            assert halfway["phase"] == "downloading" and halfway["wanted"] == halfway["size"] == total
            assert halfway["bytesPerSecond"] > 0 and halfway["etaSeconds"] is not None
            assert [x["digest"] for x in halfway["layers"]] == [x.digest for x in image.layers]
            metrics = scrape(node)
            assert metrics["cri_shim_image_pulls_in_progress"] == 1 and total // 3 < metrics["cri_shim_image_pulls_bytes_total"] < total
            drawn = b""

            def bars() -> bool:
                nonlocal drawn
                try:
                    drawn += os.read(master, 1 << 16)
                except (BlockingIOError, OSError):
                    pass
                return all(x.digest[7:19].encode() in drawn for x in image.layers)

            wait_for("a bar for each layer", bars)
            assert b"downloading" in drawn and b"%" not in drawn
        finally:
            gate.open.set()
        assert process.stdout is not None and process.stdout.read().decode().strip() == image.id and process.wait(20) == 0
        os.close(master)
        assert progress() == {}
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=small)), timeout=30)
        with pytest.raises(grpc.RpcError):
            daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=f"{small}:absent")), timeout=30)
        metrics = scrape(node)
        assert metrics["cri_shim_image_pulls_success_total"] == 2 and metrics["cri_shim_image_pulls_in_progress"] == 0
        assert metrics['cri_shim_image_pulls_failure_total{reason="not_found"}'] == 1
        assert metrics["cri_shim_image_pulls_bytes_total"] > total and metrics["cri_shim_image_pull_duration_seconds_count"] == 2
        assert metrics['cri_shim_image_pull_duration_seconds_bucket{le="+Inf"}'] == 2


def scrape(node: Node) -> dict[str, float]:
    script = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:19465/metrics', timeout=5).read().decode())"
    text = subprocess.run(node.command(sys.executable, "-c", script), capture_output=True, text=True, check=True, timeout=20).stdout
    pairs = (line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#") and " " in line)
    return {name: float(value) for name, value in pairs}
