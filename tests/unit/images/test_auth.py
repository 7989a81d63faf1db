import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import InvalidArgument
from cri.images import auth
from cri.images.auth import Challenge, Credentials
from shim.errors import Failure


def test_challenges() -> None:
    header = 'Bearer realm="https://auth.example/token",service="reg, istry",scope="a:b:pull",error="x\\"y"'
    assert auth.challenges([header]) == [
        Challenge("bearer", {"realm": "https://auth.example/token", "service": "reg, istry", "scope": "a:b:pull", "error": 'x"y'})
    ]
    assert [c.scheme for c in auth.challenges(['Negotiate, Basic realm="a", Bearer realm=b'])] == ["negotiate", "basic", "bearer"]
    assert [c.scheme for c in auth.challenges(["Basic", 'Bearer realm="x"'])] == ["basic", "bearer"]


@given(st.text(max_size=80))
def test_any_header_is_survived(text: str) -> None:
    auth.challenges([text])


def test_fields() -> None:
    encoded = base64.b64encode(b"u:p:w\0").decode()
    assert auth.from_fields("", "", encoded, "", "", "") == Credentials("u", "p:w")
    assert auth.from_fields("a", "b", encoded, "https://reg.example:5000/v1/", "", "") == Credentials("a", "b", server="reg.example:5000")
    assert not auth.from_fields("", "", "", "", "", "")
    for bad in ("!!!", base64.b64encode(b"no colon").decode()):
        with pytest.raises(InvalidArgument) as caught:
            auth.from_fields("", "", bad, "", "", "")
        assert bad not in str(caught.value)


@pytest.mark.parametrize(
    "server, host, origin, allowed",
    [
        ("", "reg.example", True, True),
        ("", "mirror.example", False, False),
        ("reg.example", "reg.example", True, True),
        ("other.example", "reg.example", True, False),
        ("mirror.example", "mirror.example", False, True),
        ("https://index.docker.io/v1/", "registry-1.docker.io", True, True),
    ],
)
def test_bound_to_a_host(server: str, host: str, origin: bool, allowed: bool) -> None:
    credentials = auth.from_fields("u", "p", "", server, "", "")
    domain = "docker.io" if "docker.io" in host else "reg.example"
    assert credentials.allowed_at(host, domain, origin=origin) is allowed


def test_token_requests() -> None:
    challenge = Challenge("bearer", {"realm": "https://auth.example/t?x=1", "service": "s v", "scope": "repository:a:pull"})
    basic = auth.token_request(challenge, "https://reg.example/v2", "unused", Credentials("u", "p"))
    assert basic.url == "https://auth.example/t?x=1&account=u&service=s+v&scope=repository%3Aa%3Apull"
    assert basic.headers == {"Authorization": "Basic dTpw"} and not basic.body
    refresh = auth.token_request(challenge, "https://reg.example/v2", "unused", Credentials(identity_token="idt"))
    assert "grant_type=refresh_token" in refresh.body and "refresh_token=idt" in refresh.body and "Authorization" not in refresh.headers
    assert "idt" not in repr(refresh) and "dTpw" not in repr(basic)


@pytest.mark.parametrize("realm", ["", "ftp://x/", "http://auth.example/t", "https://u:p@x/"])
def test_realms_refused(realm: str) -> None:
    with pytest.raises(Failure):
        auth.token_request(Challenge("bearer", {"realm": realm}), "https://reg.example/v2", "s", Credentials("u", "p"))


def test_tokens() -> None:
    assert auth.token_of(b'{"token":"t","expires_in":300}') == ("t", 300.0)
    assert auth.token_of(b'{"access_token":"t"}') == ("t", 60.0)
    for bad in (b"", b"[]", b"{}", b'{"token":"a\\r\\nb"}', b'{"token":7}', b"[" * 60_000):
        with pytest.raises(Failure):
            auth.token_of(bad)


def test_secrets_stay_out_of_text() -> None:
    credentials = Credentials("user", "pass-word", "identity", "registry")
    assert "pass" not in repr(credentials) and "identity" not in repr(credentials)
    assert credentials.redact("GET https://user:pass-word@x?t=identity") == "GET https://user:[redacted]@x?t=[redacted]"
