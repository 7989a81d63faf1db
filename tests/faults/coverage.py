"""Which test lives through which scenario of a node. ``python -m tests.faults.coverage`` prints the table; test_coverage.py checks it.

A test claims a scenario by its number in its docstring or its module's ("Scenario 31", "scenarios 29-34, 59", "SCENARIOS 24 and 25");
``ELSEWHERE`` names tests that live through one without saying so, ``REASONS`` what is tested by other means.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
COUNT = 61

ELSEWHERE: dict[int, tuple[str, ...]] = {
    4: ("daemon/test_restart.py::test_fifty_containers_are_listed_within_a_second",),
    17: ("daemon/test_containers.py::test_fifty_identical_creates_make_one_container",),
    18: ("daemon/test_containers.py::test_stop_and_remove_are_idempotent",),
    22: ("daemon/test_pods.py",),
    37: ("daemon/test_exec.py::test_output_is_capped_and_the_process_goes_on",),
    38: ("daemon/test_exec.py::test_many_execs_leak_nothing",),
    48: ("attacks/test_denial.py::test_a_storm_of_oom_kills",),
    50: ("kernel/test_cgroups.py::test_a_limit_below_usage_is_refused_and_changes_nothing",),
    52: ("kernel/test_cgroups.py::test_unified", "kernel/test_cgroups.py::test_update_in_any_order"),
    53: ("daemon/test_images_pull.py::test_a_cut_connection_goes_on_where_it_stopped",),
    56: ("daemon/test_images_pull.py::test_a_mirror_that_is_down_is_passed_over",),
}
REASONS: dict[int, str] = {}

_CLAIM = re.compile(r"scenarios?\s+((?:[0-9]+(?:\s*-\s*[0-9]+)?(?:,\s*|\s+and\s+)?)+)", re.IGNORECASE)


def numbers(text: str) -> set[int]:
    """What a docstring claims: "scenarios 6-8, 23" → {6, 7, 8, 23}."""
    found: set[int] = set()
    for claim in _CLAIM.findall(text):
        for first, last in re.findall(r"([0-9]+)(?:\s*-\s*([0-9]+))?", claim):
            found.update(range(int(first), int(last or first) + 1))
    return {number for number in found if 1 <= number <= COUNT}


def claims() -> dict[int, set[str]]:
    """Tests, below tests/, by scenario."""
    found: dict[int, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        where = str(path.relative_to(TESTS))
        for number in numbers(ast.get_docstring(tree) or ""):
            found.setdefault(number, set()).add(where)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for number in numbers(ast.get_docstring(node) or ""):
                    found.setdefault(number, set()).add(f"{where}::{node.name}")
    for number, tests in ELSEWHERE.items():
        found.setdefault(number, set()).update(tests)
    return found


def table() -> str:
    """In Markdown."""
    found = claims()
    lines = ["| scenario | tests (below tests/) |", "|---|---|"]
    for number in range(1, COUNT + 1):
        tests = "; ".join(f"`{test}`" for test in sorted(found.get(number, ())))
        lines.append(f"| {number} | {tests or REASONS.get(number, '')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(table())
