"""Stop signals in all their spellings."""

from __future__ import annotations

import signal

import pytest

from cri.errors import InvalidArgument
from cri.images.model import ImageConfig
from cri.spec import stop_signal as s
from protos.runtime.v1 import api_pb2 as v1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15),
        ("SIGTERM", 15),
        ("sigquit", 3),
        ("9", 9),
        ("64", 64),
        ("SIGRTMIN", 34),
        ("RTMIN+3", 37),
        ("SIGRTMAX-2", 62),
        ("SIGSTKFLT", 16),
    ],
)
def test_parse(text: str, number: int) -> None:
    assert s.parse(text, "f") == number


@pytest.mark.parametrize("text", ["", "0", "65", "-9", "SIGNOPE", "SIGRTMIN+31", "SIGRTMAX-31", "RTMIN+", "٣", "9" * 5000, "TERM\n"])
def test_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^f: "):
        s.parse(text, "f")


def test_precedence() -> None:
    image = ImageConfig(stop_signal="SIGQUIT")
    assert s.stop_signal(v1.ContainerConfig(), ImageConfig()) == 15
    assert s.stop_signal(v1.ContainerConfig(), image) == 3
    assert s.stop_signal(v1.ContainerConfig(stop_signal=v1.SIGNAL_SIGUSR1), image) == 10
    with pytest.raises(InvalidArgument, match="StopSignal"):
        s.stop_signal(v1.ContainerConfig(), ImageConfig(stop_signal="x"))
    with pytest.raises(InvalidArgument, match=r"^config\.stop_signal"):
        s.stop_signal(v1.ContainerConfig(stop_signal=99), image)  # type: ignore[arg-type]


def test_every_cri_signal_has_a_number_and_back() -> None:
    for name, value in v1.Signal.items():
        if value:
            number = s.from_cri(getattr(v1, name))
            assert s.from_cri(s.to_cri(number)) == number
    assert s.to_cri(int(signal.SIGABRT)) == v1.SIGNAL_SIGABRT  # not its alias SIGIOT
    assert s.to_cri(32) == v1.SIGNAL_RUNTIME_DEFAULT
