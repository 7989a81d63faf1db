"""The allocator, and reservations on disk."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import ConfigError, ResourceExhausted
from cri.network.ipam import HostPort, Reservations, gateway, next_free, parse_subnets

V4 = ip_network("10.9.0.0/24")


def test_first_address_is_after_the_gateway() -> None:
    assert str(gateway(V4)) == "10.9.0.1"
    assert str(next_free(V4, [])) == "10.9.0.2"
    assert str(next_free(ip_network("fd00::/64"), [])) == "fd00::2"


def test_goes_on_after_the_newest_and_wraps() -> None:
    assert str(next_free(V4, [], ip_address("10.9.0.9"))) == "10.9.0.10"
    assert str(next_free(V4, [], ip_address("10.9.0.254"))) == "10.9.0.2"
    assert str(next_free(V4, [], ip_address("192.0.2.1"))) == "10.9.0.2"


@given(st.sets(st.integers(2, 14), max_size=13), st.integers(0, 15))
def test_never_one_that_is_used_or_special(used: set[int], after: int) -> None:
    subnet = ip_network("10.9.0.0/28")
    addresses = [subnet[i] for i in used]
    if len(used) == 13:
        with pytest.raises(ResourceExhausted):
            next_free(subnet, addresses, subnet[after])
        return
    free = next_free(subnet, addresses, subnet[after])
    assert free in subnet and free not in addresses
    assert free not in (subnet[0], subnet[1], subnet[15])


def test_ipv6_uses_its_last_address() -> None:
    subnet = ip_network("fd00::/126")
    assert {str(next_free(subnet, [])), str(next_free(subnet, [subnet[2]]))} == {"fd00::2", "fd00::3"}


@pytest.mark.parametrize("texts", [[], ["10.0.0.0/31"], ["10.0.0.1/24"], ["x"], ["10.0.0.0/24", "10.1.0.0/24"]])
def test_subnets_that_cannot_be_used(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"network\.subnets"):
        parse_subnets(texts)


def test_reservations_survive_and_a_reboot_frees_them(tmp_path: Path) -> None:
    subnets = parse_subnets(["10.9.0.0/24", "fd00::/64"])
    first = Reservations(tmp_path, "boot-1")
    held = first.allocate("a", subnets, "csva", (HostPort("tcp", 80, 8080),))
    first.record(held)
    first.allocate("b", subnets, "csvb")  # never recorded: the daemon died before anything was acquired
    first.close()
    (tmp_path / ".a.json.1.2").write_text("torn temporary file")

    second = Reservations(tmp_path, "boot-1")
    assert second.held == {"a": held}
    assert [str(i) for i in held.interfaces] == ["10.9.0.2/24", "fd00::2/64"]
    assert second.allocate("c", subnets, "csvc").addresses == ("10.9.0.3/24", "fd00::3/64")
    second.close()

    third = Reservations(tmp_path, "boot-2")
    assert not third.held and not list(tmp_path.iterdir())
    third.close()


@pytest.mark.parametrize("content", ["", "{", '{"pod_id": "other", "boot_id": "b", "addresses": [], "link": "x"}', "[]", "\0" * 100])
def test_a_torn_reservation_is_set_aside(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    reservations = Reservations(tmp_path, "b")
    assert not reservations.held
    assert [p.name for p in tmp_path.iterdir()] == ["a.json.corrupt"]
    reservations.close()


def test_erase_and_forget(tmp_path: Path) -> None:
    reservations = Reservations(tmp_path, "b")
    held = reservations.allocate("a", parse_subnets(["10.9.0.0/24"]), "csva")
    reservations.record(held)
    for _ in range(2):
        reservations.erase("a")
        reservations.forget("a")
    assert not reservations.held and not list(tmp_path.iterdir())
    reservations.close()
