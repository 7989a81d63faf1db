"""What ``cri-shim doctor`` looks at of images: the files that the configuration names."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cri.config import Images
from cri.errors import StartError
from cri.images import credential_helper, keyring, shared
from cri.images.trust import Trust
from shim.errors import Failure

#: check, level, what was found, how to fix it
Line = tuple[str, Literal["ok", "note", "fail"], str, str]


def examine(config: Images) -> Iterator[Line]:
    if config.signature_policy:
        yield _policy(config.signature_policy)
    if config.auth_file:
        yield from _auth_file(Path(config.auth_file))
    for path in config.additional_stores:
        try:
            yield "image store", "ok", f"{shared.check(path)}, read-only", ""
        except StartError as error:
            yield "image store", "fail", str(error), "the daemon does not start without it"


def _policy(path: str) -> Line:
    trust = Trust(Path(path))
    try:
        trust.load()
    except StartError as error:
        return "signatures", "fail", str(error), "the daemon does not start with it"
    return "signatures", "ok", f"{path}: {trust.summary()}", ""


def _auth_file(path: Path) -> Iterator[Line]:
    try:
        found = keyring.read(path)
    except Failure as error:
        yield "credentials", "fail", str(error), "pulls that bring no credentials fail"
        return
    if not path.exists():
        yield "credentials", "note", f"{path} is not there (yet)", ""
        return
    yield "credentials", "ok", f"{path}: {len(found.auths)} entries", ""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield "credentials", "note", f"{path} can be read by others than its owner", f"chmod 600 {path}"
    for name in sorted({*found.helpers.values(), *filter(None, (found.store,))}):
        program = f"docker-credential-{name}"
        if shutil.which(program, path=credential_helper.PATH) is None:
            yield "credentials", "fail", f"{program} is not in {credential_helper.PATH}", f"install it, or take {name!r} out of {path}"
