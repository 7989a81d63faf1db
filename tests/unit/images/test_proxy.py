import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images.proxy import bypassed, proxy_for
from shim.errors import Failure

PROXY = {"http_proxy": "http://proxy:3128", "HTTPS_PROXY": "https://user:p%40ss@secure:3129"}


@pytest.mark.parametrize(
    "no_proxy, host, direct",
    [
        ("", "reg.example", False),
        ("*", "reg.example", True),
        ("reg.example", "reg.example", True),
        ("example", "reg.example", True),
        (" Reg.Example ,x", "reg.EXAMPLE", True),
        ("eg.example", "reg.example", False),
        (".example", "reg.example", True),
        (".reg.example", "reg.example", False),
        ("*.example", "a.reg.example", True),
        ("*.example", "example", False),
        ("reg.example:5000", "reg.example", True),
        ("reg.example:5001", "reg.example", False),
        ("10.0.0.0/8", "10.200.3.4", True),
        ("10.0.0.0/8", "11.0.0.1", False),
        ("10.1.2.3/8", "10.200.3.4", True),
        ("10.0.0.0/8", "10.example", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:5000", "10.1.2.3", True),
        ("10.1.2.3:1", "10.1.2.3", False),
        ("fd00::/8", "fd12::1", True),
        ("[fd12::1]:5000", "fd12::1", True),
        ("fd12:0::1", "fd12::1", True),
        ("10.0.0.0/8", "::ffff:10.1.1.1", True),
        ("10.0.0.0/99,/,:,[,10.0.0.0/x", "10.1.1.1", False),
    ],
)
def test_no_proxy(no_proxy: str, host: str, direct: bool) -> None:
    assert bypassed(host, 5000, no_proxy) is direct


def test_choice() -> None:
    assert proxy_for("http://reg.example/v2/", PROXY) == "http://proxy:3128"
    assert proxy_for("https://reg.example/v2/", PROXY) == "https://user:p%40ss@secure:3129"
    assert proxy_for("https://reg.example/v2/", {"HTTPS_PROXY": "proxy:3128"}) == "http://proxy:3128"
    assert proxy_for("https://reg.example:8443/", {**PROXY, "NO_PROXY": "reg.example:8443"}) is None
    assert proxy_for("https://reg.example/", {**PROXY, "NO_PROXY": "reg.example:443"}) is None
    for host in ("localhost:5000", "127.0.0.1", "127.9.9.9:1", "[::1]:5000"):
        assert proxy_for(f"http://{host}/v2/", PROXY) is None
    for bad in ("socks5://u:secret@h:1", "http://", "http://u:secret@h:99999"):
        with pytest.raises(Failure, match="HTTP_PROXY") as caught:
            proxy_for("http://reg.example/", {"http_proxy": bad})
        assert "secret" not in str(caught.value)


@given(st.text(max_size=60), st.sampled_from(["reg.example", "10.0.0.1", "::1", "fd00::1", ""]), st.integers(0, 65535))
def test_any_no_proxy_is_survived(text: str, host: str, port: int) -> None:
    bypassed(host, port, text)
