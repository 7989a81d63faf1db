"""Results and errors of plugins, in every version of the protocol."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.network.cni import result
from cri.network.cni.conf import ConfError

INTERFACES = [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}]


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"ip4": {"ip": "10.0.0.2/24", "gateway": "10.0.0.1"}, "ip6": {"ip": "fd00::2/64"}}, ("10.0.0.2", "fd00::2")),
        ({"ips": [{"version": "6", "address": "fd00::2/64"}, {"version": "4", "address": "10.0.0.2/24"}]}, ("fd00::2", "10.0.0.2")),
        (
            {"interfaces": INTERFACES, "ips": [{"interface": 0, "address": "10.0.0.1/24"}, {"interface": 2, "address": "10.0.0.2/24"}]},
            ("10.0.0.2",),
        ),
        ({"ips": [{"address": "10.0.0.2/24"}, {"address": "10.0.0.2/24"}]}, ("10.0.0.2",)),
        ({"ips": []}, ()),
        ({}, ()),
        ({"ips": None, "interfaces": None}, ()),
    ],
)
def test_addresses_in_the_plugins_order(raw: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert result.addresses(raw, "eth0") == expected


@pytest.mark.parametrize(
    "raw",
    [
        {"ips": {"address": "10.0.0.1/24"}},
        {"ips": ["10.0.0.1"]},
        {"ips": [{}]},
        {"ips": [{"address": "10.0.0.256/24"}]},
        {"ips": [{"address": 167772161}]},
        {"ips": [{"address": "10.0.0.1/24", "interface": 3}], "interfaces": INTERFACES},
        {"ips": [{"address": "10.0.0.1/24", "interface": -1}], "interfaces": INTERFACES},
        {"ips": [{"address": "10.0.0.1/24", "interface": True}], "interfaces": INTERFACES},
        {"ips": [], "interfaces": [1]},
        {"ip4": "10.0.0.1/24"},
    ],
)
def test_results_that_are_none(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfError):
        result.addresses(raw, "eth0")


def test_a_result_without_a_version_has_the_configurations() -> None:
    assert result.parse(b"{}", "0.4.0") == {"cniVersion": "0.4.0"}
    assert result.parse(b'{"cniVersion": "0.3.1", "x": 1}', "0.4.0") == {"cniVersion": "0.3.1", "x": 1}


@pytest.mark.parametrize(
    "output, text",
    [
        ({"code": 7, "msg": "Invalid", "details": "too\n small"}, "Invalid; too small (code 7)"),
        ({"code": 11, "msg": "later"}, "later (code 11)"),
        ({"code": 999, "msg": ""}, "no message (code 999)"),
        ({"code": 1, "msg": "x" * 5000}, "x" * 1000 + "… (code 1)"),
    ],
)
def test_errors(output: dict[str, Any], text: str) -> None:
    assert str(result.refusal(json.dumps(output).encode())) == text


@pytest.mark.parametrize(
    "output", [b"", b"oops", b"{}", b'{"code": "7", "msg": "x"}', b'{"code": true, "msg": "x"}', b'{"code": 7, "msg": []}']
)
def test_what_is_no_error_object(output: bytes) -> None:
    assert result.refusal(output) is None


def test_spoken_versions() -> None:
    assert result.spoken(b'{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}') == {"0.4.0", "1.0.0"}
    for broken in (b"{}", b'{"supportedVersions": "1.0.0"}', b'{"supportedVersions": [1]}'):
        with pytest.raises(ConfError):
            result.spoken(broken)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["ips", "interfaces", "ip4", "ip6", "code", "msg", "details", "address", "interface", "name", "cniVersion"])


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.dictionaries(fields, values | st.lists(st.dictionaries(fields, values, max_size=4), max_size=3), max_size=4))
def test_nothing_but_addresses_or_a_conf_error(raw: dict[str, Any]) -> None:
    result.refusal(json.dumps(raw).encode())
    try:
        assert all(isinstance(a, str) for a in result.addresses(raw, "eth0"))
    except ConfError:
        pass
