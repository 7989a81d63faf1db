"""``cri-shim image ls|rm|inspect|import|export``."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import grpc

from cri.commands.client import CommandError, Daemon, connect, explain
from protos.people.v1 import people_pb2 as people
from protos.people.v1 import people_pb2_grpc
from protos.runtime.v1 import api_pb2 as v1

_SHORT = 12  # digits of an id


def main(socket: str, arguments: Namespace) -> int:
    verbs: dict[str, Callable[[Daemon, Namespace], int]]
    verbs = {"ls": _ls, "rm": _rm, "inspect": _inspect, "import": _import, "export": _export}
    verb = verbs[arguments.verb]
    try:
        with connect(socket) as daemon:
            try:
                return verb(daemon, arguments)
            except grpc.RpcError as error:
                raise CommandError(explain(error, socket)) from error
    except CommandError as error:
        print(f"cri-shim: {error}", file=sys.stderr)
        return 1


def _ls(daemon: Daemon, arguments: Namespace) -> int:
    images = daemon.images.ListImages(v1.ListImagesRequest()).images
    if arguments.quiet:
        print("\n".join(dict.fromkeys(i.id for i in images)), end="\n" if images else "")
        return 0
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("IMAGE", "TAG", "IMAGE ID", "SIZE", box=None, pad_edge=False, header_style="bold")
    table.columns[3].justify = "right"
    for image in images:
        rows = [tuple(t.rpartition(":")[::2]) for t in image.repo_tags]
        # Known by digest only, or not by any name.
        rows = rows or [(d.partition("@")[0], "<none>") for d in image.repo_digests[:1]] or [("<none>", "<none>")]
        for name, tag in rows:
            table.add_row(name, tag, image.id.rpartition(":")[2][:_SHORT], decimal(image.size) + (" pinned" if image.pinned else ""))
    Console(soft_wrap=True).print(table)
    return 0


def _rm(daemon: Daemon, arguments: Namespace) -> int:
    for ref in arguments.image:
        _status(daemon, ref)  # to CRI, removing nothing is a success
        daemon.images.RemoveImage(v1.RemoveImageRequest(image=v1.ImageSpec(image=ref)))
        print(ref)
    return 0


def _inspect(daemon: Daemon, arguments: Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    found = []
    for ref in arguments.image:
        response = _status(daemon, ref)
        status = MessageToDict(response.image, always_print_fields_with_no_presence=True)
        found.append({"status": status, "info": json.loads(response.info["info"])})
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if not sys.stdout.isatty():
        print(text)
        return 0
    from rich.console import Console

    Console().print_json(text)
    return 0


def _import(daemon: Daemon, arguments: Namespace) -> int:
    stub: Any = people_pb2_grpc.ArchiveServiceStub
    archives = stub(daemon.channel)
    for file in arguments.file:
        path = Path(file)
        if not path.exists():
            raise CommandError(f"{file}: no such file or directory")
        with _busy(f"importing {file}"):
            response = archives.ImportImages(people.ImportImagesRequest(path=str(path.resolve()), name=arguments.name))
        for image in response.images:
            print(f"{image.image_ref} {' '.join(image.names) or '(no name: give it one with --name)'}")
    return 0


def _export(daemon: Daemon, arguments: Namespace) -> int:
    from cri.images.export import export

    target = Path(arguments.file).absolute()
    if target.exists() or target.is_symlink():
        raise CommandError(f"{arguments.file}: exists already")
    response = _status(daemon, arguments.image)
    info = json.loads(response.info["info"])
    if info.get("artifactType"):
        raise CommandError(f"{arguments.image} is an artifact: only images can be exported")
    try:
        config = Path(info["configPath"]).read_bytes()
        layers = list(reversed(info["snapshots"])) if info["chainID"] else []
        with _busy(f"exporting {arguments.image}"):
            made = export(target, arguments.format, arguments.compression, config, layers, response.image.repo_tags)
    except FileExistsError:
        raise CommandError(f"{arguments.file}: exists already") from None
    except OSError as error:
        raise CommandError(f"{error.filename or arguments.file}: {error.strerror}") from error
    print(made.id)
    if made.id != response.image.id:
        print(f"layers were put together anew: the id in the archive is not {response.image.id}", file=sys.stderr)
    return 0


def _busy(what: str) -> AbstractContextManager[object]:
    """Something that moves, on a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


def _status(daemon: Daemon, ref: str) -> v1.ImageStatusResponse:
    response = daemon.images.ImageStatus(v1.ImageStatusRequest(image=v1.ImageSpec(image=ref), verbose=True))
    if not response.HasField("image"):
        raise CommandError(f"image {ref!r} is not on this node")
    found: v1.ImageStatusResponse = response
    return found
