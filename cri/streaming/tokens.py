"""What a streaming URL stands for: a secret that is good for one request within a minute."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from cri.errors import ResourceExhausted

LIFETIME: Final = 60.0  # s
MAX_TOKENS: Final = 1000

T = TypeVar("T")


class Tokens(Generic[T]):
    def __init__(self, *, lifetime: float = LIFETIME, limit: int = MAX_TOKENS, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime, self._limit, self._clock = lifetime, limit, clock
        self._waiting: dict[str, tuple[float, T]] = {}  # in order of expiry

    def __len__(self) -> int:
        return len(self._waiting)

    def issue(self, subject: T) -> str:
        """A new token. Raises ResourceExhausted while too many are unused."""
        self._expire()
        if len(self._waiting) >= self._limit:
            raise ResourceExhausted(f"{self._limit} streaming requests are waiting to be picked up")
        token = secrets.token_urlsafe(24)
        self._waiting[token] = (self._clock() + self._lifetime, subject)
        return token

    def redeem(self, token: str) -> T | None:
        """What the token was issued for; None the second time, and after its minute."""
        self._expire()
        found = self._waiting.pop(token, None)
        return None if found is None else found[1]

    def _expire(self) -> None:
        now = self._clock()
        while self._waiting:
            token = next(iter(self._waiting))
            if self._waiting[token][0] > now:
                return
            del self._waiting[token]
