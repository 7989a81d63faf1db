"""Artifacts: which manifests are some, and the names of their files, which come from whoever made them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.images import artifact, manifest
from cri.images.manifest import Manifest
from shim.errors import Failure

D = "sha256:" + "a" * 64
EMPTY = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": D, "size": 2}
TITLE = "org.opencontainers.image.title"


def parsed(*blobs: dict[str, Any] | None, media_type: str = manifest.OCI_MANIFEST, config: Any = EMPTY, **fields: Any) -> Manifest:
    layers = [{"mediaType": "text/plain", "digest": D, "size": 3, **({"annotations": b} if b is not None else {})} for b in blobs]
    document = {"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers, **fields}
    found = manifest.parse(media_type, json.dumps(document).encode())
    assert isinstance(found, Manifest)
    return found


def names(*titles: str) -> list[str]:
    return [file.name for file in artifact.files(parsed(*({TITLE: title} for title in titles)))]


def test_types() -> None:
    assert parsed({TITLE: "x"}, artifactType="application/x").artifact_type == "application/x"
    wasm = {**EMPTY, "mediaType": "application/vnd.wasm.config.v0+json"}
    assert parsed({TITLE: "x"}, config=wasm).artifact_type == wasm["mediaType"]
    image = {"config": {**EMPTY, "mediaType": manifest.OCI_CONFIG}}
    with pytest.raises(Failure, match="is no layer"):  # an image config makes an image, whatever else the manifest says
        parsed({TITLE: "x"}, artifactType="application/x", **image)
    with pytest.raises(Failure, match="not a container image"):
        parsed({TITLE: "x"}, media_type=manifest.DOCKER_MANIFEST)
    with pytest.raises(Failure, match="artifactType"):
        parsed({TITLE: "x"}, artifactType=7)
    with pytest.raises(Failure, match=r"layers\[0\]\.annotations"):
        parsed({TITLE: 7})


def test_names() -> None:
    assert names("model.bin", "sub/dir/./file", "a//b") == ["model.bin", "sub/dir/file", "a/b"]
    found = artifact.files(parsed({"org.cncf.model.filepath": "m/w.safetensors"}, None, {"other": "x"}, {TITLE: "", "x": ""}))
    assert [file.name for file in found] == ["m/w.safetensors"]


@pytest.mark.parametrize(
    "titles",
    [
        ["/etc/passwd"],
        ["../x"],
        ["a/../../x"],
        [".."],
        ["."],
        ["./"],
        ["a/"],
        ["a\nb"],
        ["a\0b"],
        ["x" * 256],
        ["/".join("d" * 40)],
        ["same", "./same"],
        ["a", "a/b"],
        ["a/b/c", "a/b"],
        [],
    ],
)
def test_names_that_are_refused(titles: list[str]) -> None:
    with pytest.raises(Failure):
        names(*titles)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab./\n\0é \ud800", max_size=8), max_size=4))
def test_any_names_stay_below_the_directory(titles: list[str]) -> None:
    try:
        found = names(*titles)
    except Failure:
        return
    for name in found:
        parts = name.split("/")
        assert name and not name.startswith("/") and not {"", ".", ".."} & set(parts)
    assert len(set(found)) == len(found)
