"""Parsing of statistics files."""

from __future__ import annotations

from shim.cgroups import stats


def test_pressure() -> None:
    text = "some avg10=1.50 avg60=0.20 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    found = stats.pressure(text)
    assert found is not None and found.full is not None
    assert (found.some.avg10, found.some.total, found.full.total) == (1.5, 123, 7)
    assert stats.pressure("") is None


def test_io_of_version_2() -> None:
    text = "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n7:1 \n253:0 cost.usage=5 rbytes=3\n"
    assert stats._io_v2(text) == (stats.Io(8, 0, 10, 20, 1, 2), stats.Io(253, 0, 3, 0, 0, 0))


def test_limits() -> None:
    assert stats._limit("max\n") is None
    assert stats._limit("9223372036854771712") is None
    assert stats._limit("-1") is None
    assert stats._limit("4096\n") == 4096
