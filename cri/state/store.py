"""The objects in memory, found by id, by a unique beginning of an id, or by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from cri.errors import AlreadyExists, InvalidArgument

ID_LENGTH = 64


class Named(Protocol):
    """What a store keeps."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str:
        """Unique among the live objects of the store; made from the CRI metadata."""
        ...


T = TypeVar("T", bound=Named)


class Store(Generic[T]):
    """Committed pods or containers. Single-threaded: only the event loop touches it.

    ``version`` grows with every change that a list may show; cached list responses carry the version they were built from.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._by_id: dict[str, T] = {}
        self._by_name: dict[str, T] = {}
        self.version = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[T]:
        return iter(self._by_id.values())

    def add(self, item: T) -> None:
        """Commit an object under its id and name."""
        other = self._by_name.get(item.name)
        if other is not None:
            raise AlreadyExists(f"{self._kind} name {item.name!r} belongs to {other.id}")
        self._by_id[item.id] = item
        self._by_name[item.name] = item
        self.version += 1

    def discard(self, item: T) -> None:
        """Forget an object; its name is free at once."""
        if self._by_id.pop(item.id, None) is None:
            return
        if self._by_name.get(item.name) is item:
            del self._by_name[item.name]
        self.version += 1

    def named(self, name: str) -> T | None:
        return self._by_name.get(name)

    def get(self, key: str) -> T | None:
        """The object with this id, or with the only id that begins so (crictl shows 13 characters). None if there is none.

        An ambiguous beginning is refused: acting on either would be a guess.
        """
        found = self._by_id.get(key)
        if found is not None or not key or len(key) >= ID_LENGTH:
            return found
        matches = [item for object_id, item in self._by_id.items() if object_id.startswith(key)]
        if len(matches) > 1:
            raise InvalidArgument(f"{self._kind} id {key!r} is ambiguous: {len(matches)} begin so")
        return matches[0] if matches else None
