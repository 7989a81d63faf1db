"""Users and groups by the root's own /etc/passwd and /etc/group. PURE parsing; the caller opens the files inside the root.

Numbers win over names (CVE-2016-3697: a user named "1000" must not become uid 0). Files are bounded by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from shim.errors import Failure
from shim.oci.spec import GroupsPolicy, User

MAX_ID = 2**31 - 1  # what containerd and CRI-O accept; beyond it CVE-2024-40635
Reader = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Resolved:
    user: User
    home: str


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


def _number(text: str) -> int | None:
    """The id a decimal string stands for, None for a name; a number out of range is refused, never taken for a name."""
    digits = text[1:] if text[:1] in "+-" else text
    if not (digits.isascii() and digits.isdigit()):
        return None
    if text[:1] == "-" or len(digits) > 10 or int(digits) > MAX_ID:
        raise Failure("user", message=f"id {text[:40]} is not in 0..{MAX_ID}")
    return int(digits)


def _fields(line: bytes, least: int) -> list[str] | None:
    parts = line.decode("utf-8", "surrogateescape").split(":")
    return parts if len(parts) >= least and not line.startswith((b"#", b"+", b"-")) else None


def _small(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID else None


def accounts(passwd: bytes) -> list[_Account]:
    """The lines of passwd(5) that are whole; others are skipped, as libc does."""
    found = []
    for line in passwd.splitlines():
        parts = _fields(line, 6)
        if parts is None:
            continue
        uid, gid = _small(parts[2]), _small(parts[3])
        if uid is not None and gid is not None:
            found.append(_Account(parts[0], uid, gid, parts[5]))
    return found


def groups(group: bytes) -> list[tuple[str, int, tuple[str, ...]]]:
    """The whole lines of group(5): name, gid, members."""
    found = []
    for line in group.splitlines():
        parts = _fields(line, 4)
        if parts is None:
            continue
        gid = _small(parts[2])
        if gid is not None:
            found.append((parts[0], gid, tuple(m for m in parts[3].split(",") if m)))
    return found


def resolve(user: User, read: Reader) -> Resolved:
    """Apply ``username`` and ``groups_policy``; add the primary group to the groups (CVE-2022-36109, CVE-2022-2995).

    ``read`` returns the content of /etc/passwd or /etc/group inside the root, empty when there is none.
    Raises Failure for a name that the root does not know.
    """
    known = accounts(read("etc/passwd"))
    uid, gid, account = user.uid, user.gid, None
    name, _, group_name = user.username.partition(":")
    table: list[tuple[str, int, tuple[str, ...]]] | None = None
    if name:
        number = _number(name)
        account = next((a for a in known if (a.uid == number if number is not None else a.name == name)), None)
        if account is None and number is None:
            raise Failure("user", "lookup", path="/etc/passwd", message=f"no user {name!r} in the image")
        uid = account.uid if account is not None else number or 0
        gid = account.gid if account is not None else 0
    else:
        account = next((a for a in known if a.uid == uid), None)
    if group_name:
        table = groups(read("etc/group"))
        number = _number(group_name)
        found = number if number is not None else next((g for n, g, _ in table if n == group_name), None)
        if found is None:
            raise Failure("user", "lookup", path="/etc/group", message=f"no group {group_name!r} in the image")
        gid = found
    extra = dict.fromkeys((gid, *user.additional_gids))
    if user.groups_policy is GroupsPolicy.MERGE and account is not None:
        table = groups(read("etc/group")) if table is None else table
        extra.update(dict.fromkeys(g for _, g, members in table if account.name in members))
    resolved = replace(user, uid=uid, gid=gid, additional_gids=tuple(extra), username="", groups_policy=None)
    return Resolved(resolved, account.home if account is not None and account.home else "/")
