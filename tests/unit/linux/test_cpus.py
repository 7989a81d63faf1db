"""Lists of processors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.linux import cpus


@pytest.mark.parametrize(("text", "found"), [("0", (0,)), ("0-2,8", (0, 1, 2, 8)), ("3,1", (1, 3)), ("1-1", (1,)), ("70", (70,))])
def test_parse(text: str, found: tuple[int, ...]) -> None:
    assert cpus.parse(text) == found
    mask = int.from_bytes(cpus.mask(text), "little")
    assert [n for n in range(128) if mask >> n & 1] == list(found)
    assert len(cpus.mask(text)) % 8 == 0


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "99999", "1-99999", "\u0661"])
def test_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="processors"):
        cpus.parse(text)


@given(st.text(max_size=20))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    try:
        assert cpus.parse(text)
    except ValueError:
        return
