"""Network configurations: what is taken, what is refused, which one is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.network.cni import conf
from cri.network.cni.conf import ConfError, NetworkConf
from cri.network.cni.watch import Watch

BRIDGE = {"type": "bridge", "bridge": "b0", "unknown": {"a": [1, 2.5, None]}, "ipam": {"type": "host-local"}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True, "other": False}}


def encoded(**fields: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [BRIDGE, PORTMAP], **fields}).encode()


def test_a_list() -> None:
    network = conf.parse(encoded(disableCheck=True, disableGC="TRUE"))
    assert (network.name, network.versions, network.disable_check, network.disable_gc) == ("net", ("1.0.0",), True, True)
    assert [p.type for p in network.plugins] == ["bridge", "portmap"]
    assert network.plugins[0].raw == BRIDGE and network.plugins[0].types == ("bridge", "host-local")
    assert network.plugins[1].capabilities == {"portMappings"}


def test_one_plugin_is_a_network() -> None:
    network = conf.parse_single(json.dumps({"name": "single", "cniVersion": "0.3.1", **BRIDGE}).encode())
    assert (network.name, network.versions, len(network.plugins)) == ("single", ("0.3.1",), 1)


def test_what_is_kept_for_delete_is_the_same_network_in_one_version() -> None:
    network = conf.parse(encoded(cniVersions=["0.4.0", "1.1.0"], disableGC=True))
    again = conf.parse(network.encode("0.4.0"))
    assert again == NetworkConf("net", ("0.4.0",), network.plugins, disable_gc=True)


@pytest.mark.parametrize(
    "single, several, expected",
    [
        ("", [], ("0.1.0",)),
        ("0.3.1", [], ("0.3.1",)),
        ("1.0.0", ["0.3.1", "1.1.0", "0.4.0"], ("1.1.0", "1.0.0", "0.4.0", "0.3.1")),
        ("", ["0.4.0"], ("0.4.0",)),
        ("2.0.0", ["1.0.0", "1.2.0"], ("1.0.0",)),
        ("0.10.0", ["0.9.0"], ("0.10.0", "0.9.0")),
    ],
)
def test_versions_newest_first_and_none_that_we_do_not_speak(single: str, several: list[str], expected: tuple[str, ...]) -> None:
    assert conf.parse(encoded(cniVersion=single, cniVersions=several)).versions == expected


@pytest.mark.parametrize(
    "spoken, chosen",
    [
        ([{"0.3.1", "0.4.0", "1.0.0"}, {"1.0.0", "1.1.0"}], "1.0.0"),
        ([{"0.3.1", "0.4.0"}, {"1.0.0"}], ""),
        ([{"1.1.0", "0.1.0"}], "1.1.0"),
        ([], "1.1.0"),
    ],
)
def test_the_newest_version_that_all_plugins_speak(spoken: list[set[str]], chosen: str) -> None:
    assert conf.choose_version(("1.1.0", "1.0.0", "0.4.0", "0.3.1"), spoken) == chosen


@pytest.mark.parametrize("kind", ["../../bin/sh", "/bin/sh", "..", ".", "", "a/b", "a\\b", "a\0", "a\n", None, 1, "x" * 256])
def test_a_type_is_a_plain_file_name(kind: object) -> None:
    """CVE-2021-20206."""
    with pytest.raises(ConfError, match="type"):
        conf.parse(encoded(plugins=[{"type": kind}]))
    if kind:
        with pytest.raises(ConfError, match="ipam.type"):
            conf.parse(encoded(plugins=[{"type": "bridge", "ipam": {"type": kind}}]))


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"name": "../x"}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": 3}, "name"),
        ({"name": "n" * 161}, "name: longer"),
        ({"cniVersion": "1.2.0"}, "newer than 1.1.0"),
        ({"cniVersion": "one"}, "not a version"),
        ({"cniVersion": 1}, "cniVersion"),
        ({"cniVersions": "1.0.0"}, "cniVersions"),
        ({"plugins": []}, "no plugins"),
        ({"plugins": {}}, "plugins: not a list"),
        ({"plugins": ["bridge"]}, r"plugins\[0\]: not an object"),
        ({"disableGC": 1}, "disableGC"),
        ({"plugins": [{"type": "a", "capabilities": ["x"]}]}, r"plugins\[0\].capabilities"),
    ],
)
def test_what_is_refused_and_why(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfError, match=why):
        conf.parse(encoded(**fields))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(ConfError):
        conf.decode(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["cniVersion", "cniVersions", "name", "plugins", "type", "ipam", "capabilities", "disableGC", "loadOnlyInlinedPlugins"]
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.dictionaries(keys, values, max_size=5), st.lists(st.dictionaries(keys, values, max_size=4), max_size=3))
def test_nothing_but_a_network_or_a_conf_error_comes_of_json(fields: dict[str, Any], plugins: list[dict[str, Any]]) -> None:
    for raw in (fields, {**fields, "name": "n", "plugins": plugins}, {"name": "n", "plugins": [{"type": "t", **p} for p in plugins]}):
        try:
            network = conf.parse(json.dumps(raw).encode())
        except ConfError:
            continue
        assert network.plugins and all("/" not in p.type for p in network.plugins)
        assert conf.parse(network.encode(network.versions[0])).plugins == network.plugins


@settings(deadline=None, max_examples=50)
@given(st.binary())
def test_nothing_but_an_object_or_a_conf_error_comes_of_bytes(data: bytes) -> None:
    try:
        assert isinstance(conf.decode(data), dict)
    except ConfError:
        pass


# -- the directory


def test_the_first_usable_file_by_name(tmp_path: Path) -> None:
    (tmp_path / "30-c.conflist").write_bytes(encoded(name="third"))
    (tmp_path / "20-b.conf").write_text(json.dumps({"name": "second", **PORTMAP}))
    (tmp_path / "10-a.conflist").write_bytes(b"{ torn")
    (tmp_path / "15-list.conf").write_bytes(encoded())
    (tmp_path / "05-other.txt").write_bytes(encoded(name="other"))
    (tmp_path / "01-directory.conf").mkdir()
    network, problems = conf.load(tmp_path)
    assert network is not None and network.name == "second" and network.source == str(tmp_path / "20-b.conf")
    assert len(problems) == 2 and "10-a" in problems[0] and "must end in .conflist" in problems[1]


def test_plugins_from_the_directory_with_the_networks_name(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "2.conf").write_text(json.dumps({"type": "two"}))
    (tmp_path / "net" / "1.conf").write_text(json.dumps({"type": "one"}))
    file = tmp_path / "10.conflist"
    file.write_bytes(encoded())
    assert [p.type for p in conf.load_file(file).plugins] == ["bridge", "portmap", "one", "two"]
    file.write_bytes(encoded(loadOnlyInlinedPlugins=True))
    assert [p.type for p in conf.load_file(file).plugins] == ["bridge", "portmap"]
    file.write_text(json.dumps({"name": "net"}))
    assert [p.type for p in conf.load_file(file).plugins] == ["one", "two"]
    file.write_text(json.dumps({"name": "net", "loadOnlyInlinedPlugins": True}))
    with pytest.raises(ConfError, match="no plugins"):
        conf.load_file(file)


def test_the_directory_is_watched(tmp_path: Path) -> None:
    directory = tmp_path / "net.d"
    watch = Watch(directory)
    with pytest.raises(ConfError, match=f"^cni plugin not initialized: no network config found in {directory}$"):
        watch.current()
    directory.mkdir()
    (directory / "50.conflist").write_bytes(encoded(name="one"))
    first = watch.current()
    assert first.name == "one" and watch.current() is first
    (directory / "40.conflist").write_bytes(encoded(name="two"))
    assert watch.current().name == "two"
    (directory / "40.conflist").write_bytes(encoded(name="six"))
    assert watch.current().name == "six"
    (directory / "six").mkdir()
    (directory / "six" / "1.conf").write_text(json.dumps({"type": "more"}))
    assert watch.current().plugins[-1].type == "more"
    for name in ("40.conflist", "50.conflist"):
        (directory / name).write_bytes(b"")
    with pytest.raises(ConfError, match=r"40.conflist: not JSON.*50.conflist: not JSON"):
        watch.current()
