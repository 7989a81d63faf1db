#!/usr/bin/env python3
"""Assembles small runtime images from the host's static busybox and pushes them to a registry. Stdlib (+ zstandard for zstd layers).

    hack/images.py push --registry 127.0.0.1:5000 [--https] [NAME…]     NAME of the catalogue below; default busybox
    hack/images.py list

Everything is deterministic: the same input gives the same digests, and blobs the registry has are not sent again. Tests import
``Layer``, ``assemble``, ``index`` and ``push``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import io
import json
import platform
import random
import ssl
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

BUSYBOX = Path("/bin/busybox")
EPOCH = 1_700_000_000
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
APPLETS = (
    "sh ash cat ls cp mv rm mkdir rmdir ln chmod chown echo printf true false sleep date id whoami hostname uname env pwd ps top kill "
    "killall pgrep pkill grep sed awk cut head tail sort uniq wc tr tee xargs find stat touch dd df du free mount umount ip ifconfig "
    "route ping nc netstat wget nslookup httpd vi test expr seq yes timeout nproc nice renice readlink realpath basename dirname sync "
    "mknod mkfifo mktemp md5sum sha256sum base64 hexdump od strings tar gzip gunzip zcat su login passwd adduser stty tty watch usleep "
    "setsid nohup sysctl dmesg lsof fuser ionice taskset unshare nsenter chroot stdbuf time trap cmp diff"
)
Format = Literal["oci", "docker"]
Compression = Literal["gzip", "zstd", "none"]

_TYPES: dict[str, dict[str, str]] = {
    "oci": {
        "manifest": "application/vnd.oci.image.manifest.v1+json",
        "index": "application/vnd.oci.image.index.v1+json",
        "config": "application/vnd.oci.image.config.v1+json",
        "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
        "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
        "none": "application/vnd.oci.image.layer.v1.tar",
    },
    "docker": {
        "manifest": "application/vnd.docker.distribution.manifest.v2+json",
        "index": "application/vnd.docker.distribution.manifest.list.v2+json",
        "config": "application/vnd.docker.container.image.v1+json",
        "gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "zstd": "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "none": "application/vnd.docker.image.rootfs.diff.tar",
    },
}


class Layer:
    """A layer archive being written. Methods return the layer, for chaining; paths are relative, as in real layers."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    def entry(self, name: str, kind: bytes, data: bytes = b"", **facts: Any) -> Layer:
        """Any member. ``facts`` are TarInfo attributes (mode, uid, gid, mtime, linkname, devmajor, pax_headers …)."""
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mtime, info.mode = kind, len(data), EPOCH, 0o644
        for key, value in facts.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def directory(self, name: str, mode: int = 0o755, **facts: Any) -> Layer:
        return self.entry(name, tarfile.DIRTYPE, mode=mode, **facts)

    def file(self, name: str, data: bytes | str = b"", mode: int = 0o644, **facts: Any) -> Layer:
        return self.entry(name, tarfile.REGTYPE, data.encode() if isinstance(data, str) else data, mode=mode, **facts)

    def symlink(self, name: str, target: str, **facts: Any) -> Layer:
        return self.entry(name, tarfile.SYMTYPE, linkname=target, mode=0o777, **facts)

    def hardlink(self, name: str, target: str) -> Layer:
        return self.entry(name, tarfile.LNKTYPE, linkname=target)

    def whiteout(self, name: str) -> Layer:
        directory, slash, base = name.rpartition("/")
        return self.file(f"{directory}{slash}.wh.{base}")

    def opaque(self, name: str) -> Layer:
        return self.file(f"{name}/.wh..wh..opq")

    def finish(self) -> bytes:
        """The archive."""
        self._tar.close()
        return self._buffer.getvalue()


@dataclass(frozen=True)
class Descriptor:
    media_type: str
    digest: str
    size: int

    def to_json(self, **more: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **more}


@dataclass(frozen=True)
class Assembled:
    """A manifest (or index) with all it refers to. ``id`` is the image id; empty for an index."""

    media_type: str
    manifest: bytes
    blobs: dict[str, bytes] = field(repr=False, default_factory=dict)
    children: tuple[Assembled, ...] = ()
    id: str = ""
    layers: tuple[Descriptor, ...] = ()

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, len(self.manifest))


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def compress(data: bytes, how: Compression, level: int = 6) -> bytes:
    if how == "gzip":
        return gzip.compress(data, level, mtime=0)
    if how == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=3).compress(data)
    return data


def assemble(
    layers: Sequence[bytes],
    config: dict[str, Any] | None = None,
    *,
    format: Format = "oci",
    compression: Compression = "gzip",
    architecture: str = ARCHITECTURE,
    level: int = 6,
) -> Assembled:
    """An image of uncompressed layer archives. ``config`` is the runtime part (Env, Cmd, User, …)."""
    types = _TYPES[format]
    blobs: dict[str, bytes] = {}

    def add(media_type: str, data: bytes) -> Descriptor:
        blobs[digest_of(data)] = data
        return Descriptor(media_type, digest_of(data), len(data))

    described = [add(types[compression], compress(layer, compression, level)) for layer in layers]
    document = {
        "architecture": architecture,
        "os": "linux",
        "created": "2023-11-14T22:13:20Z",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        "history": [{"created": "2023-11-14T22:13:20Z", "created_by": "hack/images.py"} for _ in layers],
    }
    body = json.dumps(document, sort_keys=True).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": add(types["config"], body).to_json(),
        "layers": [d.to_json() for d in described],
    }
    return Assembled(types["manifest"], json.dumps(manifest, indent=1).encode(), blobs, id=digest_of(body), layers=tuple(described))


def index(images: dict[str, Assembled], *, format: Format = "oci") -> Assembled:
    """A multi-platform index; keys are "os/architecture[/variant]"."""
    entries = []
    for name, image in images.items():
        parts = dict(zip(("os", "architecture", "variant"), name.split("/"), strict=False))
        entries.append(image.descriptor().to_json(platform=parts))
    media_type = _TYPES[format]["index"]
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    return Assembled(media_type, json.dumps(document, indent=1).encode(), children=tuple(images.values()))


def artifact(files: dict[str, bytes], *, nameless: bytes = b"") -> Assembled:
    """As ``oras push`` makes one: an empty config, a blob for each file, its name in an annotation."""
    blobs = {digest_of(b"{}"): b"{}"}
    layers = []
    for name, data in files.items():
        blobs[digest_of(data)] = data
        described = Descriptor("application/octet-stream", digest_of(data), len(data))
        layers.append(described.to_json(annotations={"org.opencontainers.image.title": name}))
    if nameless:
        blobs[digest_of(nameless)] = nameless
        layers.append(Descriptor("text/plain", digest_of(nameless), len(nameless)).to_json())
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "artifactType": "application/vnd.example.model",
        "config": Descriptor("application/vnd.oci.empty.v1+json", digest_of(b"{}"), 2).to_json(),
        "layers": layers,
    }
    return Assembled(kind, json.dumps(manifest).encode(), blobs)


# -- catalogue --------------------------------------------------------------------------------------------------------------


def base_layer() -> bytes:
    """busybox with its applets, a root user, the usual empty directories."""
    layer = Layer()
    for name, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777), ("var", 0o755), ("home", 0o755)):
        layer.directory(name, mode)
    for name in ("dev", "proc", "sys", "usr", "usr/bin"):
        layer.directory(name)
    layer.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    for applet in APPLETS.split():
        layer.symlink(f"bin/{applet}", "busybox")
    layer.symlink("usr/bin/env", "../../bin/busybox")
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
    layer.file("etc/group", "root:x:0:\nnobody:x:65534:\n")
    return layer.finish()


_CONFIG = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]}


def busybox(**options: Any) -> Assembled:
    return assemble([base_layer()], dict(_CONFIG), **options)


def users(**options: Any) -> Assembled:
    """USER app:staff (1000:50), supplementary groups 2000 and 3000, a user whose name is a number."""
    layer = Layer()
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:50:app:/home/app:/bin/sh\n1234:x:0:0::/:/bin/sh\n")
    layer.file("etc/group", "root:x:0:\nstaff:x:50:\nextra:x:2000:app\nmore:x:3000:app,other\n")
    layer.directory("home/app", 0o750, uid=1000, gid=50)
    return assemble([base_layer(), layer.finish()], {**_CONFIG, "User": "app:staff"}, **options)


def volumes(**options: Any) -> Assembled:
    layer = Layer().directory("data", 0o770, uid=1000, gid=50).file("data/seed", "from the image\n", uid=1000, gid=50)
    return assemble([base_layer(), layer.finish()], {**_CONFIG, "Volumes": {"/data": {}, "/cache": {}}}, **options)


def entrypoint(**options: Any) -> Assembled:
    script = '#!/bin/sh\necho entrypoint "$@" in $(pwd) with $GREETING\nexec "$@"\n'
    layer = Layer().directory("work").file("entrypoint.sh", script, 0o755)
    config = {
        "Env": [*_CONFIG["Env"], "GREETING=hello"],
        "Entrypoint": ["/entrypoint.sh"],
        "Cmd": ["sleep", "3600"],
        "WorkingDir": "/work",
        "StopSignal": "SIGUSR1",
        "ExposedPorts": {"80/tcp": {}},
        "Labels": {"org.example": "label"},
    }
    return assemble([base_layer(), layer.finish()], config, **options)


def many_layers(count: int = 120, **options: Any) -> Assembled:
    """``count`` layers; /order holds the topmost number, /layers/N one file each."""
    rest = [Layer().file("order", str(n)).directory("layers").file(f"layers/{n}", str(n)).finish() for n in range(1, count)]
    return assemble([base_layer(), *rest], dict(_CONFIG), **options)


def bulk(megabytes: int, layers: int, files: int, seed: int = 1) -> list[bytes]:
    """Layer archives, half compressible, half random content: what a pull benchmark wants. Each seed gives others."""
    source = random.Random(seed)
    per_layer, size = files // layers, megabytes * (1 << 20) // files
    made = []
    for n in range(layers):
        layer = Layer()
        for i in range(per_layer):
            if i % 50 == 0:
                layer.directory(f"big/{n}/{i // 50}")
            text = b"%08d the quick brown fox\n" % i
            layer.file(f"big/{n}/{i // 50}/{i}", source.randbytes(size // 2) + text * (size // 2 // len(text)))
        made.append(layer.finish())
    return made


def big(megabytes: int = 300, layers: int = 10, files: int = 20_000, **options: Any) -> Assembled:
    return assemble([base_layer(), *bulk(megabytes, layers, files)], dict(_CONFIG), **{"level": 1, **options})


def multi(**options: Any) -> Assembled:
    """An index: this machine, another architecture that cannot run here, and an attestation entry."""
    other = "arm64" if ARCHITECTURE == "amd64" else "amd64"
    foreign = assemble([Layer().file("wrong", "architecture").finish()], architecture=other)
    attestation = assemble([Layer().file("attestation").finish()], architecture="unknown")
    return index({f"linux/{other}": foreign, f"linux/{ARCHITECTURE}": busybox(**options), "unknown/unknown": attestation})


CATALOGUE: dict[str, Callable[[], Assembled]] = {
    "busybox": busybox,
    "busybox-docker": lambda: busybox(format="docker"),
    "busybox-zstd": lambda: busybox(compression="zstd"),
    "users": users,
    "volumes": volumes,
    "entrypoint": entrypoint,
    "many-layers": many_layers,
    "multi": multi,
    "big": big,
    "big-zstd": lambda: big(compression="zstd"),
}


# -- push -------------------------------------------------------------------------------------------------------------------


class Pusher:
    """One connection to a registry; ``headers`` may carry Authorization."""

    def __init__(self, base: str, headers: dict[str, str] | None = None, context: ssl.SSLContext | None = None) -> None:
        url = urlsplit(base)
        kind: Callable[[], http.client.HTTPConnection]
        if url.scheme == "https":
            kind = lambda: http.client.HTTPSConnection(url.netloc, timeout=60, context=context)  # noqa: E731
        else:
            kind = lambda: http.client.HTTPConnection(url.netloc, timeout=60)  # noqa: E731
        self._connection, self._headers = kind(), headers or {}

    def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
        self._connection.request(method, target, body, {**self._headers, **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = self._connection.getresponse()
        self.body = response.read()
        return response

    def expect(self, status: int, response: http.client.HTTPResponse, what: str) -> None:
        if response.status != status:
            raise RuntimeError(f"{what}: HTTP {response.status} {self.body[:200]!r}")

    def blob(self, repository: str, digest: str, data: bytes) -> None:
        if self.request("HEAD", f"/v2/{repository}/blobs/{digest}").status == 200:
            return
        started = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        self.expect(202, started, "start upload")
        location = urlsplit(started.headers["Location"])
        target = f"{location.path}?{location.query + '&' if location.query else ''}digest={digest}"
        self.expect(201, self.request("PUT", target, data, Content_Type="application/octet-stream"), "upload blob")

    def push(self, image: Assembled, repository: str, tag: str = "latest") -> str:
        """Push and return the digest; a child of an index goes by digest."""
        for child in image.children:
            self.push(child, repository, child.digest)
        for digest, data in image.blobs.items():
            self.blob(repository, digest, data)
        put = self.request("PUT", f"/v2/{repository}/manifests/{tag}", image.manifest, Content_Type=image.media_type)
        self.expect(201, put, f"push {repository}:{tag}")
        return image.digest

    def close(self) -> None:
        self._connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    pushing = commands.add_parser("push")
    pushing.add_argument("--registry", default="127.0.0.1:5000")
    pushing.add_argument("--https", action="store_true")
    pushing.add_argument("--prefix", default="", help="put in front of each repository name, e.g. library/")
    pushing.add_argument("names", nargs="*", default=["busybox"])
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        print("\n".join(CATALOGUE))
        return 0
    pusher = Pusher(f"{'https' if arguments.https else 'http'}://{arguments.registry}")
    for name in arguments.names:
        if name not in CATALOGUE:
            parser.error(f"no image {name!r}: {', '.join(CATALOGUE)}")
        digest = pusher.push(CATALOGUE[name](), f"{arguments.prefix}{name}")
        print(f"{arguments.registry}/{arguments.prefix}{name}:latest {digest}")
    pusher.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
