from pathlib import Path

import pytest

from cri.images import hosts
from shim.errors import Failure


def write(directory: Path, domain: str, text: str) -> None:
    (directory / domain).mkdir()
    (directory / domain / "hosts.toml").write_text(text)


def bases(directory: Path | None, domain: str) -> list[str]:
    return [e.base for e in hosts.endpoints(directory, domain)]


def test_without_files(tmp_path: Path) -> None:
    assert bases(tmp_path, "docker.io") == ["https://registry-1.docker.io/v2"]
    assert bases(None, "reg.example:5000") == ["https://reg.example:5000/v2"]
    for local in ("localhost:5000", "127.0.0.1:5000", "[::1]:5000"):
        assert bases(tmp_path, local) == [f"https://{local}/v2", f"http://{local}/v2"]


def test_mirrors_come_first_and_are_not_origins(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
        server = "https://registry-1.docker.io"
        [host."http://mirror.local:5000"]
          capabilities = ["pull"]
          [host."http://mirror.local:5000".header]
            x-token = ["a"]
        [host."https://second.local/prefix"]
          override_path = true
          skip_verify = true
          ca = "ca.pem"
          client = [["c.pem", "k.pem"], "both.pem"]
        """,
    )
    first, second, origin = hosts.endpoints(tmp_path, "docker.io")
    assert (first.base, first.capabilities, first.origin) == ("http://mirror.local:5000/v2", {"pull"}, False)
    assert first.headers == (("x-token", "a"),) and "x-token" not in repr(first)
    assert (second.base, second.skip_verify, second.ca) == ("https://second.local/prefix", True, (str(tmp_path / "docker.io/ca.pem"),))
    assert second.client == (
        (str(tmp_path / "docker.io/c.pem"), str(tmp_path / "docker.io/k.pem")),
        (str(tmp_path / "docker.io/both.pem"), ""),
    )
    assert (origin.base, origin.origin) == ("https://registry-1.docker.io/v2", True)


def test_server_listed_among_the_hosts_is_asked_once(tmp_path: Path) -> None:
    write(tmp_path, "reg.example", 'server = "http://127.0.0.1:5000"\n[host."http://127.0.0.1:5000"]\ncapabilities = ["pull", "resolve"]\n')
    (only,) = hosts.endpoints(tmp_path, "reg.example")
    assert only.base == "http://127.0.0.1:5000/v2" and only.origin


@pytest.mark.parametrize("name", ["reg.example:5000", "reg.example_5000_", "reg.example", "_default"])
def test_directory_names(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, 'server = "https://found"\n')
    assert bases(tmp_path, "reg.example:5000") == ["https://found/v2"]


@pytest.mark.parametrize(
    "text", ["skip_verfy = true\n", "server = 7\n", 'server = "ftp://x"\n', "not toml", '[host."https://u:p@x"]\n', "dial_timeout = 3\n"]
)
def test_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, "reg.example", text)
    with pytest.raises(Failure, match=r"hosts\.toml"):
        hosts.endpoints(tmp_path, "reg.example")
