"""Descriptors on their way to the exec agent."""

from __future__ import annotations

import os

from shim.supervisor import agents


def test_low_numbers_are_lifted_and_high_ones_stay() -> None:
    """After a reconnect low numbers are free again: one that is a source must not be a target of an earlier dup2."""
    low = os.open("/dev/null", os.O_RDONLY)
    assert low < agents._RESERVED, "the test needs a low number"
    lifted: list[int] = []
    high = agents._lift(low, lifted)
    assert high >= agents._RESERVED and lifted == [high]
    assert agents._lift(high, lifted) == high and lifted == [high]
    assert not os.get_inheritable(high)
    os.close(low)
    os.close(high)
