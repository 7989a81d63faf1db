"""Headers of registries' answers."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from cri.images import answers
from cri.images.answers import delay


@pytest.mark.parametrize("text, expected", [("0", 0.0), ("17", 17.0), ("", None), ("soon", None), ("\u00b2", None), ("1e9", None)])
def test_retry_after(text: str, expected: float | None) -> None:
    assert delay(text) == expected


def test_retry_after_a_date() -> None:
    assert 28 < (delay(formatdate(time.time() + 30, usegmt=True)) or 0) <= 30
    assert delay(formatdate(time.time() - 3600, usegmt=True)) == 0


def test_summary() -> None:
    body = b'{"errors":[{"code":"DENIED","message":"no\\n\\u001b[31mway"}]}'
    assert answers.summary(403, body) == "HTTP 403 DENIED: no  [31mway"
    for other in (b"", b"<html>", b"[]", b'{"errors":7}', b'{"errors":[7]}', b"[" * 4096):
        assert answers.summary(500, other) == "HTTP 500"


def test_reasons_hide_what_a_url_carries() -> None:
    assert answers.reason(ValueError("407, url='http://user:p@ss@proxy:1/x'")) == "407, url='http://proxy:1/x'"
    assert answers.reason(OSError(111, "Connection refused")) == "Connection refused"


def test_origins() -> None:
    assert answers.origin("https://reg.example/v2") == answers.origin("https://REG.example:443/") == ("https", "reg.example", 443)
    assert answers.origin("http://reg.example:443") != answers.origin("https://reg.example")
