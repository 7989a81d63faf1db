"""Pulls by the store itself from real and from lying registries, in the node's network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.errors import CriError, ImageNotFound, InvalidArgument, RegistryUnavailable
from cri.images.auth import Credentials
from cri.images.snapshots import chain_ids
from cri.images.store import Images
from hack import images
from hack.images import Assembled, Layer, assemble, digest_of
from shim.errors import Failure
from tests.daemon.harness import Node
from tests.registry import PASSWORD, USER, Certificate, DockerRegistry, Fake, TokenServer, hosts_toml, inside

pytestmark = pytest.mark.registry
GOOD = Credentials(USER, PASSWORD)


@pytest.fixture(autouse=True)
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    (tmp_path / "certs.d").mkdir()
    return tmp_path / "certs.d"


@pytest.fixture
async def store(tmp_path: Path, certs: Path) -> Any:
    store = Images(tmp_path / "images", config.Images(registry_dir=str(certs), progress_timeout=config.Seconds(3), pinned=("*/pinned:*",)))
    store.load()
    yield store
    await store.close()


def small(text: str = "hello", **options: Any) -> Assembled:
    return assemble([Layer().directory("etc").file("etc/motd", text).finish()], {"Cmd": ["true"]}, **options)


def content(store: Images, ref: str) -> list[str]:
    """The regular files and symlinks of an image, topmost layer's first."""
    image = store.get(ref)
    assert image is not None
    found = []
    for lower in store.snapshots.view(image.chain_ids).lower:
        for directory, _, names in os.walk(lower):
            found += [os.path.relpath(f"{directory}/{n}", lower) for n in names]
    return found


def left_over(store: Images) -> list[str]:
    return [str(p) for name in ("ingest", "containers-rw") for p in (store.root / name).iterdir()]


# -- formats ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["oci", "docker"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_formats(store: Images, registry: DockerRegistry, format: str, compression: str) -> None:
    image = images.busybox(format=format, compression=compression)
    ref = registry.push(image, f"formats/{format}-{compression}")
    pulled = await store.pull(ref)
    assert pulled.id == image.id and pulled.repo_tags == (f"{ref}:latest",) and pulled.repo_digests == (f"{ref}@{image.digest}",)
    assert pulled.size == len(image.manifest) + sum(len(b) for b in image.blobs.values())
    assert pulled.config.cmd == ("sh",) and pulled.architecture == images.ARCHITECTURE
    assert "bin/busybox" in content(store, ref)


async def test_index_gives_this_platform(store: Images, registry: DockerRegistry) -> None:
    index = images.multi()
    ref = registry.push(index, "multi:v1")
    pulled = await store.pull(ref)
    assert pulled.id == index.children[1].id
    assert pulled.repo_digests == (f"{ref.rpartition(':')[0]}@{index.digest}",), "the digest the tag resolves to"
    assert (await store.pull(pulled.repo_digests[0])).id == pulled.id


async def test_an_image_for_other_machines_is_refused(store: Images, registry: DockerRegistry) -> None:
    ref = registry.push(assemble([], architecture="s390x"), "foreign")
    with pytest.raises(Failure, match="linux/s390x, this node is linux/"):
        await store.pull(ref)


@pytest.mark.parametrize("config", [{"Env": ["A=\0"]}, {"User": "\ud800"}, {"Cmd": "sh"}, {"Labels": {"a": 1}}, {"Volumes": 7}, []])
async def test_a_config_that_cannot_be_used_is_refused_before_its_layers(store: Images, config: Any) -> None:
    image = assemble([Layer().file("f", str(config)).finish()], config or {"Entrypoint": {}})
    with Fake() as fake:
        fake.add(image, "latest")
        with pytest.raises(Failure, match=r"read image config: config"):
            await store.pull(f"{fake.host}/r")
        assert not any(image.layers[0].digest in path for _, path, _ in fake.seen)


async def test_120_layers(store: Images, registry: DockerRegistry) -> None:
    image = images.many_layers(120)
    pulled = await store.pull(registry.push(image, "many"))
    recipe = await store.prepare(pulled, "c" * 64)
    assert len(recipe.lower) == 120 + 1, "and what is mounted on, below"
    assert (Path(recipe.lower[0]) / "order").read_text() == "119" and (Path(recipe.lower[-2]) / "bin/busybox").exists()
    assert len(pulled.chain_ids) == 120 and pulled.chain_ids == chain_ids([digest_of_layer(image, n) for n in range(120)])
    await store.release("c" * 64)


def digest_of_layer(image: Assembled, n: int) -> str:
    import gzip

    return digest_of(gzip.decompress(image.blobs[image.layers[n].digest]))


async def test_same_layer_twice_and_no_layer_at_all(store: Images, registry: DockerRegistry) -> None:
    layer = Layer().file("f", "x").finish()
    twice = await store.pull(registry.push(assemble([layer, layer]), "twice"))
    assert len(set(twice.chain_ids)) == 2
    empty = await store.pull(registry.push(assemble([]), "empty"))
    recipe = await store.prepare(empty, "e" * 64)
    assert [Path(lower).parent.name for lower in recipe.lower] == ["empty", "targets"] and empty.size > 0
    await store.release("e" * 64)


async def test_whiteouts_and_opaque_directories_through_overlayfs(store: Images, registry: DockerRegistry, tmp_path: Path) -> None:
    bottom = Layer().directory("d", 0o750, uid=9).file("d/old", "x").directory("o").file("o/old", "x").file("gone", "x").finish()
    top = Layer().file("d/new", "x").whiteout("gone").opaque("o").file("o/new", "x").finish()
    pulled = await store.pull(registry.push(assemble([bottom, top]), "whiteouts"))
    recipe = store.view(pulled)
    merged = tmp_path / "merged"
    merged.mkdir()
    code = """
import os, sys
sys.path.append(sys.argv[1])
from shim.linux import libc, mount
libc.unshare(libc.CLONE_NEWNS)
mount.mount("", "/", "", mount.MS_REC | mount.MS_PRIVATE)
mount.mount("overlay", sys.argv[2], "overlay", mount.MS_RDONLY, "lowerdir=" + sys.argv[3])
os.chdir(sys.argv[2])
print(sorted(os.listdir(".")), sorted(os.listdir("d")), os.listdir("o"), oct(os.stat("d").st_mode), os.stat("d").st_uid)
"""
    here = str(Path(__file__).resolve().parents[2])
    process = await asyncio.create_subprocess_exec(
        *("/usr/bin/env", "python3", "-c", code, here, str(merged), ":".join(recipe.lower)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.decode().strip() == "['d', 'o'] ['new', 'old'] ['new'] 0o40750 9"


# -- names ------------------------------------------------------------------------------------------------------------------


async def test_tags_digests_and_ids(store: Images, registry: DockerRegistry) -> None:
    one, two = small("one"), small("two")
    name = registry.push(one, "names:v1").rpartition(":")[0]
    registry.push(one, "names:same")
    first = await store.pull(f"{name}:v1")
    await store.pull(f"{name}:same")
    by_digest = await store.pull(f"{name}@{one.digest}")
    assert by_digest.repo_tags == (f"{name}:same", f"{name}:v1"), "another name of a known image"
    for ref in (f"{name}:v1", f"{name}@{one.digest}", one.id, one.id[7:], one.id[7:20], f"{name}:v1@{one.digest}"):
        assert (found := store.get(ref)) is not None and found.id == first.id
    for ref in ("busybox", f"{name}:v2", "sha256:" + "0" * 64, "", "!", one.id[7:9]):
        assert store.get(ref) is None

    registry.push(two, "names:v1")
    assert (await store.pull(f"{name}:v1")).id == two.id
    moved = store.get(one.id)
    assert moved is not None and moved.repo_tags == (f"{name}:same",), "a tag is at one image"

    again = Images(store.root, config.Images())
    again.load()
    assert sorted(again.list(), key=lambda i: i.id) == sorted(store.list(), key=lambda i: i.id)


async def test_remove_takes_all_names_and_layers(store: Images, registry: DockerRegistry) -> None:
    shared = Layer().file("shared", "x").finish()
    one = assemble([shared, Layer().file("one", "1").finish()])
    two = assemble([shared, Layer().file("two", "2").finish()])
    ref, other = registry.push(one, "rm-one"), registry.push(two, "rm-two")
    registry.push(one, "rm-one:again")
    pulled = await store.pull(ref)
    await store.pull(f"{ref}:again")
    kept = await store.pull(other)
    await store.prepare(pulled, "a" * 64)
    await store.remove(f"{ref}:again")
    assert store.get(ref) is None and store.get(one.id) is None
    await store.remove(ref)
    lowers = {m.chain_id for m in store.snapshots.all()}
    assert lowers == {*pulled.chain_ids, *kept.chain_ids}, "a container still uses the layers of the removed image"
    with pytest.raises(ImageNotFound):
        await store.prepare(pulled, "b" * 64)
    await store.release("a" * 64)
    await store.release("a" * 64)
    assert {m.chain_id for m in store.snapshots.all()} == set(kept.chain_ids)
    await store.remove(other)
    await store.snapshots.settled()
    assert [p.name for p in (store.root / "snapshots").iterdir()] == ["empty"]
    assert not list((store.root / "documents").iterdir()) and not list((store.root / "trash").iterdir())


async def test_pinned_by_configuration(store: Images, registry: DockerRegistry) -> None:
    assert (await store.pull(registry.push(small(), "some/pinned:1"))).pinned
    assert not (await store.pull(registry.push(small("b"), "some/other:1"))).pinned


async def test_unusable_references(store: Images) -> None:
    for ref in ("", "UPPER", "a" * 64):
        with pytest.raises(InvalidArgument, match=r"image\.image"):
            await store.pull(ref)


# -- sharing ----------------------------------------------------------------------------------------------------------------


async def test_pulls_of_one_image_share_the_work(store: Images) -> None:
    image = images.many_layers(6)
    with Fake() as fake:
        fake.add(image, "latest", "other")
        refs = [f"{fake.host}/r", f"{fake.host}/r", f"{fake.host}/r:other", f"{fake.host}/r@{image.digest}"]
        found = await asyncio.gather(*(store.pull(r) for r in refs))
        assert {i.id for i in found} == {image.id}
        blobs = [path for _, path, _ in fake.seen if "/blobs/" in path]
        assert sorted(blobs) == sorted(set(blobs)), "no blob was fetched twice"
        assert store.get(image.id).repo_tags == (f"{fake.host}/r:latest", f"{fake.host}/r:other")  # type: ignore[union-attr]


async def test_images_share_layers_in_flight(store: Images) -> None:
    base = [Layer().file(f"base{n}", os.urandom(200_000)).finish() for n in range(3)]
    made = [assemble([*base, Layer().file(f"top{n}", "x").finish()]) for n in range(3)]
    with Fake() as fake:
        for n, image in enumerate(made):
            fake.add(image, f"v{n}")
        await asyncio.gather(*(store.pull(f"{fake.host}/r:v{n}") for n in range(3)))
        blobs = [path for _, path, _ in fake.seen if any(d.digest in path for d in made[0].layers[:3])]
        assert len(blobs) == 3
    assert len(list(store.snapshots.all())) == 6


async def test_a_pull_that_fails_hands_its_layers_on(store: Images) -> None:
    """The second image waits for a layer the first one had claimed, and fetches it when the first one fails."""
    base = Layer().file("base", os.urandom(300_000)).finish()
    bad, good = assemble([base, Layer().file("bad", "x").finish()]), assemble([base, Layer().file("good", "x").finish()])
    with Fake() as fake:
        fake.add(bad, "bad")
        fake.add(good, "good")
        fake.blobs[bad.layers[1].digest] = b"something else"
        results = await asyncio.gather(store.pull(f"{fake.host}/r:bad"), store.pull(f"{fake.host}/r:good"), return_exceptions=True)
    assert isinstance(results[0], Exception) and not isinstance(results[1], BaseException)
    assert left_over(store) == []


async def test_pulling_and_removing_at_once(store: Images) -> None:
    """SCENARIOS 24 and 25: whatever the order, what a pull answers is whole, and at the end nothing is left over."""
    image = images.many_layers(3)
    with Fake() as fake:
        fake.add(image, "latest")
        ref = f"{fake.host}/r"

        async def remove() -> None:
            for _ in range(30):
                await store.remove(ref)
                await asyncio.sleep(0.005)

        async def pull() -> None:
            for n in range(4):
                pulled = await store.pull(ref)
                try:
                    recipe = await store.prepare(pulled, f"{id(asyncio.current_task())}-{n}")
                except ImageNotFound:
                    continue
                assert all(os.listdir(lower) for lower in recipe.lower)
                await store.release(f"{id(asyncio.current_task())}-{n}")

        await asyncio.gather(pull(), pull(), remove(), remove())
        await store.pull(ref)
        assert "bin/busybox" in content(store, ref)
    await store.remove(ref)
    for _ in range(300):
        if not store.pulls._background:
            break
        await asyncio.sleep(0.02)
    await store.snapshots.settled()
    assert list(store.snapshots.all()) == [] and left_over(store) == [] and not store.pulls.keep


async def slow(fake: Fake, name: str) -> None:
    while not any(name in path for _, path, _ in fake.seen):
        await asyncio.sleep(0.01)


async def test_cancelled_when_nobody_waits(store: Images) -> None:
    image = small()

    def hang(handler: Any, path: str) -> bool:
        if image.layers[0].digest in path:
            handler.send_response(200)
            handler.send_header("Content-Length", str(image.layers[0].size))
            handler.end_headers()
            handler.wfile.write(b"\x1f")
            handler.wfile.flush()
            handler.rfile.read(1)
        return image.layers[0].digest in path

    with Fake(hook=hang) as fake:
        fake.add(image, "latest")
        ref = f"{fake.host}/r"
        one, two = asyncio.ensure_future(store.pull(ref)), asyncio.ensure_future(store.pull(ref))
        await slow(fake, image.layers[0].digest)
        (progress,) = [p.to_json() for p in store.pulls.progress() if p.layers]
        assert progress["phase"] == "downloading" and progress["layers"][0]["size"] == image.layers[0].size
        one.cancel()
        await asyncio.wait([one])
        assert store.pulls.progress(), "one waiter left"
        two.cancel()
        await asyncio.wait([two])
        for _ in range(200):
            if not store.pulls._background and not left_over(store):
                break
            await asyncio.sleep(0.01)
        assert store.pulls.progress() == [] and left_over(store) == [] and not store.pulls.keep
        fake.hook = None
        assert (await store.pull(ref)).id == image.id, "and it can be pulled again"


# -- access -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dressed(tmp_path: Path, node: Node, **dress: Any) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path / "reg", node.netns, port=5443, **dress) as registry:
        yield registry


async def test_tls_and_basic(store: Images, node: Node, tmp_path: Path, certs: Path) -> None:
    certificate = Certificate.make(tmp_path)
    with dressed(tmp_path, node, tls=certificate, basic=True) as registry:
        ref = registry.push(small(), "private")
        with pytest.raises(CriError, match="certificate"):
            await store.pull(ref, GOOD)
        hosts_toml(certs, registry.host, f'ca = "{certificate.certificate}"\n')
        with pytest.raises(CriError, match=r"HTTP 401 UNAUTHORIZED.*access denied"):
            await store.pull(ref)
        with pytest.raises(CriError) as caught:
            await store.pull(ref, Credentials(USER, "wrong-password"))
        assert "wrong-password" not in str(caught.value) and "access denied" in str(caught.value)
        assert (await store.pull(ref, GOOD)).repo_tags
        hosts_toml(certs, registry.host, "skip_verify = true\n")
        assert (await store.pull(ref, GOOD)).repo_tags


@pytest.mark.parametrize("credentials", [GOOD, Credentials(identity_token=PASSWORD)])
async def test_tokens(store: Images, node: Node, tmp_path: Path, credentials: Credentials) -> None:
    server = TokenServer(tmp_path / "token")
    try:
        with dressed(tmp_path, node, token=server) as registry:
            image = images.many_layers(5)
            ref = registry.push(image, "team/private")
            with pytest.raises(CriError, match=r"token server 127\.0\.0\.1:[0-9]+: HTTP 401"):
                await store.pull(ref)
            server.requests.clear()
            assert (await store.pull(ref, credentials)).id == image.id
            assert [r["scope"] for r in server.requests] == ["repository:team/private:pull"], "one token for all blobs"
            token = server.issue("repository:team/private:pull")
            assert (await store.pull(ref, Credentials(registry_token=token))).id == image.id
    finally:
        server.close()


async def test_credentials_stay_with_their_registry(store: Images, certs: Path) -> None:
    """CVE-2020-15157: neither a redirect, nor a mirror, nor a layer URL in a manifest sees them."""
    image = small()
    expected = GOOD.basic()
    with Fake() as storage, Fake() as mirror, Fake() as origin:
        storage.blobs = dict(image.blobs)

        def private(handler: Any, path: str) -> bool:
            if handler.headers.get("Authorization") != expected:
                handler.reply(401, WWW_Authenticate='Basic realm="x"')
            elif "/blobs/" in path:
                storage.blobs[f"{path.rpartition('/')[2]}?signature=s3"] = image.blobs[path.rpartition("/")[2]]
                handler.reply(307, Location=f"http://{storage.host}{path}?signature=s3")
            else:
                return False
            return True

        origin.add(image, "latest")
        origin.hook = private
        mirror.hook = lambda handler, path: handler.reply(401, WWW_Authenticate='Basic realm="x"') or True
        hosts_toml(
            certs,
            "reg.example",
            f'server = "http://{origin.host}"\n[host."http://{mirror.host}"]\n[host."http://{mirror.host}".header]\nx-secret = "header"\n',
        )
        assert (await store.pull("reg.example/r", GOOD)).id == image.id
        assert mirror.seen and storage.seen
        for _, _, headers in [*storage.seen, *mirror.seen]:
            assert "Authorization" not in headers
        for _, _, headers in storage.seen:
            assert "x-secret" not in {k.lower() for k in headers}


async def test_http_proxy_of_the_environment(store: Images, certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = small()
    with Fake() as proxy:
        proxy.add(image, "latest")
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        monkeypatch.setenv("no_proxy", "direct.example")
        hosts_toml(certs, "reg.example", 'server = "http://reg.example"\n')
        assert (await store.pull("reg.example/r")).id == image.id
        assert all(path.startswith("http://reg.example/v2/r/") for _, path, _ in proxy.seen)
        seen = len(proxy.seen)
        proxy.add(image, "direct")
        assert (await store.pull(f"{proxy.host}/r:direct")).id == image.id, "never to this machine's own loopback"
        assert all(path.startswith("/v2/") for _, path, _ in proxy.seen[seen:])


# -- failures ---------------------------------------------------------------------------------------------------------------


async def test_missing_images_and_absent_registries(store: Images, registry: DockerRegistry, certs: Path) -> None:
    with pytest.raises(ImageNotFound, match=r"nothing:v1: manifest v1: .*HTTP 404 MANIFEST_UNKNOWN"):
        await store.pull(f"{registry.host}/nothing:v1")
    hosts_toml(certs, "gone.example", 'server = "http://127.0.0.1:3"\n[host."http://127.0.0.1:1"]\n[host."http://127.0.0.1:2"]\n')
    with pytest.raises(RegistryUnavailable) as caught:
        await store.pull("gone.example/app")
    text = str(caught.value)
    assert text.startswith("RegistryUnavailable: ")
    assert all(f"http://127.0.0.1:{port}/v2: connect: " in text for port in (1, 2, 3))


async def test_a_mirror_that_is_down_is_passed_over(store: Images, registry: DockerRegistry, certs: Path) -> None:
    registry.push(small(), "mirrored")
    hosts_toml(certs, "reg.example", f'[host."http://127.0.0.1:1"]\n[host."http://{registry.host}"]\n')
    assert (await store.pull("reg.example/mirrored")).repo_tags == ("reg.example/mirrored:latest",)


@pytest.mark.parametrize("kind", ["other bytes", "short", "long", "not an archive"])
async def test_a_registry_that_lies_about_a_layer(store: Images, certs: Path, kind: str) -> None:
    image = images.busybox(compression="gzip")
    digest, size = image.layers[0].digest, image.layers[0].size
    honest = image.blobs[digest]
    lies = {
        "other bytes": honest[:-40] + bytes(40),
        "short": honest[: size // 2],
        "long": honest + b"more",
        "not an archive": os.urandom(size),
    }
    with Fake() as liar, Fake() as honest_registry:
        liar.add(image, "latest")
        honest_registry.add(image, "latest")
        liar.blobs[digest] = lies[kind]
        with pytest.raises(CriError) as caught:
            await store.pull(f"{liar.host}/r")
        assert liar.host in str(caught.value) and "blob" in str(caught.value)
        assert list(store.list()) == [] and left_over(store) == [] and list(store.snapshots.all()) == []
        hosts_toml(certs, "reg.example", f'[host."http://{liar.host}"]\n[host."http://{honest_registry.host}"]\n')
        assert (await store.pull("reg.example/r")).id == image.id, "another endpoint has the right bytes"


async def test_a_layer_that_is_not_what_the_config_says(store: Images) -> None:
    import json

    image = small()
    config_digest = next(d for d in image.blobs if d not in {x.digest for x in image.layers})
    document = json.loads(image.blobs[config_digest])
    document["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    body = json.dumps(document).encode()
    manifest = json.loads(image.manifest)
    manifest["config"].update(digest=digest_of(body), size=len(body))
    forged = Assembled(image.media_type, json.dumps(manifest).encode(), {**image.blobs, digest_of(body): body})
    with Fake() as fake:
        fake.add(forged, "latest")
        with pytest.raises(Failure, match="config says sha256:0000"):
            await store.pull(f"{fake.host}/r")
    assert left_over(store) == []


async def test_lies_about_manifests(store: Images) -> None:
    image = small()
    with Fake() as fake:
        fake.add(image, "latest")
        other = small("other")
        fake.manifests[image.digest] = (other.media_type, other.manifest)
        with pytest.raises(CriError, match=f"served a manifest with digest {other.digest}"):
            await store.pull(f"{fake.host}/r@{image.digest}")
        fake.manifests["big"] = (image.media_type, b" " * (5 << 20))
        with pytest.raises(CriError, match="sent more than"):
            await store.pull(f"{fake.host}/r:big")
        fake.manifests["index"] = ("application/vnd.oci.image.index.v1+json", image.manifest)
        with pytest.raises(Failure, match="served as"):
            await store.pull(f"{fake.host}/r:index")


async def test_a_cut_connection_goes_on_where_it_stopped(store: Images) -> None:
    layer = Layer().file("random", os.urandom(3 << 20)).finish()
    image = assemble([layer])
    digest, size = image.layers[0].digest, image.layers[0].size
    cuts = 3
    ranges: list[str | None] = []

    def cut(handler: Any, path: str) -> bool:
        nonlocal cuts
        if digest not in path:
            return False
        ranges.append(handler.headers.get("Range"))
        if cuts == 0:
            return False
        cuts -= 1
        start = int((ranges[-1] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(size - start))
        handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        handler.end_headers()
        handler.wfile.write(image.blobs[digest][start : start + (size // 5)])
        handler.wfile.flush()
        handler.connection.shutdown(2)
        return True

    with Fake(hook=cut) as fake:
        fake.add(image, "latest")
        await store.pull(f"{fake.host}/r")
    assert ranges[0] is None and all(r and r.startswith("bytes=") for r in ranges[1:]) and len(ranges) == 4
    starts = [int(r[6:-1]) for r in ranges[1:] if r]
    assert starts == sorted(starts) and starts[-1] > size // 2


async def test_a_busy_registry_is_asked_again(store: Images) -> None:
    image = small()
    answers = {"manifests": [503, 429], "blobs": [502]}

    def busy(handler: Any, path: str) -> bool:
        pending = answers["manifests" if "/manifests/" in path else "blobs"]
        if not pending:
            return False
        handler.reply(pending.pop(), Retry_After="0")
        return True

    with Fake(hook=busy) as fake:
        fake.add(image, "latest")
        assert (await store.pull(f"{fake.host}/r")).id == image.id
        answers["manifests"] = [500] * 9
        with pytest.raises(RegistryUnavailable, match="HTTP 500"):
            await store.pull(f"{fake.host}/r")
        assert len(answers["manifests"]) == 6, "three tries, then it is said"


async def test_no_progress_is_noticed(store: Images) -> None:
    image = small()

    def stall(handler: Any, path: str) -> bool:
        if image.layers[0].digest in path:
            handler.send_response(200)
            handler.send_header("Content-Length", str(image.layers[0].size))
            handler.end_headers()
            handler.rfile.read(1)
            return True
        return False

    with Fake(hook=stall) as fake:
        fake.add(image, "latest")
        started = asyncio.get_running_loop().time()
        with pytest.raises(RegistryUnavailable, match="no progress for 3 s"):
            await store.pull(f"{fake.host}/r")
        assert asyncio.get_running_loop().time() - started < 8
    assert left_over(store) == []


async def test_a_disk_that_is_full_is_named_and_recovered_from(store: Images, registry: DockerRegistry, tmp_path: Path) -> None:
    """On a small tmpfs of its own."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    ref = registry.push(assemble([Layer().file("big", os.urandom(8 << 20)).finish()]), "big")
    tiny = registry.push(small(), "tiny")
    assert os.system(f"mount -t tmpfs -o size=6m,mode=700 tmpfs {mountpoint}") == 0
    try:
        full = Images(mountpoint / "images", config.Images())
        full.load()
        with pytest.raises(Failure, match="ENOSPC"):
            await full.pull(ref)
        await full.snapshots.settled()
        assert left_over(full) == []
        assert (await full.pull(tiny)).id
        await full.close()
    finally:
        os.system(f"umount -l {mountpoint}")


# -- the store itself -------------------------------------------------------------------------------------------------------


async def test_usage_and_modes(store: Images, registry: DockerRegistry) -> None:
    before = await store.fs_info()
    image = assemble([Layer().file("data", os.urandom(2 << 20)).finish()])
    pulled = await store.pull(registry.push(image, "usage"))
    after = await store.fs_info()
    assert 2 << 20 <= after.images.bytes - before.images.bytes < 3 << 20 and after.images.inodes > before.images.inodes
    recipe = await store.prepare(pulled, "d" * 64)
    (Path(recipe.upper) / "written").write_bytes(b"x" * 100_000)
    used, inodes = await store.usage("d" * 64)
    assert used >= 100_000 and inodes == 2
    assert (await store.fs_info()).containers.inodes >= 2
    assert await store.usage("unknown") == (0, 0)
    for directory in (store.root, *(p for p in store.root.iterdir())):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in (store.root / "records").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await store.release("d" * 64)


async def test_becomes_durable_in_the_background(store: Images, registry: DockerRegistry) -> None:
    await store.pull(registry.push(small("durable"), "durable"))
    for _ in range(500):
        if not store.snapshots.not_durable():
            break
        await asyncio.sleep(0.02)
    assert store.snapshots.not_durable() == ()


async def test_a_record_that_lost_something_is_dropped(store: Images, registry: DockerRegistry) -> None:
    refs = [registry.push(small(f"lost {n}"), f"lost{n}") for n in range(4)]
    made = [await store.pull(r) for r in refs]
    (store.root / "documents" / made[0].manifest_digest[7:]).unlink()
    (store.root / "snapshots" / made[1].chain_ids[0][7:]).rename(store.root / "ingest" / "x")
    (store.root / "records" / f"{made[2].id[7:]}.json").write_bytes(b'{"image"')
    again = Images(store.root, config.Images())
    again.load()
    assert [i.id for i in again.list()] == [made[3].id]
    assert {m.chain_id for m in again.snapshots.all()} == set(made[3].chain_ids)
    await again.close()


async def test_tls_is_tried_once_where_there_is_none(store: Images) -> None:
    """A registry on the loopback without a configuration: HTTPS first, and what was found out then holds for the rest of the pull."""
    image = images.many_layers(4)
    with Fake() as fake:
        fake.add(image, "latest")
        accepted = fake._server.get_request
        count = 0

        def counted() -> Any:
            nonlocal count
            count += 1
            return accepted()

        fake._server.get_request = counted  # type: ignore[method-assign]
        assert (await store.pull(f"{fake.host}/r")).id == image.id
    assert len(fake.seen) == 6 and count <= 5, "a failed handshake, and at most one connection for each of what is fetched at once"


async def test_a_helper_that_died_is_replaced(store: Images, registry: DockerRegistry) -> None:
    first, second = (registry.push(small(f"helper-{n}"), f"helper-{n}") for n in range(2))
    await store.pull(first)
    async with store.pulls._helper.lease() as unpacker:
        os.kill(unpacker._process.pid, 9)
        await unpacker._process.wait()
    assert (await store.pull(second)).id
