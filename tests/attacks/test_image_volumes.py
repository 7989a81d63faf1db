"""CVE-2017-1002101, CVE-2021-25741: the sub path of a volume swapped for a link out of it while it is being mounted."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import grpc
import pytest

from hack import images
from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.conftest import climbing
from tests.daemon.harness import Daemon
from tests.registry import DockerRegistry

SECONDS = 3.0
_EXCHANGE = 2  # RENAME_EXCHANGE


@pytest.mark.race
def test_sub_path_under_a_swap_loop(daemon: Daemon, registry: DockerRegistry, busybox: str, tmp_path: Path) -> None:
    """Nobody in a container can write to an image volume. So the test is the attacker, in the layer itself: whatever the walk finds at any
    moment, it finds inside the mount."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/secret").write_text("host-secret-7f3a\n")
    layer = images.Layer().directory("real").directory("real/sub").file("real/sub/fine", "fine").symlink("link", climbing(tmp_path))
    reference = registry.push(images.assemble([layer.finish()]), "swapped:1")
    before = set(Path(daemon.root, "images/snapshots").iterdir())
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    (snapshot,) = set(Path(daemon.root, "images/snapshots").iterdir()) - before
    real, link = (os.fsencode(snapshot / "fs" / name) for name in ("real", "link"))
    stop = threading.Event()
    swaps = [0]

    def swap() -> None:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
        while not stop.is_set():
            exchange(-100, real, -100, link, _EXCHANGE)
            swaps[0] += 1
            if swaps[0] % 64 == 0:
                time.sleep(0.0002)  # others have work to do on this machine

    pod = daemon.run_pod()
    mount = v1.Mount(container_path="/v", image=v1.ImageSpec(image=reference), readonly=True, image_sub_path="real/sub")
    outcomes = {"shown": 0, "refused": 0}
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or not outcomes["shown"]:
            assert time.monotonic() < until + 30
            try:
                container = daemon.run(pod, busybox, "sh", "-c", "ls /v; cat /v/*", mounts=(mount,))
            except grpc.RpcError as error:
                assert error.details().startswith("ImageVolumeMountFailed: "), error.details()
                outcomes["refused"] += 1
                continue
            daemon.wait_exit(container)
            text = daemon.log_text(container)
            assert "secret" not in text and "fine" in text, text
            outcomes["shown"] += 1
            daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    finally:
        stop.set()
        thread.join()
    assert swaps[0] > 1000 and outcomes["shown"], (swaps, outcomes)
