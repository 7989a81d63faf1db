"""Answers to list calls, kept until something changes: the kubelet asks the same few questions every second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")
M = TypeVar("M", bound=Message)

_QUESTIONS: Final = 32
_PAGE: Final = 1 << 20  # bytes in one message of a stream; a message may have 16 MiB


class ListCache(Generic[T]):
    """Responses by the bytes of their filter, all of one version of the store. They are shared: nobody may change one."""

    def __init__(self) -> None:
        self._version = -1
        self._answers: dict[bytes, T] = {}

    def get(self, version: int, question: bytes) -> T | None:
        """The answer to ``question``, if nothing has changed since."""
        if version != self._version:
            self._answers.clear()
            self._version = version
        return self._answers.get(question)

    def put(self, version: int, question: bytes, answer: T) -> T:
        if version == self._version and len(self._answers) < _QUESTIONS:
            self._answers[question] = answer
        return answer


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether every label of the selector is there with that value."""
    return all(key in labels and labels[key] == value for key, value in selector.items())


def pages(items: Iterable[M]) -> Iterator[list[M]]:
    """A list in pieces for the streaming RPCs; none is empty. Labels and annotations decide how large an item is, so bytes are counted."""
    page: list[M] = []
    size = 0
    for item in items:
        page.append(item)
        size += item.ByteSize()
        if size >= _PAGE:
            yield page
            page, size = [], 0
    if page:
        yield page
