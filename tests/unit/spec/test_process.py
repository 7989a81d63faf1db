"""Arguments, environment, working directory, user, exec sessions."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import InvalidArgument
from cri.images.model import ImageConfig
from cri.spec import process
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import GroupsPolicy, Process, User

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("a", "b"))


@pytest.mark.parametrize(
    ("command", "arguments", "image", "expected"),
    [
        ([], [], IMAGE, ("/entry", "a", "b")),
        ([], ["x"], IMAGE, ("/entry", "x")),
        (["c"], [], IMAGE, ("c",)),  # a command drops CMD too
        (["c"], ["x"], IMAGE, ("c", "x")),
        ([], [], ImageConfig(cmd=("sh", "-c")), ("sh", "-c")),
        ([], ["x"], ImageConfig(cmd=("sh",)), ("x",)),
        ([], [], ImageConfig(entrypoint=("",), cmd=("sh",)), ("sh",)),
        (["c", ""], [], IMAGE, ("c", "")),
    ],
)
def test_args(command: list[str], arguments: list[str], image: ImageConfig, expected: tuple[str, ...]) -> None:
    assert process.args(v1.ContainerConfig(command=command, args=arguments), image) == expected


@pytest.mark.parametrize("config", [{}, {"command": [""]}, {"command": ["a\0"]}, {"command": ["a"], "args": ["\0"]}])
def test_args_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.(command|args)"):
        process.args(v1.ContainerConfig(**config), ImageConfig())


def env(values: dict[str, bytes] | None = None, tty: bool = False, image: tuple[str, ...] = ()) -> tuple[str, ...]:
    config = v1.ContainerConfig(tty=tty, envs=[v1.KeyValue(key=k, value=v) for k, v in (values or {}).items()])
    return process.env(config, ImageConfig(env=image), "h")


def test_env_order_and_precedence() -> None:
    path = f"PATH={process.PATH}"
    assert env() == (path, "HOSTNAME=h")
    assert env(tty=True) == (path, "TERM=xterm", "HOSTNAME=h")
    assert env({"A": b"2", "HOSTNAME": b"mine"}, image=("PATH=/bin", "A=1", "B==")) == ("PATH=/bin", "HOSTNAME=mine", "A=2", "B==")
    assert env({"TERM": b"vt100"}, tty=True)[1] == "TERM=vt100"
    assert env({"A": b"x\ny", "B": b""})[2:] == ("A=x\ny", "B=")


def test_image_entries_without_a_value_take_nothing_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the daemon")
    assert env(image=("SECRET", "=x", "")) == env()


def test_env_values_are_bytes() -> None:
    assert os.fsencode(env({"A": b"\xff\xe9"})[2]) == b"A=\xff\xe9"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("", b"x", "config.envs[0].key"),
        ("A=B", b"x", "config.envs[0].key"),
        ("A\0", b"", "config.envs[0].key"),
        ("A", b"\0", "config.envs[0].value"),
        ("HOME", b"/root\nroot::0:0", "config.envs"),
    ],
)
def test_env_refused(key: str, value: bytes, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        env({key: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("config", "image", "expected"),
    [
        ("", "", "/"),
        ("", "/app/", "/app"),
        ("", "app", "/app"),
        ("", "../x", "/x"),
        ("/w//x/..", "/app", "/w"),
        ("//w", "", "/w"),
    ],
)
def test_cwd(config: str, image: str, expected: str) -> None:
    assert process.cwd(v1.ContainerConfig(working_dir=config), ImageConfig(working_dir=image)) == expected


@pytest.mark.parametrize(("config", "image"), [("w", ""), ("/w\nroot::0:0::/:/bin/sh", ""), ("/w\0", ""), ("", "/w\n"), ("", "/\x7f")])
def test_cwd_refused(config: str, image: str) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.(working_dir|WorkingDir)"):
        process.cwd(v1.ContainerConfig(working_dir=config), ImageConfig(working_dir=image))


def num(value: int) -> v1.Int64Value:
    return v1.Int64Value(value=value)


@pytest.mark.parametrize(
    ("context", "image", "expected"),
    [
        ({}, "", User()),
        ({}, "1000", User(1000, username="1000")),
        ({}, "1000:1001", User(1000, 1001, username="1000:1001")),
        ({}, "www:data", User(username="www:data")),
        ({}, "1000:data", User(1000, username="1000:data")),
        ({"run_as_user": num(5)}, "www", User(5, username="5")),
        ({"run_as_user": num(0)}, "www", User(username="0")),  # explicitly root: not the image's user
        ({"run_as_user": num(5), "run_as_group": num(6)}, "www", User(5, 6, username="5:6")),
        ({"run_as_username": "www", "run_as_group": num(6)}, "", User(0, 6, username="www:6")),
        ({"run_as_username": "www", "run_as_user": num(5)}, "", User(username="www")),
        ({"run_as_user": num(2**31 - 1)}, "", User(2**31 - 1, username=str(2**31 - 1))),
        ({"supplemental_groups": [3, 4, 3]}, "", User(additional_gids=(3, 4))),
    ],
)
def test_user(context: dict[str, Any], image: str, expected: User) -> None:
    found = process.user(v1.LinuxContainerSecurityContext(**context), ImageConfig(user=image))
    assert (found.uid, found.gid, found.username, found.additional_gids) == (
        expected.uid,
        expected.gid,
        expected.username,
        expected.additional_gids,
    )
    assert found.groups_policy is GroupsPolicy.MERGE


def test_strict_groups() -> None:
    context = v1.LinuxContainerSecurityContext(supplemental_groups_policy=v1.Strict)
    assert process.user(context, ImageConfig()).groups_policy is GroupsPolicy.STRICT


CONTEXT = "config.linux.security_context"


@pytest.mark.parametrize(
    ("context", "image", "field"),
    [
        ({"run_as_group": num(6)}, "www", f"{CONTEXT}.run_as_group"),
        ({"run_as_user": num(-1)}, "", f"{CONTEXT}.run_as_user"),
        ({"run_as_user": num(2**31)}, "", f"{CONTEXT}.run_as_user"),
        ({"run_as_user": num(2**32)}, "", f"{CONTEXT}.run_as_user"),
        ({"run_as_user": num(1), "run_as_group": num(2**31)}, "", f"{CONTEXT}.run_as_group"),
        ({"supplemental_groups": [1, 2**32]}, "", f"{CONTEXT}.supplemental_groups[1]"),
        ({"supplemental_groups_policy": 7}, "", f"{CONTEXT}.supplemental_groups_policy"),
        ({"run_as_username": "2147483648"}, "", f"{CONTEXT}.run_as_username"),
        ({"run_as_username": "a\nroot"}, "", f"{CONTEXT}.run_as_username"),
        ({}, "2147483648", "image config.User"),
        ({}, "1000:2147483648", "image config.User"),
        ({}, "9" * 36, "image config.User"),
        ({}, "9" * 1_000_000, "image config.User"),
        ({}, "-1", "image config.User"),
        ({}, "+0", "image config.User"),
        ({}, ":0", "image config.User"),
        ({}, "a:", "image config.User"),
        ({}, ":", "image config.User"),
        ({}, "a:b:c", "image config.User"),
        ({}, "a b", "image config.User"),
        ({}, "../etc", "image config.User"),
        ({}, "root\0x", "image config.User"),
        ({}, "\ud800", "image config.User"),
    ],
)
def test_user_refused(context: dict[str, Any], image: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        process.user(v1.LinuxContainerSecurityContext(**context), ImageConfig(user=image))
    assert caught.value.field == field


@given(st.text(max_size=14) | st.from_regex(r"[+-]?[0-9]{1,40}(:[+-]?[0-9]{1,40})?", fullmatch=True))
def test_no_user_string_becomes_root_by_accident(name: str) -> None:
    try:
        uid, gid = process.parse_user(name, "f")
    except InvalidArgument:
        return
    assert 0 <= uid < 2**31
    assert 0 <= gid < 2**31
    head = name.partition(":")[0]
    if head.isascii() and head.isdigit():
        assert uid == int(head)
    else:
        assert uid == 0  # a name, for the root's own passwd to resolve
        assert not head.startswith(("-", "+")) or not head[1:].isascii() or not head[1:].isdigit()


def test_exec_process() -> None:
    base = Process(("init",), "/w", ("A=1",), user=User(5, username="x"), oom_score_adj=7, no_new_privileges=True)
    made = process.exec_process(base, ["ls", "-l"], tty=True, user=User(5, 6))
    assert made == Process(
        ("ls", "-l"), "/w", ("A=1", "TERM=xterm"), terminal=True, user=User(5, 6), oom_score_adj=7, no_new_privileges=True
    )
    assert process.exec_process(made, ["ls"], tty=True).env == ("A=1", "TERM=xterm")
    assert process.exec_process(base, ["ls"], tty=False).user == base.user
    for bad in ([], [""], ["a\0"]):
        with pytest.raises(InvalidArgument):
            process.exec_process(base, bad, tty=False)
