"""Every known attack has a test or a reason, and every test that is named exists."""

from __future__ import annotations

import pytest

from tests.attacks import coverage


@pytest.mark.parametrize(("part", "what", "ids"), coverage.ROWS)
def test_every_row_is_covered(part: str, what: str, ids: tuple[str, ...]) -> None:
    found = coverage.claims()
    missing = [attack for attack in ids if not found.get(attack) and attack not in coverage.REASONS]
    assert not missing, f"{part}, {what}"


def test_what_is_named_exists() -> None:
    for attack, tests in coverage.ELSEWHERE.items():
        for test in tests:
            path, _, name = test.partition("::")
            assert (coverage.TESTS / path).exists(), f"{attack}: {path}"
            assert not name or name in coverage.functions(coverage.TESTS / path), f"{attack}: {test}"


def test_no_id_is_listed_twice() -> None:
    every = [attack for _, _, ids in coverage.ROWS for attack in ids]
    assert len(every) == len(set(every))
    assert not coverage.REASONS.keys() & coverage.claims().keys(), "a reason for what is tested"


def test_the_table_has_every_row() -> None:
    assert coverage.table().count("\n| ") == len(coverage.ROWS)
