"""Descriptors on their way to the exec agent."""

from __future__ import annotations

import os

import pytest

from shim.supervisor import agents


def test_low_numbers_are_lifted_and_high_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reconnect low numbers are free again: one that is a source must not be a target of an earlier dup2."""
    low = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(agents, "_RESERVED", low + 20)
    lifted: list[int] = []
    high = agents._lift(low, lifted)
    assert high >= low + 20 and lifted == [high]
    assert agents._lift(high, lifted) == high and lifted == [high]
    assert not os.get_inheritable(high)
    os.close(low)
    os.close(high)
