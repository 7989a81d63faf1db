"""What every test shares: the root check, the kernel's cgroup version, and who may be left out where."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

NEEDS_ROOT = ("kernel", "daemon", "attacks", "faults", "conformance")
ROOT = Path(__file__).resolve().parent


def systemd_running() -> bool:
    """Whether systemd is PID 1, as sd_booted(3) decides it."""
    return os.path.isdir("/run/systemd/system")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; nothing is skipped silently."""
    for item in items:
        try:
            area = item.path.relative_to(ROOT).parts[0]
        except ValueError:
            area = ""
        if area in NEEDS_ROOT and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("systemd") and not systemd_running():
            item.add_marker(pytest.mark.skip(reason="systemd is not PID 1 here (hack/vm --systemd runs it)"))
        if (item.get_closest_marker("registry") or area == "daemon") and not shutil.which("docker-registry"):
            item.add_marker(pytest.mark.skip(reason="Debian's docker-registry is not installed"))
