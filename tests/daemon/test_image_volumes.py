"""Image volumes over the socket: what the kubelet asks for, what it is told, and how long the layers live."""

from __future__ import annotations

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
