"""``images.auth_file``: registry credentials of the node, in the layout of Docker's config.json (and containers-auth.json).

The file is read anew at every challenge of a registry, so that a rotated secret needs no restart. A credential goes to the host it is
filed under and to nobody else. Credentials that came with the request go before the file.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cri.images import credential_helper
from cri.images.auth import ANONYMOUS, Credentials
from shim.errors import Failure

_PHASE = "read auth file"
_LIMIT = 1 << 20  # bytes
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)  # becomes the end of a program's name
_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB_SERVER = "https://index.docker.io/v1/"  # what Docker calls it to credential helpers


@dataclass(frozen=True, slots=True)
class AuthFile:
    """The parsed file. Keys are ``host[:port]`` or ``host[:port]/repository/prefix``, without scheme."""

    auths: dict[str, Credentials] = field(default_factory=dict, repr=False)
    helpers: dict[str, str] = field(default_factory=dict)
    store: str = ""

    def entry(self, host: str, repository: str) -> Credentials:
        """The most specific entry: the repository, its parents, the host."""
        name = f"{_host(host)}/{repository}"
        while name:
            if found := self.auths.get(name):
                return found
            name = name.rpartition("/")[0]
        return ANONYMOUS


class Keyring:
    """Looks credentials up. ``path`` None: there are none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    async def find(self, host: str, repository: str) -> Credentials:
        """For ``host[:port]``, or ANONYMOUS. Docker's order: the host's helper, an entry, the helper for all. Raises Failure."""
        if self._path is None:
            return ANONYMOUS
        found = read(self._path)
        name = _host(host)
        server = _HUB_SERVER if name in _HUB else name
        if helper := found.helpers.get(name):
            return await credential_helper.get(helper, server)
        if entry := found.entry(host, repository):
            return entry
        if found.store:
            return await credential_helper.get(found.store, server)
        return ANONYMOUS


def read(path: Path) -> AuthFile:
    """The file as it is now; one that is not there (yet) is an empty one. Raises Failure."""
    try:
        # A secret that is mounted is a symlink; a FIFO must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return AuthFile()
    except OSError as error:
        raise Failure.wrap(_PHASE, "open", error, str(path)) from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Failure(_PHASE, path=str(path), message="not a regular file")
        body = file.read(_LIMIT + 1)
    if len(body) > _LIMIT:
        raise Failure(_PHASE, path=str(path), message=f"more than {_LIMIT} bytes")
    return parse(body, str(path))


def parse(body: bytes, path: str = "") -> AuthFile:
    """Names the field that is wrong, never its value. Keys that are Docker's own affair are passed over."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure(_PHASE, path=path, message="not JSON") from error
    if not isinstance(document, dict):
        raise Failure(_PHASE, path=path, message="not a JSON object")
    auths: dict[str, Credentials] = {}
    for key, entry in _table(document, "auths", path).items():
        where = f"auths.{key}"
        if not isinstance(entry, dict):
            raise Failure(_PHASE, path=path, message=f"{where}: not an object")
        auths[_key(key)] = _credentials(entry, where, path)
    helpers = {
        _key(key): _helper(name, f"credHelpers.{key}", path) for key, name in _table(document, "credHelpers", path).items() if name != ""
    }
    store = document.get("credsStore") or ""
    return AuthFile(auths, helpers, _helper(store, "credsStore", path) if store else "")


def _table(document: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    found = document.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Failure(_PHASE, path=path, message=f"{name}: not an object")
    return found


def _credentials(entry: dict[str, Any], where: str, path: str) -> Credentials:
    texts = {}
    for name in ("auth", "username", "password", "identitytoken", "registrytoken"):
        value = entry.get(name) or ""
        if not isinstance(value, str) or not value.isprintable():
            raise Failure(_PHASE, path=path, message=f"{where}.{name}: not a printable string")
        texts[name] = value
    username, password = texts["username"], texts["password"]
    if texts["auth"]:
        try:
            username, colon, password = base64.b64decode(texts["auth"], validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            colon = ""
        if not colon:
            raise Failure(_PHASE, path=path, message=f"{where}.auth: not base64 of user:password")
        password = password.rstrip("\0")
    return Credentials(username, password, texts["identitytoken"], texts["registrytoken"])


def _helper(name: object, where: str, path: str) -> str:
    if not isinstance(name, str) or _HELPER.fullmatch(name) is None:
        raise Failure(_PHASE, path=path, message=f"{where}: not the name of a credential helper (the end of docker-credential-NAME)")
    return name


def _key(key: str) -> str:
    """``https://index.docker.io/v1/`` → ``docker.io``; a path other than the API's version is part of a repository's name."""
    rest = key.partition("://")[2] or key
    host, _, repository = rest.partition("/")
    repository = repository.strip("/")
    if repository in ("v1", "v2"):
        repository = ""
    return f"{_host(host)}/{repository}" if repository else _host(host)


def _host(host: str) -> str:
    return "docker.io" if host.lower() in _HUB else host.lower()
