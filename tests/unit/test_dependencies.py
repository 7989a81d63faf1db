"""What the daemon imports is what setup.cfg asks for."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = {"cri", "shim", "protos"}


def imported(package: str) -> set[str]:
    """Top-level names of everything that a package imports, inside functions too."""
    names = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_a_declared_dependency() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"].split()
    declared = {canonical(m.group()) for line in wanted if (m := re.match(r"[\w.-]+", line))}
    providers = packages_distributions()
    used = {}
    for name in sorted(imported("cri") | imported("protos") | imported("shim")):
        used[name] = {canonical(d) for d in providers.get(name, ["not installed"])}
    assert not {name: sorted(by) for name, by in used.items() if not by & declared}
    assert declared == declared & set().union(*used.values()), "declared, but nothing imports it"


def test_the_runtime_core_needs_nothing_but_for_systemd() -> None:
    assert imported("shim") == {"jeepney"}  # lint-imports holds where: shim.cgroups.bus
