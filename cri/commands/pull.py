"""``cri-shim pull IMAGE``: PullImage, with the progress that ImageStatus reports meanwhile."""

from __future__ import annotations

import base64
import getpass
import json
import sys
from typing import Any

import grpc

from cri.commands.client import CommandError, Daemon, connect, explain
from protos.runtime.v1 import api_pb2 as v1

#: Seconds between looks at the progress.
LOOK = 0.1


def main(socket: str, image: str, *, creds: str = "", quiet: bool = False) -> int:
    """Prints the image's id."""
    try:
        with connect(socket) as daemon:
            try:
                print(pull(daemon, v1.ImageSpec(image=image), quiet=quiet, auth=_auth(creds)))
            except grpc.RpcError as error:
                raise CommandError(explain(error, socket)) from error
    except CommandError as error:
        print(f"cri-shim: {error}", file=sys.stderr)
        return 1
    return 0


def pull(
    daemon: Daemon, spec: v1.ImageSpec, *, quiet: bool, auth: v1.AuthConfig | None = None, sandbox: v1.PodSandboxConfig | None = None
) -> str:
    """The image's id. Draws on standard error, and only on a terminal. An interrupt cancels the pull."""
    call = daemon.images.PullImage.future(v1.PullImageRequest(image=spec, auth=auth, sandbox_config=sandbox))
    try:
        if not quiet and sys.stderr.isatty():
            _draw(daemon, spec, call)
        return str(call.result().image_ref)
    except KeyboardInterrupt:
        call.cancel()
        raise


def _auth(creds: str) -> v1.AuthConfig | None:
    if not creds:
        return None
    user, colon, password = creds.partition(":")
    if not colon:
        password = getpass.getpass(f"password of {user}: ")
    return v1.AuthConfig(auth=base64.b64encode(f"{user}:{password}".encode()).decode())


def _draw(daemon: Daemon, spec: v1.ImageSpec, call: Any) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {"": bar.add_task(spec.image, total=None)}
        while not _wait(call):
            progress = _progress(daemon, spec)
            if progress:
                _show(bar, tasks, spec.image, progress)


def _wait(call: Any) -> bool:
    """Whether the call has ended, after a moment; its outcome is the caller's to look at."""
    try:
        call.exception(timeout=LOOK)
    except grpc.FutureTimeoutError:
        return False
    return True


def _progress(daemon: Daemon, spec: v1.ImageSpec) -> dict[str, Any]:
    try:
        info = daemon.images.ImageStatus(v1.ImageStatusRequest(image=spec, verbose=True), timeout=5).info
    except grpc.RpcError:
        # The pull itself says what is wrong; a bar that stands still for a moment does not matter.
        return {}
    found = json.loads(info["progress"]) if "progress" in info else {}
    return found if isinstance(found, dict) else {}


def _show(bar: Any, tasks: dict[str, Any], image: str, progress: dict[str, Any]) -> None:
    bar.update(tasks[""], description=f"{image} {progress['phase']}", total=progress["wanted"] or None, completed=progress["fetched"])
    for layer in progress["layers"]:
        digest, line = layer["digest"], f"  {layer['digest'][7:19]} {layer['phase']:<11}"
        if digest not in tasks:
            tasks[digest] = bar.add_task(line, total=layer["size"])
        done = layer["size"] if layer["phase"] in ("exists", "done") else layer["fetched"]
        bar.update(tasks[digest], description=line, completed=done)
