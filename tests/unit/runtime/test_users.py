"""Users by the root's own files: numbers before names, ids in range, groups by policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.errors import Failure
from shim.oci.spec import GroupsPolicy, User
from shim.runtime import users

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
1000:x:0:0:trap named like a number:/:/bin/sh
app:x:1234:1235::/srv/app:/bin/sh
# a comment:x:7:7::/:/
broken:x:notanumber:0::/:/bin/sh
+nis:x:9:9::/:/
"""
GROUP = b"root:x:0:\napp:x:1235:\ndocs:x:50:app,other\nwheel:x:10:app\nshort:x\n"


def read(name: str) -> bytes:
    return {"etc/passwd": PASSWD, "etc/group": GROUP}[name]


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        (User(), 0, 0, (0,), "/root"),
        (User(uid=1234, gid=0), 1234, 0, (0,), "/srv/app"),
        (User(username="app"), 1234, 1235, (1235,), "/srv/app"),
        (User(username="app:docs"), 1234, 50, (50,), "/srv/app"),
        (User(username="app:77"), 1234, 77, (77,), "/srv/app"),
        (User(username="1000"), 1000, 0, (0,), "/"),  # CVE-2016-3697
        (User(username="1234"), 1234, 1235, (1235,), "/srv/app"),
        (User(username="app", groups_policy=GroupsPolicy.MERGE), 1234, 1235, (1235, 50, 10), "/srv/app"),
        (User(username="app", groups_policy=GroupsPolicy.STRICT, additional_gids=(5,)), 1234, 1235, (1235, 5), "/srv/app"),
        (User(uid=1234, gid=3, additional_gids=(10,), groups_policy=GroupsPolicy.MERGE), 1234, 3, (3, 10, 50), "/srv/app"),
        (User(uid=4000000), 4000000, 0, (0,), "/"),
    ],
)
def test_resolves(user: User, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
    found = users.resolve(user, read)
    assert (found.user.uid, found.user.gid, found.user.additional_gids, found.home) == (uid, gid, groups, home)
    assert found.user.username == ""


@pytest.mark.parametrize("name", ["nobody", "2147483648", "9" * 36, "-1", "+2147483648", "app:nogroup", "app:-1", "broken", "+nis"])
def test_refuses(name: str) -> None:
    with pytest.raises(Failure, match="user"):
        users.resolve(User(username=name), read)


@given(st.binary(max_size=400), st.binary(max_size=400), st.text(max_size=20))
def test_any_bytes_end_in_an_id_or_a_failure(passwd: bytes, group: bytes, name: str) -> None:
    files = {"etc/passwd": passwd, "etc/group": group}
    try:
        found = users.resolve(User(uid=1, username=name, groups_policy=GroupsPolicy.MERGE), files.__getitem__)
    except Failure:
        return
    assert 0 <= found.user.uid <= users.MAX_ID
    assert all(0 <= g <= users.MAX_ID for g in found.user.additional_gids)
