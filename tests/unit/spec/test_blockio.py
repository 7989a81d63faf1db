"""Block I/O classes: the file, quantities, annotations, and what a class means on the devices that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.errors import FailedPrecondition
from cri.spec import blockio
from cri.spec.blockio import BlockioError, Item
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.spec import BlockIO, ThrottleDevice, WeightDevice

TEXT = """
classes:
  slow:
  - Weight: 80
  - Devices: [/dev/sd*, /dev/none*]
    ThrottleReadBps: 50M
    ThrottleWriteBps: 1Ki
    throttleReadIOPS: 10k
    Weight: 50
  - devices: [/dev/sdb]
    ThrottleWriteIOPS: "1.5"
    ThrottleReadBps: 0
  empty:
"""


def devices(pattern: str) -> Sequence[tuple[int, int]]:
    return {"/dev/sd*": [(8, 0), (8, 16)], "/dev/sdb": [(8, 16)]}.get(pattern, [])


def test_file() -> None:
    classes = blockio.parse(yaml.safe_load(TEXT))
    assert classes["slow"][0] == Item(weight=80)
    assert classes["slow"][1] == Item(("/dev/sd*", "/dev/none*"), 50, (50_000_000, 1024, 10_000, None))
    assert classes["slow"][2].throttles == (0, None, None, 2)
    assert classes["empty"] == ()
    assert blockio.parse(None) == {} and blockio.parse({}) == {}


def test_class() -> None:
    built = blockio.build("slow", blockio.parse(yaml.safe_load(TEXT)), devices)
    assert built == BlockIO(
        80,
        None,
        (WeightDevice(8, 0, 50), WeightDevice(8, 16, 50)),
        (ThrottleDevice(8, 0, 50_000_000), ThrottleDevice(8, 16, 0)),
        (ThrottleDevice(8, 0, 1024), ThrottleDevice(8, 16, 1024)),
        (ThrottleDevice(8, 0, 10_000), ThrottleDevice(8, 16, 10_000)),
        (ThrottleDevice(8, 16, 2),),
    )
    assert blockio.build("empty", blockio.parse(yaml.safe_load(TEXT)), devices) == BlockIO()
    with pytest.raises(FailedPrecondition, match="'fast' is not one of empty, slow"):
        blockio.build("fast", blockio.parse(yaml.safe_load(TEXT)), devices)


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ([], "not a map"),
        ({"Klasses": {}}, "Klasses: unknown key"),
        ({"Classes": []}, "Classes: not a map"),
        ({"Classes": {"x": {}}}, "Classes.x: not a list"),
        ({"Classes": {"x": [1]}}, "Classes.x[0]: not a map"),
        ({"Classes": {"x": [{"Wait": 1}]}}, "Classes.x[0].Wait: unknown key"),
        ({"Classes": {"x": [{"Weight": 9}]}}, "Classes.x[0].Weight: 9 is outside"),
        ({"Classes": {"x": [{"Weight": "heavy"}]}}, "Classes.x[0].Weight: 'heavy'"),
        ({"Classes": {"x": [{"Weight": True}]}}, "Classes.x[0].Weight"),
        ({"Classes": {"x": [{"Devices": "/dev/sda"}]}}, "Classes.x[0].Devices"),
        ({"Classes": {"x": [{"Devices": ["sda"]}]}}, "Classes.x[0].Devices"),
        ({"Classes": {"x": [{"ThrottleReadBps": "1M"}]}}, "Classes.x[0]: throttles without Devices"),
        ({"Classes": {"x": [{"Devices": ["/dev/sda"], "ThrottleReadBps": "9E9"}]}}, "Classes.x[0].throttlereadbps"),
        ({"Classes": {"x": [{"Devices": ["/dev/sda"], "ThrottleReadBps": "99E"}]}}, "too large"),
    ],
)
def test_refused(tree: Any, where: str) -> None:
    with pytest.raises(BlockioError) as raised:
        blockio.parse(tree)
    assert where in str(raised.value)


def test_whose_annotation_counts() -> None:
    def asked(container: dict[str, str], pod: dict[str, str]) -> str:
        metadata = v1.ContainerMetadata(name="ctr")
        return blockio.class_of(v1.ContainerConfig(metadata=metadata, annotations=container), v1.PodSandboxConfig(annotations=pod))

    own, for_one, for_all = {blockio.CONTAINER_ANNOTATION: "a"}, {f"{blockio.POD_CONTAINER_PREFIX}ctr": "b"}, {blockio.POD_ANNOTATION: "c"}
    assert asked(own, for_one | for_all) == "a"
    assert asked({}, for_one | for_all) == "b"
    assert asked({}, {f"{blockio.POD_CONTAINER_PREFIX}other": "b"} | for_all) == "c"
    assert asked({}, {}) == ""


names = st.sampled_from(["Classes", "Devices", "Weight", "ThrottleReadBps", "x"])
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["10M", "/dev/x", "1e3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=15,
)


@settings(deadline=None)
@given(trees)
def test_anything_is_classes_or_a_refusal(tree: Any) -> None:
    try:
        blockio.parse(tree)
    except BlockioError as error:
        assert str(error)
