"""Every scenario of a node's life has a test or a reason, and every test that is named exists."""

from __future__ import annotations

from tests.attacks.coverage import functions
from tests.faults import coverage


def test_every_number_is_covered() -> None:
    found = coverage.claims()
    missing = [number for number in range(1, coverage.COUNT + 1) if number not in found and number not in coverage.REASONS]
    assert not missing


def test_what_is_named_exists() -> None:
    for number, tests in coverage.ELSEWHERE.items():
        for test in tests:
            path, _, name = test.partition("::")
            assert (coverage.TESTS / path).exists(), f"{number}: {path}"
            assert not name or name in functions(coverage.TESTS / path), f"{number}: {test}"


def test_claims_are_read_as_they_are_written() -> None:
    assert coverage.numbers("dies (scenarios 6-8, 23): nothing") == {6, 7, 8, 23}
    assert coverage.numbers("SCENARIOS 24 and 25: many") == {24, 25}
    assert coverage.numbers("Scenario 41, CVE-2022-23471: x") == {41}
    assert coverage.numbers("no scenario at all") == set()
