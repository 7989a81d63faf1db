"""The first module of ours that the supervisor imports: it keeps out what no import below needs.

``dataclasses`` imports ``inspect`` (with ast, dis and tokenize: 1.4 MB that every fork would copy page tables for) to write
signatures into docstrings, and from Python 3.12 on for a class's annotations, which are easily had. The signatures are dropped; anybody
who asks for more of ``inspect`` gets the real one.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Inspect(ModuleType):
    """Stands in until something is wanted that dataclasses has no use for."""

    @staticmethod
    def signature(_: Any) -> str:
        return ""

    @staticmethod
    def get_annotations(kind: type) -> dict[str, Any]:
        """A class's own, not evaluated."""
        return dict(vars(kind).get("__annotations__") or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get("inspect") is self:
            del sys.modules["inspect"]
        return getattr(importlib.import_module("inspect"), name)


def main() -> None:
    """The supervisor's life."""
    sys.modules.setdefault("inspect", _Inspect("inspect"))
    from shim.supervisor.main import main as run

    run()
