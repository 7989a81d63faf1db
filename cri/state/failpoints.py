"""Places where a test makes the daemon die or fail: ``CRI_SHIM_FAILPOINTS="run sandbox/network=exit;remove container/bundle=raise"``.

Between any two acquisitions there is one. Nothing is read and nothing costs anything where the variable is not set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Final

from cri.errors import Internal

EXIT_CODE: Final = 86


def parse(text: str) -> dict[str, str]:
    """``name=action;…`` with the actions ``exit`` (as SIGKILL would), ``raise`` and ``sleep:<seconds>`` (the whole daemon)."""
    points = dict(part.split("=", 1) for part in text.split(";") if part)
    for name, action in points.items():
        if action not in ("exit", "raise") and not action.removeprefix("sleep:").replace(".", "", 1).isdigit():
            raise ValueError(f"failpoint {name}: unknown action {action!r}")
    return points


_points: Mapping[str, str] = parse(os.environ.get("CRI_SHIM_FAILPOINTS", ""))


def hit(operation: str, stage: str) -> None:
    """``stage`` of ``operation`` is about to begin."""
    if _points:
        _act(f"{operation}/{stage}")


def _act(name: str) -> None:
    action = _points.get(name)
    if action is None:
        return
    if action == "exit":
        os._exit(EXIT_CODE)
    if action == "raise":
        raise Internal(f"failpoint {name}")
    time.sleep(float(action.removeprefix("sleep:")))
