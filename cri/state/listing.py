"""Answers to list calls, kept until something changes: the kubelet asks the same few questions every second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_QUESTIONS: Final = 32


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
