"""The signal that asks a container to stop: the request's, else the image's STOPSIGNAL, else SIGTERM."""

from __future__ import annotations

import re
import signal

from cri.errors import InvalidArgument
from cri.images.model import ImageConfig
from protos.runtime.v1 import api_pb2 as v1

# Names that Python's signal module lacks. SIGRTMIN is the kernel's 34 as libc sees it: glibc and musl keep the first for themselves.
_EXTRA = {"SIGIOT": 6, "SIGCLD": 17, "SIGPOLL": 29, "SIGSTKFLT": 16, "SIGRTMIN": 34, "SIGRTMAX": 64}
_NUMBERS: dict[str, int] = {s.name: s.value for s in signal.Signals} | _EXTRA
_REALTIME = re.compile(r"(SIGRTMIN)\+([0-9]{1,2})|(SIGRTMAX)-([0-9]{1,2})")


def stop_signal(config: v1.ContainerConfig, image: ImageConfig) -> int:
    """The number to send."""
    if config.stop_signal != v1.SIGNAL_RUNTIME_DEFAULT:
        return from_cri(config.stop_signal)
    if image.stop_signal:
        return parse(image.stop_signal, "image config.StopSignal")
    return int(signal.SIGTERM)


def parse(text: str, field: str) -> int:
    """``TERM``, ``sigterm``, ``15``, ``SIGRTMIN+3``."""
    if text.isascii() and text.isdigit() and len(text) <= 2 and 1 <= int(text) <= 64:
        return int(text)
    name = text.upper()
    name = name if name.startswith("SIG") else f"SIG{name}"
    number = _NUMBERS.get(name)
    match = _REALTIME.fullmatch(name)
    if match is not None:
        number = 34 + int(match[2]) if match[1] else 64 - int(match[4])
    if number is None or not 1 <= number <= 64 or (match is not None and number < 34):
        raise InvalidArgument(f"{text!r:.40} is not a signal", field=field)
    return number


def from_cri(value: v1.Signal) -> int:
    """The number of a CRI signal."""
    try:
        name = v1.Signal.Name(value)
    except ValueError:
        raise InvalidArgument(f"{value} is not a signal", field="config.stop_signal") from None
    return parse(name.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-"), "config.stop_signal")


def to_cri(number: int) -> v1.Signal:
    """The CRI signal of a number, for ContainerStatus."""
    return _TO_CRI.get(number, v1.SIGNAL_RUNTIME_DEFAULT)


# Aliases come first so that the usual name of the number wins.
_ALIASES = (v1.SIGNAL_SIGIOT, v1.SIGNAL_SIGCLD, v1.SIGNAL_SIGPOLL)
_NAMED = tuple(getattr(v1, name) for name, _ in v1.Signal.items() if name != "SIGNAL_RUNTIME_DEFAULT")
_TO_CRI: dict[int, v1.Signal] = {from_cri(s): s for s in (*_ALIASES, *(s for s in _NAMED if s not in _ALIASES))}
