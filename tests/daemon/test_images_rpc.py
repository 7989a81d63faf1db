"""ImageService over the socket."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack import images
from hack.images import Layer, assemble
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, gone, title, wait_for
from tests.registry import PASSWORD, USER, DockerRegistry, Fake, TokenServer

pytestmark = pytest.mark.registry


def spec(ref: str) -> v1.ImageSpec:
    return v1.ImageSpec(image=ref)


def pull(daemon: Daemon, ref: str, **auth: str) -> str:
    return str(daemon.images.PullImage(v1.PullImageRequest(image=spec(ref), auth=v1.AuthConfig(**auth)), timeout=60).image_ref)


def status(daemon: Daemon, ref: str, verbose: bool = False) -> v1.ImageStatusResponse:
    return daemon.images.ImageStatus(v1.ImageStatusRequest(image=spec(ref), verbose=verbose), timeout=20)


def listed(daemon: Daemon, ref: str = "") -> list[v1.Image]:
    return list(daemon.images.ListImages(v1.ListImagesRequest(filter=v1.ImageFilter(image=spec(ref))), timeout=20).images)


def remove(daemon: Daemon, ref: str) -> None:
    daemon.images.RemoveImage(v1.RemoveImageRequest(image=spec(ref)), timeout=20)


def refused(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_life_of_an_image(daemon: Daemon, registry: DockerRegistry) -> None:
    made = images.users()
    ref = registry.push(made, "users:v1")
    assert not status(daemon, ref).HasField("image"), "absent is an empty answer"
    assert pull(daemon, ref) == made.id
    digest = f"{ref.rpartition(':')[0]}@{made.digest}"
    for name in (ref, digest, made.id, made.id[7:], made.id[7:20]):
        image = status(daemon, name).image
        assert (image.id, list(image.repo_tags), list(image.repo_digests)) == (made.id, [ref], [digest])
        assert image.username == "app" and not image.HasField("uid")
        assert image.size > 0 and not image.pinned
        assert [i.id for i in listed(daemon, name)] == [made.id]
    assert made.id in [i.id for i in listed(daemon)] and listed(daemon, "docker.io/library/nothing") == []
    streamed = [i for m in daemon.images.StreamImages(v1.StreamImagesRequest(), timeout=20) for i in m.images]
    assert sorted(i.id for i in streamed) == sorted(i.id for i in listed(daemon))

    info = json.loads(status(daemon, ref, verbose=True).info["info"])
    assert info["imageSpec"]["config"]["User"] == "app:staff" and len(info["snapshots"]) == 2
    remove(daemon, digest)
    remove(daemon, digest)
    assert not status(daemon, made.id).HasField("image") and listed(daemon, ref) == []


@pytest.mark.parametrize(
    "user, uid, name",
    [
        ("", None, ""),
        ("0", 0, ""),
        ("1000:50", 1000, ""),
        ("app", None, "app"),
        ("-1", None, "-1"),
        ("4294967295", None, "4294967295"),
        ("9" * 36, None, "9" * 36),
    ],
)
def test_uid_or_username(daemon: Daemon, registry: DockerRegistry, user: str, uid: int | None, name: str) -> None:
    made = assemble([Layer().file("f", user).finish()], {"User": user})
    ref = registry.push(made, "user-kinds")
    pull(daemon, ref)
    image = status(daemon, made.id).image
    assert (image.uid.value if image.HasField("uid") else None, image.username) == (uid, name)
    remove(daemon, made.id)


def test_fs_info(daemon: Daemon, busybox: str) -> None:
    info = daemon.images.ImageFsInfo(v1.ImageFsInfoRequest(), timeout=20)
    (of_images,), (of_containers,) = info.image_filesystems, info.container_filesystems
    assert of_images.fs_id.mountpoint == of_containers.fs_id.mountpoint, "the kubelet compares them"
    assert of_images.timestamp > 0 and of_images.used_bytes.value > 1 << 20 and of_images.inodes_used.value > 50
    assert of_containers.HasField("used_bytes") and of_containers.HasField("inodes_used")


def test_errors_have_the_codes_the_kubelet_reads(daemon: Daemon, registry: DockerRegistry) -> None:
    error = refused(lambda: pull(daemon, f"{registry.host}/no/such:image"))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "HTTP 404" in error.details()
    error = refused(lambda: pull(daemon, "127.0.0.1:9/x"))
    assert error.code() is grpc.StatusCode.UNKNOWN and error.details().startswith("RegistryUnavailable: ")
    for ref in ("UPPER", "", "a@sha256:1"):
        assert refused(lambda ref=ref: pull(daemon, ref)).code() is grpc.StatusCode.INVALID_ARGUMENT
    error = refused(lambda: pull(daemon, f"{registry.host}/busybox", auth="not base64"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "not base64" not in error.details().replace("not base64 of", "")
    for call in (lambda: remove(daemon, ""), lambda: status(daemon, "")):
        assert refused(call).code() is grpc.StatusCode.INVALID_ARGUMENT
    handler = v1.PullImageRequest(image=v1.ImageSpec(image=f"{registry.host}/busybox", runtime_handler="nosuch"))
    assert refused(lambda: daemon.images.PullImage(handler, timeout=20)).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_secrets_are_in_no_error_and_no_log(daemon: Daemon, node: Node, tmp_path: Any) -> None:
    server = TokenServer(tmp_path / "token", node.netns)
    try:
        with DockerRegistry(tmp_path / "registry", node.netns, port=5055, token=server) as private:
            made = assemble([Layer().file("private", "x").finish()])
            ref = private.push(made, "private")
            error = refused(lambda: pull(daemon, ref, username=USER, password="wrong-s3cret-value"))
            assert "access denied" in error.details() and "wrong-s3cret-value" not in error.details()
            assert pull(daemon, ref, username=USER, password=PASSWORD) == made.id
            remove(daemon, made.id)
        assert PASSWORD not in daemon.tail(100_000) and "wrong-s3cret-value" not in daemon.tail(100_000)
    finally:
        server.close()


def test_progress_of_a_pull_is_visible(daemon: Daemon, node: Node) -> None:
    made = assemble([Layer().file(f"progress{n}", "x" * n).finish() for n in range(3)])
    held, go = threading.Event(), threading.Event()

    def hold(handler: Any, path: str) -> bool:
        if made.layers[2].digest in path:
            held.set()
            go.wait(20)
        return False

    with Fake(netns=node.netns, hook=hold) as fake:
        fake.add(made, "latest")
        ref = f"{fake.host}/slow"
        answer = daemon.images.PullImage.future(v1.PullImageRequest(image=spec(ref)), timeout=60)
        assert held.wait(20)
        response = status(daemon, ref, verbose=True)
        progress = json.loads(response.info["progress"])
        go.set()
        assert not response.HasField("image")
        assert progress["phase"] == "downloading" and [x["digest"] for x in progress["layers"]] == [d.digest for d in made.layers]
        assert progress["wanted"] == sum(d.size for d in made.layers) > progress["fetched"]
        assert answer.result().image_ref == made.id
        assert "progress" not in status(daemon, ref, verbose=True).info


def test_images_are_there_after_a_restart(daemon: Daemon, registry: DockerRegistry, busybox: str) -> None:
    before = listed(daemon)
    daemon.restart()
    assert listed(daemon) == before and before
    assert pull(daemon, busybox) == status(daemon, busybox).image.id


def test_a_daemon_killed_in_a_pull_leaves_nothing_half_done(daemon: Daemon, node: Node, registry: DockerRegistry) -> None:
    made = images.many_layers(4)
    held = threading.Event()

    def hold(handler: Any, path: str) -> bool:
        if made.layers[3].digest in path:
            held.set()
            handler.rfile.read(1)
        return False

    with Fake(netns=node.netns, hook=hold) as fake:
        fake.add(made, "latest")
        answer = daemon.images.PullImage.future(v1.PullImageRequest(image=spec(f"{fake.host}/killed")), timeout=60)
        assert held.wait(20)
        daemon.kill()
        assert answer.exception() is not None
        daemon.start()
        assert not status(daemon, made.id).HasField("image")
        fake.hook = None
        assert pull(daemon, f"{fake.host}/killed") == made.id
        remove(daemon, made.id)


def test_killed_at_any_moment_the_store_stays_whole(daemon: Daemon, registry: DockerRegistry) -> None:
    made = images.many_layers(30)
    ref = registry.push(made, "killed-anywhere")
    store = daemon.root / "images"
    for n in range(5):
        answer = daemon.images.PullImage.future(v1.PullImageRequest(image=spec(ref)), timeout=60)
        time.sleep(0.08 + 0.09 * n)
        helpers = unpack_helpers(daemon.process.pid)  # type: ignore[union-attr]
        daemon.kill()
        assert answer.exception() is not None or answer.result().image_ref == made.id
        wait_for("helpers to die with the daemon", lambda helpers=helpers: all(gone(pid) for pid in helpers))
        daemon.start()
        wait_for("abandoned layers to go", lambda: not [*(store / "ingest").iterdir(), *(store / "trash").iterdir()])
        if status(daemon, made.id).HasField("image"):
            assert len(json.loads(status(daemon, made.id, verbose=True).info["info"])["snapshots"]) == 30
            remove(daemon, made.id)
    assert pull(daemon, ref) == made.id
    lowers = json.loads(status(daemon, made.id, verbose=True).info["info"])["snapshots"]
    assert [(Path(lower) / "order").read_text() for lower in lowers[:-1]] == [str(n) for n in range(29, 0, -1)]
    remove(daemon, made.id)


def unpack_helpers(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if "unpack_worker" in title(int(c))]


def test_parallel_removals_and_pulls(daemon: Daemon, registry: DockerRegistry) -> None:
    """SCENARIOS 24 and 25: many RemoveImage at once, of one image and of several that share layers, while they are pulled."""

    def names(directory: str) -> set[str]:
        return {p.name for p in (daemon.root / "images" / directory).iterdir()}

    before = names("snapshots")
    shared = Layer().file("shared", "x").finish()
    refs = [registry.push(assemble([shared, Layer().file("own", str(n)).finish()]), f"churn-{n}") for n in range(4)]

    def work(number: int) -> None:
        for _ in range(5):
            try:
                if number % 3:
                    remove(daemon, refs[number % 4])
                else:
                    pull(daemon, refs[number % 4])
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND, error

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    for ref in refs:
        made = pull(daemon, ref)
        lowers = json.loads(status(daemon, ref, verbose=True).info["info"])["snapshots"]
        assert [os.listdir(lower) for lower in lowers] == [["own"], ["shared"]], made
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: remove(daemon, refs[n % 4]), range(24)))
    wait_for("the layers to go", lambda: names("snapshots") == before and not names("trash"))
