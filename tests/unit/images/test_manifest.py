import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import manifest
from cri.images.manifest import Descriptor, Index, Manifest, Platform, choose, parse
from shim.errors import Failure

D = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": D, "size": 10}
GOOD: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": manifest.OCI_MANIFEST,
    "config": {"mediaType": manifest.OCI_CONFIG, "digest": D, "size": 5},
    "layers": [LAYER],
}


def served(document: dict[str, Any], content_type: str = manifest.OCI_MANIFEST) -> Manifest | Index:
    return parse(content_type, json.dumps(document).encode())


def test_manifest() -> None:
    found = served(GOOD)
    assert isinstance(found, Manifest)
    assert found.layers == (Descriptor(LAYER["mediaType"], D, 10),)


def test_type_of_the_document_counts_where_the_registry_says_nothing() -> None:
    assert isinstance(served(GOOD, "application/json; charset=utf-8"), Manifest)
    with pytest.raises(Failure):
        served({k: v for k, v in GOOD.items() if k != "mediaType"}, "application/json")


@pytest.mark.parametrize(
    "change",
    [
        {"mediaType": manifest.OCI_INDEX},
        {"mediaType": 7},
        {"manifests": []},
        {"fsLayers": []},
        {"schemaVersion": 1},
        {"schemaVersion": "2"},
        {"layers": None},
        {"layers": [{**LAYER, "digest": "sha256:../../../etc/passwd"}]},
        {"layers": [{**LAYER, "digest": D.upper()}]},
        {"layers": [{**LAYER, "size": -1}]},
        {"layers": [{**LAYER, "size": True}]},
        {"layers": [{**LAYER, "mediaType": "text/plain"}]},
        {"layers": [LAYER] * 501},
        {"config": {"mediaType": manifest.OCI_CONFIG, "digest": D, "size": 9 << 20}},
        {"config": None},
    ],
)
def test_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Failure):
        served({**GOOD, **change})


def test_an_index_with_a_manifests_fields_is_refused() -> None:
    document = {"schemaVersion": 2, "mediaType": manifest.OCI_INDEX, "manifests": []}
    assert isinstance(served(document, manifest.OCI_INDEX), Index)
    for extra in ({"layers": []}, {"config": {}}):
        with pytest.raises(Failure, match="also has"):
            served({**document, **extra}, manifest.OCI_INDEX)


def test_schema1_says_what_it_is() -> None:
    with pytest.raises(Failure, match="schema 1 is not supported"):
        served({"schemaVersion": 1, "fsLayers": []}, "application/vnd.docker.distribution.manifest.v1+prettyjws")


def test_too_long_and_too_deep() -> None:
    with pytest.raises(Failure, match="limit"):
        parse(manifest.OCI_MANIFEST, b" " * (manifest.MANIFEST_LIMIT + 1))
    with pytest.raises(Failure, match="not JSON"):
        parse(manifest.OCI_MANIFEST, b"[" * 1_000_000)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=20
    )
)
def test_any_json_is_parsed_or_refused(value: Any) -> None:
    for key in ("config", "layers", "mediaType", "schemaVersion"):
        try:
            served({**GOOD, key: value})
        except Failure:
            pass


def entry(platform: str, digit: str) -> Descriptor:
    return Descriptor(manifest.OCI_MANIFEST, f"sha256:{digit * 64}", 1, Platform(*platform.split("/")))


@pytest.mark.parametrize(
    "wanted, offered, chosen",
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64", "unknown/unknown"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3"], None),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm64/v8", ["linux/arm64", "linux/arm64/v8"], 1),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"], 1),
        ("linux/amd64", ["windows/amd64"], None),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
    ],
)
def test_platform(wanted: str, offered: list[str], chosen: int | None) -> None:
    entries = tuple(entry(p, str(i)) for i, p in enumerate(offered))
    index = Index(manifest.OCI_INDEX, entries)
    if chosen is None:
        with pytest.raises(Failure, match="the index has"):
            choose(index, Platform(*wanted.split("/")))
    else:
        assert choose(index, Platform(*wanted.split("/"))) == entries[chosen]


def test_diff_ids() -> None:
    assert manifest.diff_ids({"rootfs": {"diff_ids": [D]}}, 1) == (D,)
    for config, layers in (({}, 1), ({"rootfs": {"diff_ids": [D, D]}}, 1), ({"rootfs": {"diff_ids": ["x"]}}, 1), ({"rootfs": []}, 1)):
        with pytest.raises(Failure):
            manifest.diff_ids(config, layers)
