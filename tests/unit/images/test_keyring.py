import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import credential_helper, keyring
from cri.images.auth import Credentials
from cri.images.keyring import Keyring
from shim.errors import Failure


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


FILE = {
    "auths": {
        "https://index.docker.io/v1/": {"auth": encoded("hub:hub-pass"), "email": "x@example"},
        "reg.example:5000": {"auth": encoded("reg:p:w")},
        "https://Reg2.example/v2/": {"username": "u2", "password": "p2"},
        "reg.example:5000/team": {"auth": encoded("team:t")},
        "reg.example:5000/team/app": {"identitytoken": "idt"},
        "bearer.example": {"registrytoken": "rt"},
        "empty.example": {},
    },
    "HttpHeaders": {"x": "y"},
}


@pytest.mark.parametrize(
    "host, path, expected",
    [
        ("docker.io", "library/busybox", Credentials("hub", "hub-pass")),
        ("registry-1.docker.io", "library/busybox", Credentials("hub", "hub-pass")),
        ("reg.example:5000", "other/app", Credentials("reg", "p:w")),
        ("reg.example:5000", "team/other/deep", Credentials("team", "t")),
        ("reg.example:5000", "team/app", Credentials(identity_token="idt")),
        ("reg.example:5000", "teamwork", Credentials("reg", "p:w")),
        ("reg.example", "team/app", Credentials()),
        ("reg2.example", "a", Credentials("u2", "p2")),
        ("bearer.example", "a", Credentials(registry_token="rt")),
        ("empty.example", "a", Credentials()),
        ("example:5000", "a", Credentials()),
    ],
)
async def test_the_most_specific_entry(tmp_path: Path, host: str, path: str, expected: Credentials) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FILE))
    assert await Keyring(tmp_path / "config.json").find(host, path) == expected


@pytest.mark.parametrize(
    "text, where",
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"auths": 1}', "auths: not an object"),
        ('{"auths": {"a": 1}}', "auths.a: not an object"),
        ('{"auths": {"a": {"auth": "secret!"}}}', "auths.a.auth: not base64 of user:password"),
        ('{"auths": {"a": {"auth": "c2VjcmV0"}}}', "auths.a.auth"),
        ('{"auths": {"a": {"password": 7}}}', "auths.a.password"),
        ('{"auths": {"a": {"password": "secret\\n"}}}', "auths.a.password"),
        ('{"credHelpers": {"a": "../secret"}}', "credHelpers.a"),
        ('{"credsStore": "/bin/secret"}', "credsStore"),
        ('{"credsStore": ["secret"]}', "credsStore"),
    ],
)
def test_a_wrong_field_is_named_without_its_value(text: str, where: str) -> None:
    with pytest.raises(Failure) as caught:
        keyring.parse(text.encode(), "/etc/auth.json")
    assert where in str(caught.value) and "/etc/auth.json" in str(caught.value) and "secret" not in str(caught.value)


_KEYS = st.sampled_from(["auths", "credHelpers", "credsStore", "auth", "username", "password", "a", "https://a/v1/", ""])
_ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x) | st.dictionaries(_KEYS, x))


@given(_ANY)
def test_any_document_is_survived(document: object) -> None:
    try:
        keyring.parse(json.dumps({"auths": document, "credHelpers": document} if not isinstance(document, dict) else document).encode())
    except Failure:
        pass


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_survived(body: bytes) -> None:
    try:
        keyring.parse(body)
    except Failure:
        pass


async def test_no_file_and_unusable_files(tmp_path: Path) -> None:
    assert not await Keyring(None).find("a", "b")
    assert not await Keyring(tmp_path / "missing").find("a", "b")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Failure, match="not a regular file"):
        await Keyring(tmp_path / "fifo").find("a", "b")
    (tmp_path / "huge").write_bytes(b" " * (2 << 20))
    with pytest.raises(Failure, match="more than"):
        await Keyring(tmp_path / "huge").find("a", "b")


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(credential_helper, "PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(credential_helper, "SECONDS", 1.0)
    return tmp_path


def script(directory: Path, name: str, text: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


async def test_helpers(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRI_SHIM_SECRET", "x")
    monkeypatch.setenv("NO_PROXY", "a")
    out = helper / "environment"
    answer = r"{\"Username\":\"$s\",\"Secret\":\"p\"}"
    script(helper, "one", f'read s; env > {out}; pwd >> {out}; echo "{answer}"')
    script(helper, "token", """echo '{"Username":"<token>","Secret":"idt"}'""")
    script(helper, "none", "echo credentials not found in native keychain; exit 1")
    document = {
        "auths": {"filed.example": {"auth": encoded("f:f")}, "one.example": {"auth": encoded("f:f")}},
        "credHelpers": {"one.example": "one", "docker.io": "one", "none.example": "none"},
        "credsStore": "token",
    }
    (helper / "config.json").write_text(json.dumps(document))
    keys = Keyring(helper / "config.json")
    assert await keys.find("one.example", "r") == Credentials("one.example", "p")
    names = {line.partition("=")[0] for line in out.read_text().splitlines()[:-1]}
    assert names <= {"PATH", "HOME", "LANG", "NO_PROXY", "PWD", "SHLVL", "_", "OLDPWD"} and out.read_text().endswith("/\n")
    assert (await keys.find("docker.io", "library/x")).username == "https://index.docker.io/v1/"
    assert not await keys.find("none.example", "r")
    assert await keys.find("filed.example", "r") == Credentials("f", "f")
    assert await keys.find("else.example", "r") == Credentials(identity_token="idt")


@pytest.mark.parametrize(
    "text, why",
    [
        ("sleep 30 & sleep 30", "no answer in 1 s"),
        ("yes secret", "more than"),
        ("echo secret", "not an object with Username and Secret"),
        ("exit 7", "exit code 7"),
        ("echo no session >&1; exit 1", "exit code 1: no session"),
    ],
)
async def test_helpers_that_misbehave(helper: Path, text: str, why: str) -> None:
    script(helper, "bad", text)
    with pytest.raises(Failure, match=why) as caught:
        await credential_helper.get("bad", "reg.example")
    assert "secret" not in str(caught.value)
    with pytest.raises(Failure, match="docker-credential-missing.*not found"):
        await credential_helper.get("missing", "reg.example")
