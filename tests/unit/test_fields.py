"""hack/fields.md is complete, up to date, and names tests that exist."""

from __future__ import annotations

import pytest

from hack import fields


def test_every_field_is_declared_and_shown_by_tests_that_exist() -> None:
    assert fields.problems() == []


def test_the_table_is_up_to_date() -> None:
    assert fields.TABLE.read_text() == fields.render(), "python -m hack.fields"


def test_what_is_missing_or_stale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = fields.load()
    del declared["Mount"]["image"]
    declared["Mount"]["gone"] = ["said", "tests/unit/test_fields.py::test_the_table_is_up_to_date"]
    declared["Device"]["permissions"] = ["said", "tests/unit/test_fields.py::test_nowhere"]
    declared["Device"]["host_path"] = ["said"]
    monkeypatch.setattr(fields, "load", lambda: declared)
    assert fields.problems() == [
        "Mount.image is not declared",
        "Mount.gone is not a field of the protocol",
        "Device.host_path has no sentence or no test",
        "Device.permissions: there is no tests/unit/test_fields.py::test_nowhere",
    ]


def test_the_walk_reaches_nested_messages() -> None:
    found = fields.fields()
    assert {"IDMapping", "Capability", "SecurityProfile", "HugepageLimit", "RuntimeHandlerFeatures", "LinuxContainerUser"} <= found.keys()
    assert sum(map(len, found.values())) > 140
    assert not any(name.startswith("Windows") for name in found)
