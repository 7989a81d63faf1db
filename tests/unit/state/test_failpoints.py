from __future__ import annotations

import pytest

from cri.errors import Internal
from cri.state import failpoints


def test_parse() -> None:
    assert failpoints.parse("") == {}
    assert failpoints.parse("a b/c=exit;d/e=sleep:0.5;f/g=raise") == {"a b/c": "exit", "d/e": "sleep:0.5", "f/g": "raise"}
    with pytest.raises(ValueError, match="unknown action"):
        failpoints.parse("a=explode")


def test_only_the_named_stage_of_the_named_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.hit("run sandbox", "network")
    monkeypatch.setattr(failpoints, "_points", {"run sandbox/network": "raise"})
    failpoints.hit("run sandbox", "record")
    failpoints.hit("stop sandbox", "network")
    with pytest.raises(Internal, match="run sandbox/network"):
        failpoints.hit("run sandbox", "network")
