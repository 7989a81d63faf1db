"""Which test holds against which attack. ``python -m tests.attacks.coverage`` prints the table; test_coverage.py checks it.

A test claims an id by naming it in its docstring ("CVE-2021-30465", "CVE-2019-5736, 2024-21626"), anywhere under tests/. ``ELSEWHERE``
names tests that hold against an attack without saying so, ``REASONS`` what cannot be tested here, and why.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# One line a row: what breaks (our words), then its ids.
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("mounts", "proc or sys replaced by the image", ("2019-16884", "2019-19921", "2023-27561", "2023-28642")),
    ("mounts", "mount target exchanged with a link", ("2021-30465",)),
    ("mounts", "writable control groups of the host", ("2023-25809",)),
    ("mounts", "directories made through a race", ("2024-45310",)),
    ("mounts", "devices, consoles and parameters redirected", ("2025-31133", "2025-52565", "2025-52881")),
    ("mounts", "/dev is a link", ("2026-41579", "2026-47766")),
    ("mounts", "copy or mount during an exchange", ("2018-15664", "2026-41568", "2026-42306")),
    ("mounts", "part of a volume that is a link", ("2017-1002101", "2021-25741")),
    ("mounts", "VOLUME that is a link", ("2022-23648",)),
    ("descriptors", "ptrace of who joins", ("2016-9962",)),
    ("descriptors", "overwrite the runtime", ("2019-5736",)),
    ("descriptors", "working directory by descriptor", ("2024-21626",)),
    ("descriptors", "code loaded from the container", ("2019-14271", "2026-41567")),
    ("descriptors", "abstract sockets", ("2020-15257",)),
    ("descriptors", "environments that mix", ("2021-21334", "2020-14370", "2026-57231")),
    ("users", "a user named like a number", ("2016-3697",)),
    ("users", "inheritable and ambient capabilities", ("2018-1000400", "2022-24769", "2022-29162")),
    ("users", "primary group left out", ("2022-36109", "2022-2995", "2023-25173")),
    ("users", "ids that wrap around", ("2024-40635", "2026-46680", "2026-30892")),
    ("users", "empty profile", ("2023-2431",)),
    ("users", "AF_ALG and AF_VSOCK", ("copy.fail",)),
    ("strings", "parameters of the kernel", ("2022-0811", "2022-0532")),
    ("strings", "newlines", ("2022-4318", "2026-15809")),
    ("strings", "annotations by prefix", ("2023-6476", "2024-3154")),
    ("strings", "labels of images", ("2026-53488",)),
    ("strings", "links inside the root", ("2024-5154", "2024-9341")),
    ("strings", "paths in names and logs", ("2025-0750",)),
    ("strings", "plugin that is a path", ("2021-20206",)),
    ("strings", "lengths that overflow", ("2021-43784",)),
    ("denial", "endless exec output", ("2022-1708", "2022-31030")),
    ("denial", "attach and exec that leak", ("2022-23471", "2025-64329", "2026-53495")),
    ("denial", "metadata without end", ("2023-25153",)),
    ("denial", "account files that are none", ("2025-4437", "2026-47262", "2024-9676")),
    ("denial", "bombs in layers", ("2025-58183",)),
    ("denial", "SPDY frames", ("2026-35469",)),
    ("denial", "out of memory", ("2019-14891",)),
    ("denial", "files of ours that a container fills", ("2020-8557", "2025-0426")),
    ("images", "archives that leave their directory", ("2021-32760", "2025-47290")),
    ("images", "attributes of overlayfs", ("overlay attributes",)),
    ("images", "state that others read", ("2021-41103", "2024-25621")),
    ("images", "credentials for a stranger", ("2020-15157",)),
    ("images", "two documents in one", ("2021-41190",)),
    ("images", "digest as a path", ("2024-3727",)),
    ("others", "checkpoints", ("2024-8676", "2026-50195", "2026-53489", "2026-53492")),
    ("others", "environment of a hook", ("2024-0132", "2025-23266")),
    ("others", "labels on the host's files", ("2021-43816",)),
    ("others", "router advertisements, loopback of the node", ("2020-10749", "2020-8558")),
)

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "2023-25153": ("daemon/test_images_pull.py::test_lies_about_manifests", "unit/images/test_manifest.py::test_too_long_and_too_deep"),
    "2025-58183": ("daemon/test_images_unpack.py::test_bombs",),
    "2026-35469": ("unit/streaming/test_spdy.py",),
    "2021-32760": ("daemon/test_images_unpack.py::test_nothing_leaves_the_directory",),
    "2025-47290": ("daemon/test_images_unpack.py::test_hard_links_find_only_the_layer",),
    "overlay attributes": ("daemon/test_images_unpack.py::test_metadata",),
    "2020-15157": ("daemon/test_images_pull.py::test_credentials_stay_with_their_registry",),
    "2021-41190": ("unit/images/test_manifest.py",),
    "2024-3727": ("unit/images/test_reference.py",),
    "2022-23471": ("daemon/test_streaming_attach.py::test_attaching_leaves_nothing_behind",),
    "2024-0132": ("kernel/test_hooks.py::test_stages_in_order_with_state",),
    "2025-23266": ("kernel/test_hooks.py::test_stages_in_order_with_state",),
    "2020-10749": ("daemon/test_network.py::test_router_advertisements_are_ignored",),
    "2020-8558": ("kernel/test_network_bridge.py::test_pods_cannot_reach_the_nodes_loopback",),
}

REASONS: dict[str, str] = {
    "2021-43816": "labels need SELinux, which this kernel lacks; that only flagged mounts get one is a unit test of the plan",
}

_ID = re.compile(r"(?:CVE-)?\b((?:20[12][0-9])-[0-9]{4,7})\b")


def claims() -> dict[str, set[str]]:
    """Node ids (below tests/) by attack id, from docstrings of tests and of their modules."""
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, text in _docstrings(path):
            ids = set(_ID.findall(text)) if "CVE-" in text else set()
            if "copy.fail" in text:
                ids.add("copy.fail")
            for attack in ids:
                found.setdefault(attack, set()).add(f"{path.relative_to(TESTS)}::{name}")
    for attack, tests in ELSEWHERE.items():
        found.setdefault(attack, set()).update(tests)
    return found


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name, ast.get_docstring(node) or ""


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def table() -> str:
    """In Markdown."""
    found = claims()
    lines = ["| part | attack | ids | tests (below tests/) |", "|---|---|---|---|"]
    for part, what, ids in ROWS:
        tests = sorted(set().union(*(found.get(attack, set()) for attack in ids)))
        reasons = [REASONS[attack] for attack in ids if attack in REASONS]
        names = ", ".join(attack if "." in attack or " " in attack else f"CVE-{attack}" for attack in ids)
        lines.append(f"| {part} | {what} | {names} | {'; '.join([*(f'`{t}`' for t in tests), *reasons])} |")
    packs = (path for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_coverage.py")
    beyond = sorted(path.name for path in packs if not _ID.search(path.read_text()))
    lines += ["", f"Beyond the list, what this code base has of its own: {', '.join(f'`attacks/{name}`' for name in beyond)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
