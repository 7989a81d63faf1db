"""Registries that lie about documents: ATTACKS CVE-2023-25153, 2021-41190, 2024-3727 and the metadata rows of "Denial of service"."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from hack.images import Layer, assemble, digest_of
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node
from tests.registry import Fake

MIB = 1 << 20


def error(daemon: Daemon, fake: Fake) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=f"{fake.host}/hostile")), timeout=60)
    return caught.value


def resident(daemon: Daemon) -> int:
    text = Path(f"/proc/{daemon.pids().daemon}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def endless(handler: Any, total: int = 2 << 30, **headers: str) -> None:
    """A body of ``total`` bytes, until the other side has had enough."""
    handler.send_response(200)
    for name, value in {"Content-Length": str(total), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    try:
        for _ in range(total // MIB):
            handler.wfile.write(b" " * MIB)
    except OSError:
        handler.close_connection = True


@pytest.mark.parametrize("what", ["index", "manifest", "config", "error", "token"])
def test_documents_without_end(daemon: Daemon, node: Node, what: str) -> None:
    """2 GiB where kilobytes are expected: refused after the limit, and not in memory."""
    image = assemble([Layer().file("f", "x").finish()])
    config = json.loads(image.manifest)["config"]["digest"]

    def hook(handler: Any, path: str) -> bool:
        if what in ("index", "manifest") and "/manifests/" in path:
            endless(handler, Content_Type=f"application/vnd.oci.image.{what}.v1+json")
        elif what == "config" and config in path:
            endless(handler)
        elif what == "error" and "/manifests/" in path:
            handler.send_response(404)
            handler.send_header("Content-Length", str(2 << 30))
            handler.end_headers()
            try:
                for _ in range(2048):
                    handler.wfile.write(b"x" * MIB)
            except OSError:
                handler.close_connection = True
        elif what == "token" and path.startswith("/token"):
            endless(handler)
        elif what == "token":
            realm = f'Bearer realm="http://{handler.headers["Host"]}/token",service="x"'
            handler.reply(401, WWW_Authenticate=realm)
        else:
            return False
        return True

    with Fake(netns=node.netns, hook=hook) as fake:
        fake.add(image, "latest")
        before = resident(daemon)
        caught = error(daemon, fake)
        assert resident(daemon) - before < 48 * MIB
        assert what == "error" or "sent more than" in str(caught.details()), caught.details()


def manifest_of(change: Callable[[dict[str, Any]], None]) -> tuple[bytes, dict[str, bytes]]:
    image = assemble([Layer().file("f", "x").finish()])
    document = json.loads(image.manifest)
    change(document)
    return json.dumps(document).encode(), image.blobs


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["layers"][0].update(digest="sha256:../../../../etc/passwd"),
        lambda m: m["layers"][0].update(digest="sha256:" + "0" * 63),
        lambda m: m["layers"][0].update(digest="sha256:" + "A" * 64),
        lambda m: m["config"].update(digest="md5:" + "0" * 32),
        lambda m: m["config"].update(size=1 << 40),
        lambda m: m["layers"][0].update(size=-1),
        lambda m: m["layers"][0].update(size=1e300),
        lambda m: m.update(layers=m["layers"] * 501),
        lambda m: m.update(manifests=[m["config"]]),
        lambda m: m.update(layers=m["layers"] * 2),
        lambda m: m.update(mediaType="application/vnd.oci.image.index.v1+json"),
    ],
    ids=[
        *("path in a digest", "short digest", "upper case digest", "unknown algorithm", "huge config", "negative size", "size beyond all"),
        *("501 layers", "index and manifest in one", "more layers than diff ids", "wrong type inside"),
    ],
)
def test_manifests_refused(daemon: Daemon, node: Node, sentinel: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body, blobs = manifest_of(change)
    with Fake(netns=node.netns) as fake:
        fake.blobs.update(blobs)
        fake.manifests["latest"] = fake.manifests[digest_of(body)] = ("application/vnd.oci.image.manifest.v1+json", body)
        error(daemon, fake)
        assert not [path for _, path, _ in fake.seen if ".." in path]
    assert daemon.images.ListImages(v1.ListImagesRequest(), timeout=20).images == []


def test_a_document_nested_too_deep(daemon: Daemon, node: Node) -> None:
    body = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with Fake(netns=node.netns) as fake:
        fake.manifests["latest"] = ("application/vnd.oci.image.manifest.v1+json", body)
        assert "manifest" in str(error(daemon, fake).details())


def test_foreign_layer_urls_are_not_followed(daemon: Daemon, node: Node) -> None:
    """CVE-2020-15157: a layer's own URL gets no request, and so no credential."""
    with Fake(netns=node.netns) as elsewhere, Fake(netns=node.netns) as fake:
        body, blobs = manifest_of(lambda m: m["layers"][0].update(urls=[f"http://{elsewhere.host}/steal"]))
        fake.manifests["latest"] = ("application/vnd.oci.image.manifest.v1+json", body)
        fake.blobs.update({d: b for d, b in blobs.items() if d != json.loads(body)["layers"][0]["digest"]})
        request = v1.PullImageRequest(image=v1.ImageSpec(image=f"{fake.host}/hostile"), auth=v1.AuthConfig(username="u", password="p4ss"))
        with pytest.raises(grpc.RpcError) as caught:
            daemon.images.PullImage(request, timeout=60)
        assert elsewhere.seen == [] and "p4ss" not in str(caught.value.details())
