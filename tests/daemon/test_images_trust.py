"""Signature policy: real signatures (openssl) in Debian's registry, judged at the pull and at the creation of a container."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri import config
from cri.errors import SignatureValidationFailed, StartError
from cri.images.model import Image
from cri.images.store import Images
from hack import images
from hack.images import Assembled, Layer, assemble
from protos.runtime.v1 import api_pb2 as v1
from tests import cosign
from tests.cosign import Signer
from tests.daemon.builders import container_config
from tests.daemon.harness import Daemon, Node, running
from tests.registry import DockerRegistry, Fake, inside

pytestmark = pytest.mark.registry
ACCEPT, REJECT = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]


@pytest.fixture
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.make(tmp_path_factory.mktemp("keys"))


def signed_by(signer: Signer, identity: str = "matchRepository") -> list[dict[str, Any]]:
    return [{"type": "sigstoreSigned", "keyPath": str(signer.public), "signedIdentity": {"type": identity}}]


def write(path: Path, default: Any, **scopes: Any) -> None:
    path.write_text(json.dumps({"default": default, "transports": {"docker": scopes}}))


@pytest.fixture
async def store(tmp_path: Path, in_node: None) -> Any:
    write(tmp_path / "policy.json", REJECT)
    store = Images(tmp_path / "images", config.Images(registry_dir=str(tmp_path), signature_policy=str(tmp_path / "policy.json")))
    store.load()
    yield store
    await store.close()


def small(text: str) -> Assembled:
    return assemble([Layer().file("etc/motd", text).finish()])


def allowed(store: Images, image: Image, asked: str) -> bool:
    try:
        store.require_trusted(image, asked)
    except SignatureValidationFailed:
        return False
    return True


@pytest.mark.parametrize("kind", ["ecdsa", "rsa", "ed25519"])
@pytest.mark.parametrize("by", ["path", "data"])
async def test_a_signed_image(store: Images, registry: DockerRegistry, tmp_path: Path, kind: cosign.Kind, by: str) -> None:
    signer, image = Signer.make(tmp_path, kind=kind), small(f"{kind}{by}")
    ref = registry.push(image, f"signed/{kind}-{by}:v1")
    cosign.sign(registry, f"signed/{kind}-{by}", image.digest, signer)
    key = {"keyPath": str(signer.public)} if by == "path" else {"keyData": base64.b64encode(signer.public.read_bytes()).decode()}
    rule = {"type": "sigstoreSigned", **key, "signedIdentity": {"type": "matchRepository"}}
    write(tmp_path / "policy.json", REJECT, **{registry.host: [rule]})
    pulled = await store.pull(ref)
    assert pulled.id == image.id and allowed(store, pulled, ref) and allowed(store, pulled, pulled.id)
    assert allowed(store, pulled, pulled.id[7:20])


async def test_what_is_refused_and_what_it_says(store: Images, registry: DockerRegistry, tmp_path: Path, signer: Signer) -> None:
    policy = tmp_path / "policy.json"
    write(policy, REJECT, **{f"{registry.host}/team": signed_by(signer), f"{registry.host}/exact": signed_by(signer, "matchExact")})
    other = Signer.make(tmp_path, "other")
    good = small("good")

    async def refused(name: str, why: str) -> str:
        with pytest.raises(SignatureValidationFailed, match=why) as caught:
            await store.pull(f"{registry.host}/{name}")
        text = str(caught.value)
        assert text.startswith("SignatureValidationFailed: ") and str(policy) in text and name in text
        return text

    registry.push(good, "team/unsigned:v1")
    text = await refused("team/unsigned:v1", "no signature found")
    assert f"docker scope '{registry.host}/team'" in text and str(signer.public) in text and good.digest in text

    registry.push(good, "team/wrong-key:v1")
    cosign.sign(registry, "team/wrong-key", good.digest, other)
    await refused("team/wrong-key:v1", "signature 1: not made with this key")

    registry.push(good, "team/wrong-digest:v1")
    cosign.sign(registry, "team/wrong-digest", good.digest, signer, claimed="sha256:" + "1" * 64)
    await refused("team/wrong-digest:v1", "signature 1: for sha256:1111.*, not for this image")

    registry.push(good, "team/wrong-name:v1")
    cosign.sign(registry, "team/wrong-name", good.digest, signer, reference=f"{registry.host}/team/other")
    await refused("team/wrong-name:v1", "for the name .*team/other")

    registry.push(good, "exact/app:v1")
    cosign.sign(registry, "exact/app", good.digest, signer)
    assert "signedIdentity matchRepository accepts" in await refused("exact/app:v1", "for the name .*matchExact")
    cosign.sign(registry, "exact/app", good.digest, signer, reference=f"{registry.host}/exact/app:v1")
    await store.pull(f"{registry.host}/exact/app:v1")
    registry.push(good, "exact/app:v2")
    await refused("exact/app:v2", "for the name")

    registry.push(good, "elsewhere:v1")
    await refused("elsewhere:v1", "default: it rejects the image")

    moved = small("moved")
    ref = registry.push(good, "team/tag:v1")
    cosign.sign(registry, "team/tag", good.digest, signer)
    await store.pull(ref)
    registry.push(moved, "team/tag:v1")  # the signature of what the tag used to be does not help
    await refused("team/tag:v1", "no signature found")
    assert store.get(ref) is not None and store.get(ref).id == good.id, "the tag stays at the image that was allowed"  # type: ignore[union-attr]
    registry.push(cosign.signature_image((cosign.payload(ref, good.digest), signer.sign(cosign.payload(ref, good.digest)))), _tag(moved))
    await refused("team/tag:v1", "for sha256:.*, not for this image")
    assert store.get(moved.id) is None


def _tag(image: Assembled) -> str:
    return f"team/tag:{image.digest.replace(':', '-')}.sig"


async def test_one_of_several_signatures_is_enough_all_requirements_are_needed(
    store: Images, registry: DockerRegistry, tmp_path: Path, signer: Signer
) -> None:
    image, other = small("several"), Signer.make(tmp_path, "other")
    ref = registry.push(image, "several/app:v1")
    write(tmp_path / "policy.json", REJECT, **{registry.host: signed_by(signer)})
    cosign.sign(registry, "several/app", image.digest, other, signer)
    await store.pull(ref)
    write(tmp_path / "policy.json", REJECT, **{registry.host: [*signed_by(signer), *signed_by(other)]})
    await store.pull(ref)
    cosign.sign(registry, "several/app", image.digest, signer)
    await store.remove(ref)
    with pytest.raises(SignatureValidationFailed, match=str(other.public)):
        await store.pull(ref)


async def test_an_index_or_this_platform_s_manifest_may_be_signed(
    store: Images, registry: DockerRegistry, tmp_path: Path, signer: Signer
) -> None:
    write(tmp_path / "policy.json", REJECT, **{registry.host: signed_by(signer)})
    index = images.multi()
    for name, digest in (("index/top", index.digest), ("index/child", index.children[1].digest)):
        ref = registry.push(index, f"{name}:v1")
        cosign.sign(registry, name, digest, signer)
        pulled = await store.pull(ref)
        assert allowed(store, pulled, ref)
    registry.push(index, "index/foreign:v1")
    cosign.sign(registry, "index/foreign", index.children[0].digest, signer)
    with pytest.raises(SignatureValidationFailed, match="no signature found"):
        await store.pull(f"{registry.host}/index/foreign:v1")


async def test_judged_again_by_the_policy_of_the_day(store: Images, registry: DockerRegistry, tmp_path: Path, signer: Signer) -> None:
    """Images that are here already: live reload, keys that are replaced, and what survives a restart."""
    policy = tmp_path / "policy.json"
    write(policy, ACCEPT)
    signed, unsigned = small("day"), small("day, unsigned")
    ref, bare = registry.push(signed, "day/app:v1"), registry.push(unsigned, "day/bare:v1")
    cosign.sign(registry, "day/app", signed.digest, signer)
    first, second = await store.pull(ref), await store.pull(bare)
    write(policy, ACCEPT, **{f"{registry.host}/day": signed_by(signer)})
    assert not allowed(store, second, bare)
    with pytest.raises(SignatureValidationFailed, match="pulled when no policy wanted its signatures.*pull it again"):
        store.require_trusted(first, ref)
    first = await store.pull(ref)
    assert allowed(store, first, ref) and allowed(store, first, first.id)

    again = Images(store.root, config.Images(signature_policy=str(policy)))
    again.load()
    assert allowed(again, first, ref) and not allowed(again, second, bare)

    other = Signer.make(tmp_path, "other")
    key = signer.public.read_bytes()
    try:
        os.replace(_copy(other.public, signer.public.with_suffix(".new")), signer.public)
        assert not allowed(store, first, ref), "the key file is another one now"
    finally:
        signer.public.write_bytes(key)
    assert allowed(store, first, ref)
    policy.write_text("{")
    with pytest.raises(SignatureValidationFailed, match="not JSON.*nothing passes"):
        store.require_trusted(first, ref)
    policy.unlink()
    with pytest.raises(SignatureValidationFailed, match="No such file"):
        await store.pull(ref)
    write(policy, REJECT)
    assert not allowed(store, first, ref) and not allowed(store, first, first.id)


def _copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


async def test_one_repository_s_permission_is_not_another_s(store: Images, registry: DockerRegistry, tmp_path: Path) -> None:
    image = small("two names")
    good, bad = registry.push(image, "trusted/app:v1"), registry.push(image, "untrusted/app:v1")
    write(tmp_path / "policy.json", ACCEPT)
    await store.pull(good)
    pulled = await store.pull(bad)
    write(tmp_path / "policy.json", REJECT, **{f"{registry.host}/trusted": ACCEPT})
    assert allowed(store, pulled, good) and not allowed(store, pulled, bad)
    assert allowed(store, pulled, pulled.id), "known by a name that is allowed"
    write(tmp_path / "policy.json", REJECT, **{"docker.io": ACCEPT})
    assert not allowed(store, pulled, pulled.id[7:20]), "the beginning of an id is not a repository of the Hub"


async def test_rejected_without_asking_the_registry_and_refused_when_it_does_not_answer(
    store: Images, tmp_path: Path, signer: Signer
) -> None:
    image = small("down")
    with Fake() as fake:
        fake.add(image, "latest")
        with pytest.raises(SignatureValidationFailed):
            await store.pull(f"{fake.host}/r")
        assert fake.seen == []
        write(tmp_path / "policy.json", REJECT, **{fake.host: signed_by(signer)})
        fake.hook = lambda handler, path: ".sig" in path and (handler.reply(403) or True)
        with pytest.raises(Exception, match=r"manifest sha256-[0-9a-f]+\.sig: .*HTTP 403"):
            await store.pull(f"{fake.host}/r")
        assert not any("/blobs/" in path for _, path, _ in fake.seen), "no layer before the verdict"


HOSTILE: dict[str, Callable[[Assembled], Any]] = {
    "not a manifest": lambda image: [],
    "layers is not a list": lambda image: {"layers": 7},
    "a huge payload": lambda image: {"layers": [_layer(size=1 << 40)]},
    "no annotation": lambda image: {"layers": [_layer(annotations=None)]},
    "not base64": lambda image: {"layers": [_layer(annotations={"dev.cosignproject.cosign/signature": "!"})]},
    "a path for a digest": lambda image: {"layers": [_layer(digest="sha256:../../x")]},
    "ten thousand": lambda image: {"layers": [_layer(mediaType="other")] * 10_000},
}


def _layer(**fields: Any) -> dict[str, Any]:
    annotations = {"dev.cosignproject.cosign/signature": "AAAA"}
    media_type = "application/vnd.dev.cosign.simplesigning.v1+json"
    return {"mediaType": media_type, "digest": "sha256:" + "0" * 64, "size": 9, "annotations": annotations, **fields}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_signature_manifests(store: Images, tmp_path: Path, signer: Signer, kind: str) -> None:
    image = small("hostile")
    with Fake() as fake:
        write(tmp_path / "policy.json", REJECT, **{fake.host: signed_by(signer)})
        fake.add(image, "latest")
        fake.manifests[f"{image.digest.replace(':', '-')}.sig"] = (image.media_type, json.dumps(HOSTILE[kind](image)).encode())
        with pytest.raises(Exception, match="no signature found|signature manifest"):
            await store.pull(f"{fake.host}/r")
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "not JSON"),
        ('{"default": [{"type": "signedBy"}]}', "not supported"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/nonexistent/key"}]}', "/nonexistent/key: No such file"),
        ('{"default": [{"type": "sigstoreSigned", "keyData": "eA=="}]}', "key in keyData: not a public key"),
        (None, "No such file"),
    ],
)
def test_a_policy_that_cannot_be_enforced_keeps_the_daemon_from_starting(node: Node, tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "policy.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StartError, match=f"images.signature_policy: .*{why}"):
        Images(tmp_path / "images", config.Images(signature_policy=str(path))).load()
    if text == "{":
        daemon = Daemon(node, extra=f'[images]\nsignature_policy = "{path}"\n')
        process = daemon.spawn()
        try:
            assert process.wait(20) == 1 and "images.signature_policy" in daemon.log.read_text()
        finally:
            daemon.close()


def test_through_the_daemon(node: Node, registry: DockerRegistry, tmp_path: Path, signer: Signer) -> None:
    """The kubelet's sentinel at PullImage and at CreateContainer."""
    policy = tmp_path / "policy.json"
    write(policy, REJECT, **{registry.host: signed_by(signer)})
    image = images.busybox(format="docker")
    ref = registry.push(image, "cluster/app:v1")
    with running(node, extra=f'[images]\nsignature_policy = "{policy}"\n') as daemon:
        pull = v1.PullImageRequest(image=v1.ImageSpec(image=ref))
        with pytest.raises(grpc.RpcError) as caught:
            daemon.images.PullImage(pull, timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNKNOWN and caught.value.details().startswith("SignatureValidationFailed: ")
        cosign.sign(registry, "cluster/app", image.digest, signer)
        image_id = daemon.images.PullImage(pull, timeout=30).image_ref
        pod = daemon.run_pod()
        config = container_config(image_id, "true", pod=pod[1])
        config.image.user_specified_image = ref
        request = v1.CreateContainerRequest(pod_sandbox_id=pod[0], config=config, sandbox_config=pod[1])
        container = daemon.runtime.CreateContainer(request, timeout=30).container_id
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=30)
        shown = small("shown")
        data = registry.push(shown, "cluster/data:v1")
        write(policy, ACCEPT, **{f"{registry.host}/cluster/app": signed_by(signer)})
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=data)), timeout=30)
        write(policy, REJECT, **{registry.host: signed_by(signer)})
        mount = v1.Mount(container_path="/data", readonly=True, image=v1.ImageSpec(image=shown.id, user_specified_image=data))
        with pytest.raises(grpc.RpcError) as caught:
            daemon.create(pod, image_id, "true", mounts=(mount,))
        assert caught.value.details().startswith("SignatureValidationFailed: ") and data in caught.value.details()
        write(policy, REJECT)
        with pytest.raises(grpc.RpcError) as caught:
            daemon.runtime.CreateContainer(request, timeout=30)
        assert caught.value.details().startswith("SignatureValidationFailed: ") and "rejects the image" in caught.value.details()
