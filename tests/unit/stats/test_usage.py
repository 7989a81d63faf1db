"""Samples of control groups: parsing, both versions, sums, rates, descriptors that stay open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.stats import usage
from cri.stats.files import Budget, Files
from cri.stats.rates import Rate
from cri.stats.usage import Usage

V1 = {
    "/a/cpuacct.usage": "123456789\n",
    "/m/memory.stat": "cache 1\nrss 2\ninactive_file 3\ntotal_cache 4096\ntotal_rss 8192\ntotal_pgfault 70\ntotal_pgmajfault 7\n"
    "total_inactive_file 1000\ntotal_swap 512\n",
    "/m/memory.usage_in_bytes": "20000\n",
    "/m/memory.limit_in_bytes": "65536\n",
    "/m/memory.memsw.limit_in_bytes": "98304\n",
    "/p/pids.current": "3\n",
}
V2 = {
    "/g/cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
    "/g/memory.stat": "anon 8192\nfile 4096\ninactive_file 1000\npgfault 70\npgmajfault 7",
    "/g/memory.current": "20000\n",
    "/g/memory.max": "max\n",
    "/g/memory.swap.current": "512\n",
    "/g/memory.swap.max": "1024\n",
    "/g/pids.current": "3\n",
    "/g/cpu.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
}
DIRECTORIES = {"cpuacct": "/a", "memory": "/m", "pids": "/p"}


def reader(files: dict[str, str]) -> usage.Read:
    return lambda path: files.get(path, "").encode()


def test_version_1() -> None:
    sample = usage.read_v1(DIRECTORIES, reader(V1))
    assert sample == Usage(123456789, 20000, 19000, 8192, 70, 7, 65536, 512, 98304 - 65536, 3)


def test_version_1_without_limits_and_swap_accounting() -> None:
    files = {**V1, "/m/memory.limit_in_bytes": "9223372036854771712\n"}
    del files["/m/memory.memsw.limit_in_bytes"]
    sample = usage.read_v1(DIRECTORIES, reader(files))
    assert sample is not None
    assert (sample.memory_limit, sample.swap, sample.swap_limit) == (None, None, None)


def test_version_2() -> None:
    sample = usage.read_v2("/g", reader(V2))
    assert sample is not None
    assert sample[:10] == (1_500_000, 20000, 19000, 8192, 70, 7, None, 512, 1024, 3)
    assert sample.cpu_stall is not None
    assert (sample.cpu_stall.some.avg10, sample.cpu_stall.some.total) == (1.5, 42)
    assert sample.memory_stall is None


def test_groups_that_are_gone() -> None:
    assert usage.read_v1(DIRECTORIES, reader({})) is None
    assert usage.read_v2("/g", reader({})) is None
    assert usage.read_v1({"pids": "/p"}, reader(V1)) is None


def test_inactive_pages_beyond_what_is_used() -> None:
    """The two are read one after the other."""
    sample = usage.read_v1(DIRECTORIES, reader({**V1, "/m/memory.usage_in_bytes": "10\n"}))
    assert sample is not None
    assert sample.working_set == 0


def test_sums() -> None:
    one = Usage(cpu=1, memory=10, working_set=5, memory_limit=100, pids=1)
    two = Usage(cpu=2, memory=20, working_set=6, swap=3)
    assert usage.total([]) is None
    assert usage.total([one, two]) == Usage(cpu=3, memory=30, working_set=11, memory_limit=None, swap=3, swap_limit=None, pids=1)
    both = usage.total([one, one])
    assert both is not None
    assert both.memory_limit == 200


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), st.integers(0, 2**64 - 1)), st.booleans())
def test_fields_are_found_by_their_whole_name(table: dict[str, int], newline: bool) -> None:
    text = "\n".join(f"{name} {value}" for name, value in table.items()) + ("\n" if newline else "")
    for name, value in table.items():
        assert usage.field(text.encode(), name.encode()) == value
    assert usage.field(text.encode(), b"no") == table.get("no", 0)


@pytest.mark.parametrize("text, value", [("", None), ("max\n", None), ("-1\n", None), ("9223372036854771712\n", None), ("0\n", 0)])
def test_limits(text: str, value: int | None) -> None:
    assert usage.limit(text.encode()) == value


S = 1_000_000_000


def test_a_rate_needs_two_samples_a_second_apart() -> None:
    rate = Rate()
    assert rate.next(0, 0) is None
    assert rate.next(S // 2, S // 4) is None
    assert rate.next(2 * S, S) == S // 2
    # another client, right after: not the rate of these few milliseconds
    assert rate.next(2 * S + 1_000_000, S + 1_000_000) == pytest.approx(S // 2, rel=0.01)
    assert rate.next(12 * S, 11 * S) == S


def test_a_counter_that_went_back_begins_anew() -> None:
    rate = Rate()
    rate.next(0, 5 * S)
    assert rate.next(10 * S, 0) is None
    assert rate.next(20 * S, S) == S // 10


@given(st.lists(st.tuples(st.integers(0, 10 * S), st.integers(-S, 10 * S)), max_size=30))
def test_rates_are_never_negative(steps: list[tuple[int, int]]) -> None:
    rate, time, used = Rate(), 0, 10 * S
    for elapsed, more in steps:
        time, used = time + elapsed, max(used + more, 0)
        found = rate.next(time, used)
        assert found is None or found >= 0


def test_files_stay_open_within_the_budget(tmp_path: Path) -> None:
    names = [tmp_path / str(n) for n in range(3)]
    for path in names:
        path.write_text("1\n")
    before = len(os.listdir("/proc/self/fd"))
    budget = Budget(2)
    files = Files(budget)
    for value in ("1\n", "22\n", ""):
        for path in names:
            path.write_text(value)
            assert files.read(str(path)) == value.encode()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert budget.take()
    assert budget.take()
    assert not budget.take()


def test_files_that_are_absent_or_refuse(tmp_path: Path) -> None:
    files = Files(Budget(10))
    assert files.read(str(tmp_path / "none")) == b""
    with pytest.raises(IsADirectoryError) as failed:
        files.read(str(tmp_path))
    assert failed.value.filename == str(tmp_path)
    files.close()
