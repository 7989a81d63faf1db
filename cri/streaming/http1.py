"""The one HTTP/1.1 request that a streaming connection begins with, as a machine. h11 does the parsing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import h11

MAX_REQUEST: Final = 16 * 1024  # bytes of request line and headers
_REASONS: Final = {101: "Switching Protocols", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}


class BadRequest(Exception):
    """What is answered instead of an upgrade."""

    def __init__(self, status: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.status, self.headers = status, tuple(headers)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]  # names in lower case

    def all(self, name: str) -> list[str]:
        """Elements of a header that is a comma-separated list and may come several times."""
        return [part.strip() for key, value in self.headers if key == name for part in value.split(",") if part.strip()]

    def first(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")

    def upgrades_to(self, protocol: str) -> bool:
        """Whether the client asks to go on in ``protocol``."""
        wants = any(token.lower() == "upgrade" for token in self.all("connection"))
        return wants and any(token.lower() == protocol.lower() for token in self.all("upgrade"))


class Exchange:
    """One request and one answer."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
        self._request: Request | None = None

    def receive(self, data: bytes) -> Request | None:
        """The request once it is whole. Raises BadRequest. Empty ``data`` is end of file."""
        try:
            self._h11.receive_data(data)
            while True:
                event = self._h11.next_event()
                if event is h11.PAUSED:
                    return self._request
                if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                    return None
                if isinstance(event, h11.Request):
                    self._request = _request(event)
                elif isinstance(event, h11.Data):
                    raise BadRequest(400, "a request that is to be upgraded has no body")
                elif isinstance(event, h11.EndOfMessage):
                    return self._request
        except h11.RemoteProtocolError as error:
            raise BadRequest(error.error_status_hint, str(error)) from None

    @property
    def rest(self) -> bytes:
        """What came after the request: it belongs to the next protocol."""
        return bytes(self._h11.trailing_data[0])

    def switch(self, protocol: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        """The answer that the connection goes on in ``protocol``."""
        lines = [("Connection", "Upgrade"), ("Upgrade", protocol), *headers]
        return self._h11.send(h11.InformationalResponse(status_code=101, headers=lines, reason=_REASONS[101].encode())) or b""

    def refuse(self, error: BadRequest) -> bytes:
        """The answer to a request that is not served; the connection is closed after it."""
        body = f"{error}\n".encode()
        lines = [
            ("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), ("Connection", "close"), *error.headers
        ]  # fmt: skip
        reason = _REASONS.get(error.status, "Error").encode()
        return b"".join(
            self._h11.send(event) or b""
            for event in (
                h11.Response(status_code=error.status, headers=lines, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
        )


def _request(event: h11.Request) -> Request:
    path, _, query = event.target.decode("ascii", "replace").partition("?")
    headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers)
    return Request(event.method.decode("ascii"), path, query, headers)
