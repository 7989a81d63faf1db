"""Docker's credential helpers: ``docker-credential-NAME get``, the server on its input, a JSON object on its output.

It runs in a session of its own with nothing of the daemon's environment but what a program that asks a cloud needs, in a bounded time and
with a bounded answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from contextlib import suppress

from cri.images.auth import ANONYMOUS, Credentials
from shim.errors import Failure

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECONDS = 20.0
_LIMIT = 64 << 10  # bytes of an answer
_PHASE = "ask credential helper"
_PASSED = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_TOKEN = "<token>"  # as user name: the secret is an identity token
_NONE = "credentials not found"  # how every helper says that it has none


async def get(name: str, server: str) -> Credentials:
    """The helper's credentials for ``server``, or ANONYMOUS. Raises Failure, without anything the helper printed as an answer."""
    program = f"docker-credential-{name}"
    path = shutil.which(program, path=PATH)
    if path is None:
        raise Failure(_PHASE, path=program, message=f"not found in {PATH}")
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **{n: os.environ[n] for n in _PASSED if n in os.environ}}
    process = await asyncio.create_subprocess_exec(
        *(path, "get"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(SECONDS):
            answer = await _talk(process, server, path)
            code = await process.wait()
    except TimeoutError:
        raise Failure(_PHASE, path=path, message=f"no answer in {SECONDS:g} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        await process.wait()
    if code != 0:
        said = "".join(c for c in answer.decode(errors="replace") if c.isprintable())[:200]
        if _NONE in said:
            return ANONYMOUS
        raise Failure(_PHASE, path=path, message=f"exit code {code}: {said}" if said else f"exit code {code}")
    return _parse(answer, path)


async def _talk(process: asyncio.subprocess.Process, server: str, path: str) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError, ConnectionResetError):  # it need not read; what it says then is its answer
        process.stdin.write(server.encode())
        await process.stdin.drain()
        process.stdin.close()
    answer = bytearray()
    while chunk := await process.stdout.read(_LIMIT):
        answer += chunk
        if len(answer) > _LIMIT:
            raise Failure(_PHASE, path=path, message=f"more than {_LIMIT} bytes of answer")
    return bytes(answer)


def _parse(answer: bytes, path: str) -> Credentials:
    try:
        document = json.loads(answer)
        username, secret = document["Username"], document["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        username = secret = None
    if not isinstance(username, str) or not isinstance(secret, str) or not f"{username}{secret}".isprintable():
        raise Failure(_PHASE, path=path, message="the answer is not an object with Username and Secret")
    if username == _TOKEN:
        return Credentials(identity_token=secret)
    return Credentials(username, secret)
