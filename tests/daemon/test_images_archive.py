"""Import and export: round trips, skopeo and umoci of Debian, hostile archives, the commands."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri import config
from cri.errors import CriError, InvalidArgument, SignatureValidationFailed
from cri.images import export
from cri.images.importing import import_images
from cri.images.store import Images
from hack import images
from hack.images import Assembled, Layer, assemble
from shim.errors import Failure
from tests.daemon.harness import Node, running
from tests.registry import DockerRegistry, inside

pytestmark = pytest.mark.registry


@pytest.fixture
def in_node(node: Node) -> Iterator[None]:
    with inside(node.netns):
        yield


@pytest.fixture
async def stores(tmp_path: Path, in_node: None) -> Any:
    """A function that makes stores."""
    made = []

    def make(name: str, **settings: Any) -> Images:
        store = Images(tmp_path / name, config.Images(registry_dir=str(tmp_path), **settings))
        store.load()
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


def rich() -> Assembled:
    """Everything a layer can hold."""
    capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".decode("utf-8", "surrogateescape")
    bottom = Layer().directory("bin").directory("etc", 0o750, uid=7, gid=8).file("etc/old", "x").file("gone", "x")
    bottom.directory("replaced").file("replaced/below", "x")
    top = Layer().file("bin/tool", "tool" * 3000, 0o4755, pax_headers={"SCHILY.xattr.security.capability": capability})
    top.hardlink("bin/same", "bin/tool").symlink("bin/link", "../bin/tool").file("etc/new", "new", pax_headers={"mtime": "1700000001.25"})
    top.whiteout("gone").opaque("replaced").file("replaced/above", "y", pax_headers={"SCHILY.xattr.user.note": "here"})
    top.entry("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666).entry("run/fifo", tarfile.FIFOTYPE)
    top.file("na\udcefve", "latin").file("old", "x", pax_headers={"mtime": "-1.5"}).file("long/" + "d" * 200 + "/" + "f" * 120, "x")
    return assemble([bottom.finish(), top.finish()], {"Cmd": ["/bin/tool"], "Env": ["A=ü"]})


def tree(directory: str) -> dict[str, tuple[Any, ...]]:
    """Everything about a layer as it lies on the disk, but when directories nobody spoke of were made."""
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, str] = {}
    for parent, directories, files in sorted(os.walk(directory)):
        for name in sorted([".", *files, *(d for d in directories if os.path.islink(f"{parent}/{d}"))]):
            path = os.path.normpath(f"{parent}/{name}")
            facts = os.lstat(path)
            kind = stat.S_IFMT(facts.st_mode)
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if kind == stat.S_IFREG else ""
            content = os.readlink(path) if kind == stat.S_IFLNK else content
            names = [] if kind == stat.S_IFCHR and not facts.st_rdev else sorted(os.listxattr(path, follow_symlinks=False))
            attributes = {n: os.getxattr(path, n, follow_symlinks=False) for n in names}
            link = inodes.setdefault(facts.st_ino, path) if kind == stat.S_IFREG else ""
            whiteout = kind == stat.S_IFCHR and not facts.st_rdev
            mtime = 0 if whiteout else facts.st_mtime_ns
            where = os.path.relpath(path, directory)
            same = os.path.relpath(link, directory) if link else ""
            found[where] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, facts.st_rdev, mtime, content, attributes, same)
    return found


def trees(store: Images, ref: str) -> list[dict[str, tuple[Any, ...]]]:
    image = store.get(ref)
    assert image is not None
    return [tree(lower) for lower in store.view(image).lower]


def write(store: Images, ref: str, target: Path, format: export.Format, compression: export.Compression = "gzip") -> export.Exported:
    image = store.get(ref)
    assert image is not None
    info = store.details(image)
    return export.export(
        target, format, compression, Path(info["configPath"]).read_bytes(), list(reversed(info["snapshots"])), image.repo_tags
    )


@pytest.mark.parametrize(
    "format, compression",
    [("oci-archive", "gzip"), ("oci-archive", "none"), ("oci-dir", "zstd"), ("docker-archive", "none")],
)
async def test_round_trip(
    stores: Callable[..., Images], registry: DockerRegistry, tmp_path: Path, format: export.Format, compression: export.Compression
) -> None:
    first, second = stores("first"), stores("second")
    ref = registry.push(rich(), "rich:v1")
    pulled = await first.pull(ref)
    made = write(first, ref, tmp_path / "one", format, compression)
    ((image, names),) = await import_images(second, str(tmp_path / "one"), "")
    assert image.id == made.id != pulled.id and names == (ref,) == image.repo_tags
    assert image.config == pulled.config
    assert image.repo_digests == ((f"{ref.rpartition(':')[0]}@{made.digest}",) if format != "docker-archive" else ())
    before, after = trees(first, ref), trees(second, ref)
    assert after == before
    capability = before[0]["bin/tool"][6]["security.capability"]
    assert capability and before[0]["bin/same"][7] == "bin/same" and before[0]["bin/tool"][7] == "bin/same"
    assert before[0]["replaced"][6]["trusted.overlay.opaque"] == b"y" and before[0]["etc/new"][4] == 1700000001_250000000

    again = write(second, ref, tmp_path / "two", format, compression)
    assert again == made, "from now on nothing changes"
    if format == "oci-dir":
        assert subprocess.run(["diff", "-r", tmp_path / "one", tmp_path / "two"], check=False).returncode == 0
    else:
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(FileExistsError):
        write(second, ref, tmp_path / "two", format, compression)
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


async def test_what_skopeo_and_umoci_write_and_read(
    stores: Callable[..., Images], registry: DockerRegistry, tmp_path: Path, node: Node
) -> None:
    if not shutil.which("skopeo") or not shutil.which("umoci"):
        pytest.skip("skopeo and umoci are not installed")
    store, source = stores("store"), registry.push(rich(), "theirs:v1")
    pulled = await store.pull(source)

    def skopeo(*command: str) -> str:
        argv = node.command("skopeo", "--insecure-policy", *command)
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for kind, name in (("oci", "layout"), ("oci-archive", "layout.tar"), ("docker-archive", "docker.tar")):
        target = tmp_path / name
        skopeo("copy", "--src-tls-verify=false", f"docker://{source}", f"{kind}:{target}:name.example/app:{name.replace('.', '-')}")
        other = stores(f"from-{kind}")
        ((image, names),) = await import_images(other, str(target), "")
        assert names == (f"name.example/app:{name.replace('.', '-')}",)
        assert image.id == pulled.id or kind == "docker-archive"
        assert trees(other, image.id)[0]["bin/tool"] == trees(store, pulled.id)[0]["bin/tool"]
        # and the other way round
        made = write(other, image.id, tmp_path / f"ours-{name}", "docker-archive" if kind == "docker-archive" else "oci-archive")
        theirs = "docker-archive" if kind == "docker-archive" else "oci-archive"
        assert json.loads(skopeo("inspect", "--config", f"{theirs}:{tmp_path}/ours-{name}"))["config"]["Cmd"] == ["/bin/tool"]
        skopeo("copy", f"{theirs}:{tmp_path}/ours-{name}", f"oci:{tmp_path}/again-{name}:v1")
        manifest = json.loads(skopeo("inspect", "--raw", f"oci:{tmp_path}/again-{name}:v1"))
        assert manifest["config"]["digest"] == made.id or kind == "docker-archive"
        unpacked = tmp_path / f"unpacked-{name}"
        subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/again-{name}:v1", unpacked], check=True, capture_output=True, timeout=60)
        root = unpacked / "rootfs"
        assert not (root / "gone").exists() and os.listdir(root / "replaced") == ["above"]
        assert (root / "bin/tool").stat().st_ino == (root / "bin/same").stat().st_ino
        assert stat.S_IMODE((root / "bin/tool").stat().st_mode) == 0o4755 and os.getxattr(root / "bin/tool", "security.capability")
        assert (root / "etc/new").stat().st_mtime_ns == 1700000001_250000000

    layout = tmp_path / "umoci"
    subprocess.run(["umoci", "init", "--layout", layout], check=True, capture_output=True, timeout=30)
    subprocess.run(["umoci", "new", "--image", f"{layout}:empty"], check=True, capture_output=True, timeout=30)
    ((image, names),) = await import_images(store, str(layout), "name.example/empty")
    assert names == ("name.example/empty:empty",) and not image.chain_ids


def docker_archive(entries: list[dict[str, Any]], files: dict[str, bytes | str]) -> bytes:
    """A str is a symlink."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {"manifest.json": json.dumps(entries).encode(), **files}.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def image_config(*layers: bytes) -> bytes:
    diffs = [images.digest_of(layer) for layer in layers]
    return json.dumps({"architecture": images.ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diffs}}).encode()


async def test_docker_archives_of_all_ages(stores: Callable[..., Images], tmp_path: Path) -> None:
    one, two = Layer().file("one", "1").finish(), Layer().file("two", "2").finish()
    entries = [
        {"Config": "a.json", "RepoTags": ["app:1", "reg.example/app:one"], "Layers": ["x/layer.tar", "y/layer.tar", "z/layer.tar"]},
        {"Config": "b.json", "RepoTags": None, "Layers": ["two.tar.gz"]},
    ]
    files: dict[str, bytes | str] = {
        "a.json": image_config(one, two, one),
        "b.json": image_config(two),
        "./x/layer.tar": one,
        "y/layer.tar": two,
        "z/layer.tar": "../x/layer.tar",  # docker save, of a layer that is there twice
        "two.tar.gz": gzip.compress(two),
    }
    data = docker_archive(entries, files)
    for name, body in (("plain.tar", data), ("packed.tar.gz", gzip.compress(data)), ("packed.tar.zst", images.compress(data, "zstd"))):
        (tmp_path / name).write_bytes(body)
        store = stores(f"store-{name}")
        (first, names), (second, none) = await import_images(store, str(tmp_path / name), "")
        assert names == ("docker.io/library/app:1", "reg.example/app:one") and not none
        assert store.get("app:1") == first == store.get("reg.example/app:one") and len(first.chain_ids) == 3
        assert second.repo_tags == () and store.get(second.id) is not None and first.repo_digests == ()
        assert (Path(store.view(second).lower[0]) / "two").read_text() == "2"
        assert not [p for p in store.root.iterdir() if p.is_file()], "no spool stays"
    store = stores("named")
    with pytest.raises(InvalidArgument, match="one name for 2 images"):
        await import_images(store, str(tmp_path / "plain.tar"), "reg.example/mine:v1")
    named = await import_images(store, str(tmp_path / "plain.tar"), "reg.example/mine")
    assert [names for _, names in named] == [("reg.example/mine:1", "reg.example/mine:one"), ("reg.example/mine:latest",)]


async def test_an_image_for_several_platforms(stores: Callable[..., Images], tmp_path: Path) -> None:
    index = images.multi()
    layout(tmp_path / "multi", index.children, [index], "reg.example/multi:v1")
    ((image, names),) = await import_images(stores("store"), str(tmp_path / "multi"), "")
    assert image.id == index.children[1].id and names == ("reg.example/multi:v1",)
    assert image.repo_digests == (f"reg.example/multi@{index.digest}",)


def layout(directory: Path, content: tuple[Assembled, ...], top: list[Assembled], name: str = "") -> Path:
    (directory / "blobs/sha256").mkdir(parents=True)
    for one in (*content, *top):
        for digest, body in {**one.blobs, one.digest: one.manifest}.items():
            (directory / "blobs" / digest.replace(":", "/")).write_bytes(body)
    annotations = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
    entries = [{**one.descriptor().to_json(), **annotations} for one in top]
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return directory


def _swap(directory: Path, digest: str, data: bytes) -> None:
    (directory / "blobs" / digest.replace(":", "/")).write_bytes(data)


def _link(directory: Path, digest: str, target: str) -> None:
    path = directory / "blobs" / digest.replace(":", "/")
    path.unlink()
    path.symlink_to(target)


def _fifo(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)


GOOD = assemble([Layer().file("f", "content").finish()], compression="none")
LAYER, CONFIG = GOOD.layers[0].digest, GOOD.id
LAYOUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another layer": (lambda d: _swap(d, LAYER, Layer().file("f", "swapped").finish()), "another digest"),
    "a longer layer": (lambda d: _swap(d, LAYER, GOOD.blobs[LAYER] + b"more"), "more than"),
    "a shorter layer": (lambda d: _swap(d, LAYER, GOOD.blobs[LAYER][:-512]), "early"),
    "another config": (lambda d: _swap(d, CONFIG, b"{}"), "another digest"),
    "another manifest": (lambda d: _swap(d, GOOD.digest, b"{}"), "another digest"),
    "a layer that is a link out": (lambda d: _link(d, LAYER, "/etc/passwd"), "ELOOP|EXDEV"),
    "a blob directory that is a link out": (lambda d: ((d / "blobs").rename(d / "b"), (d / "blobs").symlink_to("b")), "ELOOP"),
    "a fifo": (lambda d: _fifo(d, "index.json"), "not a regular file"),
    "no blobs": (lambda d: shutil.rmtree(d / "blobs"), "is not in it"),
    "no index": (lambda d: (d / "index.json").unlink(), "neither index.json"),
    "a huge index": (lambda d: (d / "index.json").write_bytes(b" " * (5 << 20)), "limit"),
    "an index of nothing": (lambda d: (d / "index.json").write_text('{"schemaVersion": 2, "manifests": []}'), "no image in it"),
    "not JSON": (lambda d: (d / "index.json").write_text("{"), "not JSON"),
    "a digest that is a path": (
        lambda d: (d / "index.json").write_text((d / "index.json").read_text().replace(GOOD.digest[7:], "../../../etc/passwd")),
        "not a digest",
    ),
    "a bad name": (lambda d: (d / "index.json").write_text((d / "index.json").read_text().replace("a.b/c", "../c")), "name of an image"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
async def test_hostile_layouts(stores: Callable[..., Images], tmp_path: Path, kind: str) -> None:
    damage, why = LAYOUTS[kind]
    directory = layout(tmp_path / "layout", (), [GOOD], "a.b/c:v1")
    store = stores("store")
    damage(directory)
    with pytest.raises((Failure, CriError), match=why):
        await asyncio.wait_for(import_images(store, str(directory), ""), 20)
    assert list(store.list()) == [] and list(store.snapshots.all()) == [] and not store.pulls.keep


def _docker(**fields: Any) -> bytes:
    layer = Layer().file("f", "x").finish()
    entry = {"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["layer.tar"], **fields}
    return docker_archive([entry], {"c.json": image_config(layer), "layer.tar": layer, "loop": "loop", "out": "../../../../etc/passwd"})


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a path out": (lambda: _docker(Layers=["../../../../../../etc/passwd"]), "is not in it"),
    "an absolute path": (lambda: _docker(Layers=["/etc/passwd"]), "is not in it"),
    "a link out": (lambda: _docker(Layers=["out"]), "is not in it"),
    "a link to itself": (lambda: _docker(Layers=["loop"]), "is not in it"),
    "a layer too many": (lambda: _docker(Layers=["layer.tar", "layer.tar"]), "1 diff ids for 2 layers"),
    "a layer that is something else": (lambda: _docker(Layers=["c.json"]), "another digest"),
    "a wrong type": (lambda: _docker(Layers="layer.tar"), r"manifest.json\[0\].Layers"),
    "no config": (lambda: _docker(Config=None), r"manifest.json\[0\].Config"),
    "a NUL": (lambda: _docker(Config="c\0"), "name with NUL"),
    "a surrogate": (lambda: _docker(Layers=["\ud800"]), "lone surrogate"),
    "a bad name": (lambda: _docker(RepoTags=["A/B/"]), "name of an image"),
    "cut short": (lambda: _docker()[:1500], "ends inside"),
    "not an archive": (lambda: b"x" * 4096, "not octal"),
    "empty": (lambda: b"", "neither index.json"),
    "a packed one cut short": (lambda: gzip.compress(_docker())[:-20], "cannot be decompressed"),
    "not really packed": (lambda: b"\x28\xb5\x2f\xfd" + b"x" * 100, "cannot be decompressed"),
    "a deep list": (lambda: docker_archive([], {"manifest.json": b"[" * 100_000}), "not JSON"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
async def test_hostile_archives(stores: Callable[..., Images], tmp_path: Path, kind: str) -> None:
    make, why = ARCHIVES[kind]
    (tmp_path / "archive.tar").write_bytes(make())
    store = stores("store")
    with pytest.raises((Failure, CriError), match=why):
        await asyncio.wait_for(import_images(store, str(tmp_path / "archive.tar"), ""), 20)
    assert list(store.list()) == [] and list(store.snapshots.all()) == [] and not store.pulls.keep
    for path, message in (("relative", "not an absolute path"), (str(tmp_path / "absent"), "ENOENT"), ("/dev/zero", "neither a regular")):
        with pytest.raises((Failure, CriError), match=message):
            await import_images(store, path, "")


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
async def test_an_import_that_nobody_waits_for(stores: Callable[..., Images], tmp_path: Path, after: float) -> None:
    """The client goes away: files are closed, nothing is left over, and it can be done again."""
    image = assemble([Layer().file("f", os.urandom(8 << 20)).finish(), Layer().file("g", os.urandom(1 << 20)).finish()], compression="none")
    directory = layout(tmp_path / "layout", (), [image], "a.b/c:v1")
    store = stores("store")
    before = _files_below(directory)
    task = asyncio.ensure_future(import_images(store, str(directory), ""))
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.wait([task])
    for _ in range(500):
        if not store.pulls._background and _files_below(directory) == before and not list((store.root / "ingest").iterdir()):
            break
        await asyncio.sleep(0.02)
    assert _files_below(directory) == before == [] and not store.pulls.keep
    assert not list((store.root / "ingest").iterdir()) and not list((store.root / "partials").iterdir())
    ((found, _),) = await import_images(store, str(directory), "")
    assert found.id == image.id and _files_below(directory) == []


def _files_below(directory: Path) -> list[str]:
    """What this process has open there."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(str(directory)):
            found.append(target)
    return found


async def test_an_import_that_fails_keeps_nothing(stores: Callable[..., Images], tmp_path: Path) -> None:
    image = assemble([Layer().file("f", "first").finish(), Layer().file("g", "second").finish()], compression="none")
    directory = layout(tmp_path / "layout", (), [image], "a.b/c:v1")
    _swap(directory, image.layers[1].digest, Layer().file("g", "other!").finish())
    store = stores("store")
    with pytest.raises(Failure, match="another digest"):
        await import_images(store, str(directory), "")
    assert list(store.snapshots.all()) == []
    await store.snapshots.settled()
    assert [p.name for p in (store.root / "snapshots").iterdir()] == ["empty"]


async def test_a_policy_counts_for_archives_too(stores: Callable[..., Images], tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    accept = [{"type": "insecureAcceptAnything"}]
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": {"good.example": accept}}}))
    store = stores("store", signature_policy=str(policy))
    directory = layout(tmp_path / "layout", (), [GOOD], "bad.example/c:v1")
    with pytest.raises(SignatureValidationFailed, match="bad.example/c:v1"):
        await import_images(store, str(directory), "")
    ((image, names),) = await import_images(store, str(directory), "good.example/c")
    assert names == ("good.example/c:v1",)
    store.require_trusted(image, image.id)


def test_the_commands(node: Node, registry: DockerRegistry, tmp_path: Path) -> None:
    """Export, remove, import, run: a node without a registry."""
    with running(node) as daemon:

        def command(*arguments: str, code: int = 0) -> str:
            argv = [sys.executable, "-m", "cri.cli", "image", arguments[0], "--socket", str(daemon.socket), *arguments[1:]]
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        from protos.runtime.v1 import api_pb2 as v1

        ref = registry.push(images.busybox(), "commands/busybox:v1")
        image_id = daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=ref)), timeout=30).image_ref
        listed = command("ls")
        assert ref.rpartition(":")[0] in listed and "v1" in listed and image_id[7:19] in listed and "MB" in listed
        assert command("ls", "-q").split() == [image_id]
        (shown,) = json.loads(command("inspect", ref))
        assert shown["status"]["id"] == image_id and shown["info"]["imageSpec"]["config"]["Cmd"] == ["sh"]
        made = command("export", ref, str(tmp_path / "busybox.tar")).strip()
        assert "exists already" in command("export", ref, str(tmp_path / "busybox.tar"), code=1)
        assert command("rm", ref).strip() == ref and command("ls", "-q") == ""
        assert "is not on this node" in command("rm", ref, code=1)
        assert "no such file" in command("import", str(tmp_path / "absent"), code=1)
        assert "another digest" in command("import", str(_broken(tmp_path)), code=1)
        assert command("import", str(tmp_path / "busybox.tar")) == f"{made} {ref}\n"
        assert command("import", "--name", "local/box", str(tmp_path / "busybox.tar")) == f"{made} docker.io/local/box:v1\n"
        pod = daemon.run_pod()
        container = daemon.run(pod, "local/box:v1", "echo", "imported")
        daemon.wait_exit(container)
        assert "imported" in daemon.log_text(container)


def _broken(tmp_path: Path) -> Path:
    directory = layout(tmp_path / "broken", (), [GOOD])
    _swap(directory, GOOD.digest, b"{}")
    return directory
