"""CDI files: what is accepted, what is refused and by which name, from which version on."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.cdi import model, registry
from cri.cdi.model import CdiError, File

EDITS: dict[str, Any] = {
    "env": ["A=1"],
    "deviceNodes": [
        {"path": "/dev/x", "hostPath": "/dev/y", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "permissions": "rw", "uid": 1}
    ],
    "netDevices": [{"hostInterfaceName": "eth9", "name": "net0"}],
    "mounts": [{"hostPath": "/lib/x", "containerPath": "/lib/y", "type": "none", "options": ["ro", "bind"]}],
    "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook", "x"], "env": ["B=2"], "timeout": 3}],
    "intelRdt": {"closID": "gold", "l3CacheSchema": "L3:0=f", "memBwSchema": "", "schemata": ["x"], "enableMonitoring": True},
    "additionalGids": [0, 44],
}
WHOLE: dict[str, Any] = {
    "cdiVersion": "1.1.0",
    "kind": "vendor.com/gpu",
    "annotations": {"a": "b"},
    "devices": [{"name": "0", "annotations": {}, "containerEdits": EDITS}, {"name": "all", "containerEdits": {"env": ["ALL=1"]}}],
    "containerEdits": {"env": ["EVERY=1"]},
}
PLAIN: dict[str, Any] = {"cdiVersion": "0.3.0", "kind": "v/c", "devices": [{"name": "d", "containerEdits": {"env": ["A=1"]}}]}


def test_whole() -> None:
    file = model.parse(WHOLE)
    assert file.kind == "vendor.com/gpu"
    edits = file.devices[0].container_edits
    assert edits.device_nodes and edits.device_nodes[0].host_path == "/dev/y"
    assert edits.intel_rdt and (edits.intel_rdt.clos_id, edits.intel_rdt.l3_cache_schema) == ("gold", "L3:0=f")
    assert edits.net_devices and edits.net_devices[0].host_interface_name == "eth9"


def test_nulls_as_go_writes_them() -> None:
    edits = {"env": ["A=1"], "deviceNodes": None, "mounts": None, "hooks": None, "additionalGids": None, "intelRdt": None}
    file = model.parse(PLAIN | {"devices": [{"name": "d", "containerEdits": edits}]})
    assert file.devices[0].container_edits.env == ("A=1",)


def with_edits(**edits: Any) -> dict[str, Any]:
    return WHOLE | {"devices": [{"name": "d", "containerEdits": edits}]}


AT = "devices[0].containerEdits"


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ([], "array"),
        ({}, "cdiVersion"),
        (PLAIN | {"cdiVersion": "2.0.0"}, "cdiVersion"),
        (PLAIN | {"cdiVersion": 0.5}, "cdiVersion"),
        (PLAIN | {"kind": "gpu"}, "kind"),
        (PLAIN | {"kind": "a/b/c"}, "kind"),
        (PLAIN | {"kind": "1a/b"}, "kind"),
        (PLAIN | {"devices": []}, "devices"),
        (PLAIN | {"cdiDevices": []}, "cdiDevices"),
        (PLAIN | {"devices": [{"name": "d"}]}, "devices[0].containerEdits"),
        (PLAIN | {"devices": [{"name": "a b", "containerEdits": {"env": ["A=1"]}}]}, "devices[0].name"),
        (PLAIN | {"devices": PLAIN["devices"] * 2}, "devices[1].name"),
        (with_edits(env=["A"]), f"{AT}.env[0]"),
        (with_edits(env=["=x"]), f"{AT}.env[0]"),
        (with_edits(deviceNodes=[{}]), "path"),
        (with_edits(deviceNodes=[{"path": "dev/x"}]), f"{AT}.deviceNodes[0].path"),
        (with_edits(deviceNodes=[{"path": "/x", "type": "char"}]), f"{AT}.deviceNodes[0].type"),
        (with_edits(deviceNodes=[{"path": "/x", "major": -1}]), f"{AT}.deviceNodes[0].major"),
        (with_edits(deviceNodes=[{"path": "/x", "major": True}]), f"{AT}.deviceNodes[0].major"),
        (with_edits(deviceNodes=[{"path": "/x", "permissions": "rx"}]), f"{AT}.deviceNodes[0].permissions"),
        (with_edits(deviceNodes=[{"path": "/x", "uid": -1}]), f"{AT}.deviceNodes[0].uid"),
        (with_edits(mounts=[{"containerPath": "/x"}]), "hostPath"),
        (with_edits(mounts=[{"hostPath": "/x", "containerPath": "y"}]), f"{AT}.mounts[0].containerPath"),
        (with_edits(mounts=[{"hostPath": "/x", "containerPath": "/y", "options": ["a\nb"]}]), f"{AT}.mounts[0].options"),
        (with_edits(mounts=[{"hostPath": "/x", "containerPath": "/y", "options": "ro"}]), f"{AT}.mounts[0].options"),
        (with_edits(hooks=[{"hookName": "later", "path": "/x"}]), f"{AT}.hooks[0].hookName"),
        (with_edits(hooks=[{"hookName": "poststop", "path": "x"}]), f"{AT}.hooks[0].path"),
        (with_edits(hooks=[{"hookName": "poststop", "path": "/x", "timeout": 0}]), f"{AT}.hooks[0].timeout"),
        (with_edits(hooks=[{"hookName": "poststop", "path": "/x", "env": ["x"]}]), f"{AT}.hooks[0].env[0]"),
        (with_edits(netDevices=[{"hostInterfaceName": "a/b", "name": "x"}]), f"{AT}.netDevices[0].hostInterfaceName"),
        (with_edits(netDevices=[{"hostInterfaceName": n, "name": "x"} for n in "ab"]), f"{AT}.netDevices[1].name"),
        (with_edits(intelRdt={"closID": "../x"}), f"{AT}.intelRdt.closID"),
        (with_edits(additionalGids=[-1]), f"{AT}.additionalGids[0]"),
        (with_edits(environment=["A=1"]), "environment"),
    ],
)
def test_refused(tree: Any, where: str) -> None:
    with pytest.raises(CdiError) as raised:
        model.parse(tree)
    assert where in str(raised.value)


@pytest.mark.parametrize(
    ("change", "field", "before", "since"),
    [
        ({"annotations": {"a": "b"}}, "annotations", "0.5.0", "0.6.0"),
        ({"kind": "v/c.d"}, "kind", "0.5.0", "0.6.0"),
        ({"devices": [{"name": "1", "containerEdits": {"env": ["A=1"]}}]}, "devices[0].name", "0.4.0", "0.5.0"),
        ({"containerEdits": {"mounts": EDITS["mounts"]}}, "containerEdits.mounts.type", "0.3.0", "0.4.0"),
        ({"containerEdits": {"deviceNodes": EDITS["deviceNodes"]}}, "containerEdits.deviceNodes.hostPath", "0.4.0", "0.5.0"),
        ({"containerEdits": {"intelRdt": {"closID": "x"}}}, "containerEdits.intelRdt", "0.6.0", "0.7.0"),
        ({"containerEdits": {"additionalGids": [1]}}, "containerEdits.additionalGids", "0.6.0", "0.7.0"),
        ({"containerEdits": {"netDevices": EDITS["netDevices"]}}, "containerEdits.netDevices", "1.0.0", "1.1.0"),
        ({"containerEdits": {"intelRdt": {"schemata": ["x"]}}}, "containerEdits.intelRdt.schemata", "1.0.0", "1.1.0"),
    ],
)
def test_versions(change: dict[str, Any], field: str, before: str, since: str) -> None:
    tree = copy.deepcopy(PLAIN) | change
    model.parse(tree | {"cdiVersion": since})
    model.parse(tree | {"cdiVersion": f"v{since}"})
    with pytest.raises(CdiError, match=f"needs version {since}") as raised:
        model.parse(tree | {"cdiVersion": before})
    assert str(raised.value).startswith(f"{field}: ")


@pytest.mark.parametrize("name", ["", "x", "v/c", "v/c=", "v=d", "/c=d", "v/=d", "v/c=a b", "v/c=a=b", "v/c=a/b", "v/c=d\n", "v\n/c=d"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(CdiError):
        model.qualified(name)


def test_names() -> None:
    assert model.qualified("vendor.com/net-9_x=GPU-1:2.3") == ("vendor.com/net-9_x", "GPU-1:2.3")


keys = st.sampled_from([*WHOLE, *EDITS, "path", "hostPath", "containerPath", "name", "hookName", "options", "type", "major"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["/x", "v/c", "0.6.0", "A=1", "rwm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_anything_is_a_file_or_a_named_refusal(tree: Any) -> None:
    try:
        assert isinstance(model.parse(tree), File)
    except CdiError as error:
        assert str(error)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*EDITS]), values), max_size=3), st.sampled_from(model.VERSIONS))
def test_changed_files(changes: list[tuple[str, Any]], version: str) -> None:
    tree = copy.deepcopy(WHOLE) | {"cdiVersion": version}
    for key, value in changes:
        tree["devices"][0]["containerEdits"][key] = value
    try:
        assert isinstance(model.parse(tree), File)
    except CdiError as error:
        assert str(error)


@settings(deadline=None)  # the first YAML imports its library
@given(st.binary(max_size=200), st.sampled_from(["x.json", "x.yaml"]))
def test_any_bytes(data: bytes, path: str) -> None:
    with pytest.raises(CdiError):
        registry.parse(path, data)


def test_json_and_yaml_are_the_same() -> None:
    assert registry.parse("x.json", json.dumps(WHOLE).encode()) == registry.parse("x.yaml", json.dumps(WHOLE).encode())
    text = "cdiVersion: 0.5.0\nkind: v/c\ndevices:\n- name: d\n  containerEdits:\n    deviceNodes:\n    - {path: /dev/x, fileMode: 0666}\n"
    node = registry.parse("x.yaml", text.encode()).devices[0].container_edits.device_nodes
    assert node and node[0].file_mode == 0o666
