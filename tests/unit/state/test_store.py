from __future__ import annotations

from dataclasses import dataclass

import pytest

from cri.errors import AlreadyExists, InvalidArgument
from cri.state.listing import ListCache, labels_match
from cri.state.store import Store


@dataclass(frozen=True)
class Thing:
    id: str
    name: str


A, B, C = Thing("ab" + "0" * 62, "a"), Thing("ac" + "0" * 62, "b"), Thing("ff" + "0" * 62, "c")


@pytest.fixture
def store() -> Store[Thing]:
    found: Store[Thing] = Store("thing")
    for thing in (A, B, C):
        found.add(thing)
    return found


def test_by_id_by_beginning_and_by_name(store: Store[Thing]) -> None:
    assert store.get(A.id) is A
    assert store.get("f") is C
    assert store.get("ab") is A
    assert store.get("") is None
    assert store.get("ab1") is None
    assert store.get("ab" + "0" * 61 + "1") is None
    assert store.get(A.id + "0") is None
    assert store.named("b") is B
    assert list(store) == [A, B, C]


def test_an_ambiguous_beginning_is_refused(store: Store[Thing]) -> None:
    with pytest.raises(InvalidArgument, match="ambiguous"):
        store.get("a")


def test_a_name_is_free_after_discard(store: Store[Thing]) -> None:
    before = store.version
    with pytest.raises(AlreadyExists):
        store.add(Thing("0" * 64, "a"))
    assert store.version == before
    store.discard(A)
    store.discard(A)
    assert store.version == before + 1
    store.add(Thing("0" * 64, "a"))
    assert store.get(A.id) is None


def test_cached_answers_live_as_long_as_their_version() -> None:
    cache: ListCache[str] = ListCache()
    assert cache.get(1, b"q") is None
    cache.put(1, b"q", "one")
    assert cache.get(1, b"q") == "one"
    assert cache.get(1, b"other") is None
    assert cache.get(2, b"q") is None
    assert cache.put(1, b"q", "stale") == "stale"
    assert cache.get(2, b"q") is None


def test_labels() -> None:
    assert labels_match({}, {})
    assert labels_match({"a": "1"}, {"a": "1", "b": "2"})
    assert not labels_match({"a": "1"}, {"a": "2"})
    assert not labels_match({"a": ""}, {})
