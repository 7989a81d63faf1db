"""Versions, terminal sizes, statuses, tokens and ports: the pure parts above the protocols."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import ResourceExhausted
from cri.streaming.http1 import BadRequest
from cri.streaming.portforward import parse_port
from cri.streaming.remotecommand import (
    MAX_SIZES,
    SPDY_PROTOCOLS,
    Expected,
    Terminal,
    Wanted,
    choose,
    exit_status,
    failure_status,
    parse_sizes,
    spdy_protocol,
)
from cri.streaming.tokens import LIFETIME, Tokens


def test_the_clients_first_choice_that_we_speak() -> None:
    assert spdy_protocol(["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"], SPDY_PROTOCOLS) == "v4.channel.k8s.io"
    assert spdy_protocol(["channel.k8s.io", "v4.channel.k8s.io"], SPDY_PROTOCOLS) == "channel.k8s.io"
    assert spdy_protocol([], SPDY_PROTOCOLS) == ""
    assert choose(["a"], ["b"]) is None
    with pytest.raises(BadRequest) as refused:
        spdy_protocol(["v9"], SPDY_PROTOCOLS)
    assert refused.value.status == 403
    assert ("X-Accepted-Stream-Protocol-Versions", "v4.channel.k8s.io") in refused.value.headers


def test_streams_that_a_version_has() -> None:
    wanted = Wanted(stdin=True, stdout=True, tty=True)
    assert Expected.of(wanted, "v4.channel.k8s.io").names == {"error", "stdin", "stdout", "resize"}
    assert Expected.of(wanted, "v2.channel.k8s.io").names == {"error", "stdin", "stdout"}
    assert Expected.of(Wanted(stderr=True), "").names == {"error", "stderr"}


def test_sizes_in_one_piece_and_in_many() -> None:
    text = '{"Width":80,"Height":24}\n{"width":100,"height":50}'
    assert parse_sizes(text) == ([(24, 80), (50, 100)], "")
    rest, found = "", []
    for character in text:
        sizes, rest = parse_sizes(rest + character)
        found += sizes
    assert found == [(24, 80), (50, 100)]


@pytest.mark.parametrize(
    "text", ['{"Width":-1,"Height":24}', '{"Width":1e3,"Height":2}', '{"Width":70000,"Height":1}', "[1]", "nonsense", "{" * 5000]
)
def test_sizes_that_make_no_sense_are_dropped(text: str) -> None:
    sizes, rest = parse_sizes(text)
    assert sizes == [] and len(rest) <= MAX_SIZES


@given(st.text(max_size=200))
def test_noise_on_the_resize_stream(text: str) -> None:
    _, rest = parse_sizes(text)
    assert len(rest) <= len(text)


def test_a_size_that_comes_before_the_terminal_waits_for_it() -> None:
    """CVE-2022-23471: containerd's queue of sizes had nobody to end it when the process did not start."""
    terminal, seen = Terminal(), []
    terminal.resized(1, 2)
    terminal.resized(24, 80)
    terminal.connect(lambda height, width: seen.append((height, width)))
    terminal.resized(25, 81)
    assert seen == [(24, 80), (25, 81)]


def test_statuses_as_kubectl_takes_them_apart() -> None:
    assert exit_status(0) == {"metadata": {}, "status": "Success"}
    status = json.loads(json.dumps(exit_status(137)))
    assert (status["status"], status["reason"]) == ("Failure", "NonZeroExitCode")
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "137"}]
    assert failure_status("no such container")["message"] == "Internal error occurred: no such container"


def test_a_token_is_good_once_and_for_a_minute() -> None:
    now = [0.0]
    tokens: Tokens[str] = Tokens(clock=lambda: now[0])
    first, second = tokens.issue("one"), tokens.issue("two")
    assert len(first) >= 32 and first != second
    assert tokens.redeem(first) == "one"
    assert tokens.redeem(first) is None
    now[0] = LIFETIME + 0.1
    assert tokens.redeem(second) is None
    assert tokens.redeem("") is None and len(tokens) == 0


def test_tokens_that_nobody_redeems_are_bounded() -> None:
    now = [0.0]
    tokens: Tokens[int] = Tokens(limit=3, clock=lambda: now[0])
    for number in range(3):
        tokens.issue(number)
    with pytest.raises(ResourceExhausted):
        tokens.issue(3)
    now[0] = LIFETIME + 1
    assert tokens.issue(4)


@pytest.mark.parametrize(
    ("text", "port"), [("80", 80), ("65535", 65535), ("0", None), ("65536", None), ("-1", None), ("٣", None), ("", None), ("1" * 9, None)]
)
def test_ports(text: str, port: int | None) -> None:
    assert parse_port(text) == port
