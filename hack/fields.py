"""The table "CRI field → what we do → test": hack/fields.toml, held against the protocol and the tests, as hack/fields.md.

    python -m hack.fields            write hack/fields.md
    python -m hack.fields --check    say what is missing, stale or not up to date; exit status 1 if anything is
"""

from __future__ import annotations

import ast
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from protos.runtime.v1 import api_pb2 as v1

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE, TABLE = REPOSITORY / "hack/fields.toml", REPOSITORY / "hack/fields.md"
#: Messages that say what a pod or container is, may do and may use, or that report it; what they contain is found by walking.
ROOTS = (
    "PodSandboxConfig",
    "ContainerConfig",
    "RuntimeHandler",
    "RuntimeFeatures",
    "UpdateContainerResourcesRequest",
    "UpdatePodSandboxResourcesRequest",
    "ContainerUser",
)
HEAD = """# CRI field → what we do → test

Written by `python -m hack.fields` from hack/fields.toml; `tests/unit/test_fields.py` fails where a field of the protocol is missing here,
where one is here that the protocol has no longer, and where a test that is named does not exist.
"""


def fields() -> dict[str, list[str]]:
    """Every field by message, in the order of the protocol."""
    found: dict[str, list[str]] = {}

    def walk(message: Any) -> None:
        if message.name in found or message.GetOptions().map_entry:
            return
        found[message.name] = [field.name for field in message.fields]
        for field in message.fields:
            if field.message_type is not None and not field.message_type.name.startswith("Windows"):
                walk(field.message_type)

    for name in ROOTS:
        walk(v1.DESCRIPTOR.message_types_by_name[name])
    return found


def load() -> dict[str, dict[str, list[str]]]:
    """The declarations: [sentence, tests...] by message and field."""
    with SOURCE.open("rb") as file:
        return tomllib.load(file)


@cache
def tests_in(path: str) -> frozenset[str]:
    """Names of the test functions of a file; empty where there is none."""
    file = REPOSITORY / path
    if not file.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(file.read_text()))
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name.startswith("test_"))


def exists(test: str) -> bool:
    """``path`` of a file with tests, or ``path::name`` of one of them."""
    path, _, name = test.partition("::")
    return bool(tests_in(path)) if not name else name in tests_in(path)


def problems() -> list[str]:
    """What is wrong with the declarations; nothing, if every field is declared once and shown by tests that exist."""
    declared, wanted, found = load(), fields(), []
    for message, names in wanted.items():
        found += [f"{message}.{name} is not declared" for name in names if name not in declared.get(message, {})]
    for message, entries in declared.items():
        for name, entry in entries.items():
            where = f"{message}.{name}"
            if name not in wanted.get(message, ()):
                found.append(f"{where} is not a field of the protocol")
            if len(entry) < 2 or not entry[0]:
                found.append(f"{where} has no sentence or no test")
            found += [f"{where}: there is no {test}" for test in entry[1:] if not exists(test)]
    return found


def render() -> str:
    declared, lines = load(), [HEAD]
    for message, names in fields().items():
        lines += [f"## {message}\n", "| field | what we do | test |", "|---|---|---|"]
        for name in names:
            sentence, *tests = declared[message][name]
            lines.append(f"| `{name}` | {sentence} | {'<br>'.join(f'`{test}`' for test in tests)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    found = problems()
    if "--check" in sys.argv[1:]:
        if not found and (not TABLE.exists() or TABLE.read_text() != render()):
            found = [f"{TABLE.name} is not up to date: python -m hack.fields"]
    elif not found:
        TABLE.write_text(render())
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
