"""Image volumes over the socket: what the kubelet asks for, what it is told, and how long the layers live."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack import images
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon
from tests.registry import DockerRegistry

Pod = tuple[str, v1.PodSandboxConfig]


def data_image() -> images.Assembled:
    first = images.Layer().directory("models").file("models/weights", "old").file("models/gone", "x").symlink("current", "/models")
    return images.assemble([first.finish(), images.Layer().file("models/weights", "new").whiteout("models/gone").finish()])


@pytest.fixture(scope="module")
def data(daemon: Daemon, registry: DockerRegistry) -> str:
    """Reference of a pulled two-layer image with data."""
    return pull(daemon, registry.push(data_image(), "data:1"))


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.run_pod()


def pull(daemon: Daemon, reference: str) -> str:
    daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=reference)), timeout=60)
    return reference


def volume(image: str | v1.ImageSpec, path: str = "/vol", **fields: Any) -> v1.Mount:
    spec = image if isinstance(image, v1.ImageSpec) else v1.ImageSpec(image=image)
    return v1.Mount(**{"container_path": path, "image": spec, "readonly": True, **fields})


def snapshots(daemon: Daemon) -> set[str]:
    return {p.name for p in Path(daemon.root, "images/snapshots").iterdir()}


def test_shown_read_only_and_reported(daemon: Daemon, pod: Pod, busybox: str, data: str) -> None:
    mounts = (volume(data), volume(data, "/m", image_sub_path="models"), volume(data, "/c", image_sub_path="current"))
    container = daemon.run(pod, busybox, "sleep", "60", mounts=mounts)
    shown = daemon.exec(container, "sh", "-c", "cat /vol/models/weights /m/weights /c/weights; ls /m; touch /vol/x /m/x")
    assert shown.stdout == b"newnewnewweights\n"
    assert shown.stderr.count(b"Read-only") == 2
    image = daemon.images.ImageStatus(v1.ImageStatusRequest(image=v1.ImageSpec(image=data)), timeout=10).image
    status = daemon.container(container)
    assert {m.image.image_ref for m in status.mounts} == {image.id}
    assert [m.image.image for m in status.mounts] == [data] * 3
    # A retry of the kubelet's after a lost answer still means the same container.
    assert status.image.image == busybox


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"image_sub_path": "absent"}, "UNKNOWN", "ImageVolumeMountFailed: config.mounts[0]: image {!r}: sub path 'absent' does not exist"),
        ({"image_sub_path": "models/weights"}, "UNKNOWN", "ImageVolumeMountFailed: config.mounts[0]: image {!r}: sub path"),
        ({"image_sub_path": "../.."}, "UNKNOWN", "ImageVolumeMountFailed: config.mounts[0].image_sub_path:"),
        ({"image": v1.ImageSpec(image="no/such:one")}, "UNKNOWN", "ImageVolumeMountFailed: config.mounts[0].image: 'no/such:one' is not"),
        ({"readonly": False}, "INVALID_ARGUMENT", "config.mounts[0].readonly: "),
        ({"host_path": "/tmp"}, "INVALID_ARGUMENT", "config.mounts[0].host_path: "),
    ],
)
def test_refused(daemon: Daemon, pod: Pod, busybox: str, data: str, fields: dict[str, Any], code: str, text: str) -> None:
    before = set(Path(daemon.root, "images/containers-rw").iterdir())
    with pytest.raises(grpc.RpcError) as raised:
        daemon.create(pod, busybox, "true", mounts=(volume(**{"image": data, **fields}),))
    assert raised.value.code().name == code
    assert raised.value.details().startswith(text.format(data)), raised.value.details()
    assert set(Path(daemon.root, "images/containers-rw").iterdir()) == before


def test_layers_outlive_their_image_and_the_daemon(daemon: Daemon, registry: DockerRegistry, pod: Pod, busybox: str) -> None:
    """RemoveImage, a restart, a container that starts only then: the layers stay for as long as a container shows them, and no longer."""
    before = snapshots(daemon)
    reference = pull(daemon, registry.push(images.assemble([images.Layer().file("f", "only here").finish()]), "kept:1"))
    layers = snapshots(daemon) - before
    assert layers
    container = daemon.create(pod, busybox, "sh", "-c", "cat /vol/f; sleep 60", mounts=(volume(reference),))
    daemon.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=reference)), timeout=10)
    assert layers <= snapshots(daemon)
    daemon.restart()
    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
    assert daemon.exec(container, "cat", "/vol/f").stdout == b"only here"
    assert layers <= snapshots(daemon)
    assert daemon.container(container).mounts[0].image.image_ref
    daemon.runtime.StopContainer(v1.StopContainerRequest(container_id=container, timeout=0), timeout=10)
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert not layers & snapshots(daemon)


def test_the_same_create_again(daemon: Daemon, pod: Pod, busybox: str, data: str) -> None:
    """What we report is not part of what was asked: a retry gets the container it has."""
    first = daemon.create(pod, busybox, "true", name="again", mounts=(volume(data),))
    assert daemon.create(pod, busybox, "true", name="again", mounts=(volume(data),)) == first


def test_in_a_user_namespace(daemon: Daemon, busybox: str, data: str) -> None:
    status = daemon.runtime.Status(v1.StatusRequest(), timeout=10)
    if not status.runtime_handlers[0].features.user_namespaces:
        pytest.skip("this kernel cannot idmap what a pod with a user namespace needs")
    ids = [v1.IDMapping(container_id=0, host_id=200000, length=65536)]
    config = daemon.pod_config()
    users = v1.UserNamespace(mode=v1.POD, uids=ids, gids=ids)
    config.linux.security_context.namespace_options.CopyFrom(v1.NamespaceOption(pid=v1.CONTAINER, userns_options=users))
    mapped = volume(data, "/m", image_sub_path="models", uidMappings=ids, gidMappings=ids)
    container = daemon.run(daemon.run_pod(config), busybox, "sleep", "60", mounts=(volume(data), mapped))
    assert daemon.exec(container, "stat", "-c", "%u:%g", "/vol", "/vol/models/weights", "/m").stdout == b"0:0\n0:0\n0:0\n"
    assert b"Read-only" in daemon.exec(container, "touch", "/m/x").stderr


def test_an_artifact_as_a_volume(daemon: Daemon, registry: DockerRegistry, pod: Pod, busybox: str) -> None:
    """Files by name, read-only, for every user; with a sub path; listed, and removed with what it occupied."""
    before = snapshots(daemon)
    model = images.artifact({"weights.bin": b"w" * 3_000_000, "conf/model.json": b"{}", "conf/deep/x": b"x"}, nameless=b"not shown")
    reference = pull(daemon, registry.push(model, "model:1"))
    image = daemon.images.ImageStatus(v1.ImageStatusRequest(image=v1.ImageSpec(image=reference), verbose=True), timeout=10)
    assert image.image.id == images.digest_of(model.manifest)
    assert image.image.size > 3_000_000
    assert json.loads(image.info["info"])["artifactType"] == "application/vnd.example.model"
    exported = subprocess.run(
        [sys.executable, "-m", "cri.cli", "image", "export", "--socket", str(daemon.socket), reference, str(daemon.directory / "x.tar")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert exported.returncode and "is an artifact" in exported.stderr
    assert reference in {tag for listed in daemon.images.ListImages(v1.ListImagesRequest(), timeout=10).images for tag in listed.repo_tags}
    mounts = (volume(reference), volume(reference, "/c", image_sub_path="conf"))
    user = v1.LinuxContainerSecurityContext(run_as_user=v1.Int64Value(value=1000))
    container = daemon.run(pod, busybox, "sleep", "600", mounts=mounts, security=user)
    script = "cd /vol; find . -type f | sort; wc -c < weights.bin; cat /c/model.json; ls -ld . conf; touch x"
    shown = daemon.exec(container, "sh", "-c", script)
    lines = shown.stdout.decode().splitlines()
    assert lines[:5] == ["./conf/deep/x", "./conf/model.json", "./weights.bin", "3000000", "{}" + lines[4][2:]]
    assert lines[4].startswith("{}drwxr-xr-x") and b"Read-only" in shown.stderr
    assert {m.image.image_ref for m in daemon.container(container).mounts} == {image.image.id}
    # Another pull finds it whole; two artifacts do not become one although their configs are the same.
    other = pull(daemon, registry.push(images.artifact({"other": b"o"}), "model:2"))
    assert pull(daemon, reference) == reference
    assert len(snapshots(daemon) - before) == 2
    with pytest.raises(grpc.RpcError, match=r"config\.image\.image: .*is an artifact"):
        daemon.create(pod, other, "true")
    with pytest.raises(grpc.RpcError, match="ImageVolumeMountFailed: .*sub path 'weights.bin' is not a directory"):
        daemon.create(pod, busybox, "true", mounts=(volume(reference, image_sub_path="weights.bin"),))
    daemon.restart()
    assert daemon.exec(container, "cat", "/c/deep/x").stdout == b"x"
    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    for name in (reference, other):
        daemon.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=name)), timeout=10)
    assert snapshots(daemon) == before


@pytest.mark.parametrize(
    ("names", "why"), [(["../escape"], "not the name of a file"), (["a", "a/b"], "a file and a directory"), ([], "has a name")]
)
def test_hostile_artifacts(daemon: Daemon, registry: DockerRegistry, names: list[str], why: str) -> None:
    before = snapshots(daemon)
    reference = registry.push(images.artifact({name: name.encode() for name in names}, nameless=b"x"), "hostile:1")
    with pytest.raises(grpc.RpcError, match=why):
        pull(daemon, reference)
    assert snapshots(daemon) == before
    assert not list(Path(daemon.root, "images/ingest").iterdir())
