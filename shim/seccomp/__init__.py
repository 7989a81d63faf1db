"""System call filters: the profile a container gets, compiled through libseccomp once and cached as BPF."""

from __future__ import annotations

from shim.seccomp.compile import RUNTIME_DEFAULT, compile, prepare
from shim.seccomp.filter import Filter

__all__ = ["RUNTIME_DEFAULT", "Filter", "compile", "prepare"]
