"""The rules of a pod, in iptables' language: what CNI's plugins write, so that they and we recognize each other's.

One ``iptables-restore --noflush`` per address family and operation, whichever iptables the node has (nft or legacy), as one transaction.
What all pods share (chains, jumps) is only checked in there (``-C``); if that fails it is looked at closely and completed. Rules are taken
away by their text, and if they are not as we would have written them, by looking for what leads to the pod's chains.
"""

from __future__ import annotations

import asyncio
import errno
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cri.errors import CriError, Unavailable

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ATTEMPTS = 4
_TIMEOUT = 30.0
_QUOTED = 300


@dataclass(frozen=True, slots=True)
class Rule:
    table: str
    chain: str
    words: tuple[str, ...]
    first: bool = False  # in front of the others

    def line(self, verb: str) -> str:
        return f"{verb} {self.chain} {' '.join(map(_word, self.words))}"


def _word(text: str) -> str:
    if text and not any(c in " \t\"'\\" for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def with_comment(*words: str, comment: str) -> tuple[str, ...]:
    return (*words, "-m", "comment", "--comment", comment)


@dataclass(slots=True)
class Plan:
    """What one family has to have. ``shared`` is there once for all pods, in this order; ``chains`` and ``rules`` are this pod's.

    ``owner`` is its id: programs that work on the plan carry it in their environment, as plugins do, for a daemon that comes after us to
    find them (``cni.orphans``).
    """

    owner: str = ""
    shared_chains: list[tuple[str, str]] = field(default_factory=list)
    shared: list[Rule] = field(default_factory=list)
    chains: list[tuple[str, str]] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.shared_chains or self.chains or self.rules)

    def chain(self, table: str, name: str) -> None:
        if (table, name) not in self.chains:
            self.chains.append((table, name))

    def append(self, table: str, chain: str, *words: str) -> None:
        rule = Rule(table, chain, words)
        if rule not in self.rules:
            self.rules.append(rule)

    def tables(self) -> list[str]:
        named = [t for t, _ in (*self.shared_chains, *self.chains)] + [r.table for r in (*self.shared, *self.rules)]
        return list(dict.fromkeys(named))

    def holds(self) -> str:
        """A script that succeeds if everything is there, and changes nothing."""
        return _script({t: [r.line("-C") for r in (*self.shared, *self.rules) if r.table == t] for t in self.tables()})

    def add(self) -> str:
        """A script that adds the pod's part and fails if something of what is shared is missing."""
        return self._added(check=self.shared)

    def complete(self, make: Sequence[tuple[str, str]], missing: Sequence[Rule]) -> str:
        """A script that adds the pod's part and of what is shared these."""
        return self._added(make, missing=missing)

    def _added(self, make: Sequence[tuple[str, str]] = (), check: Sequence[Rule] = (), missing: Sequence[Rule] = ()) -> str:
        return _script(
            {
                table: [
                    *(f"-N {name}" for t, name in make if t == table),
                    *(f":{name} - [0:0]" for t, name in self.chains if t == table),
                    *(rule.line("-C") for rule in check if rule.table == table),
                    *(rule.line("-I" if rule.first else "-A") for rule in missing if rule.table == table),
                    *(rule.line("-A") for rule in self.rules if rule.table == table),
                ]
                for table in self.tables()
            }
        )

    def remove(self) -> str:
        """A script that takes the pod's part away and fails if it is not as it would have been added."""
        own = set(self.chains)
        return _script(
            {
                table: [
                    *(rule.line("-D") for rule in self.rules if rule.table == table and (table, rule.chain) not in own),
                    *(f"-F {name}" for t, name in self.chains if t == table),
                    *(f"-X {name}" for t, name in self.chains if t == table),
                ]
                for table in self.tables()
            }
        )

    def find_and_remove(self, saved: str) -> str:
        """The same by what ``iptables-save`` shows: rules that lead to the pod's chains, and those like the pod's own in shared ones."""
        own = set(self.chains)
        foreign = [r for r in self.rules if (r.table, r.chain) not in own]
        lines: dict[str, list[str]] = {}
        there: dict[str, list[str]] = {}
        table = ""
        for line in saved.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith(":"):
                name = line[1:].split(" ")[0]
                if (table, name) in own:
                    there.setdefault(table, []).append(name)
            elif line.startswith("-A ") and self._leads_here(table, line, foreign):
                lines.setdefault(table, []).append(f"-D {line[3:]}")
        return _script(
            {
                t: [*lines.get(t, ()), *(f"-F {name}" for name in there.get(t, ())), *(f"-X {name}" for name in there.get(t, ()))]
                for t in self.tables()
            }
        )

    def _leads_here(self, table: str, line: str, foreign: Iterable[Rule]) -> bool:
        words = shlex.split(line)
        if (table, words[1]) in self.chains:
            return False  # goes with its chain
        target = words[words.index("-j") + 1] if "-j" in words[:-1] else ""
        if (table, target) in self.chains:
            return True
        return any(rule.table == table and rule.chain == words[1] and sorted(rule.words) == sorted(words[2:]) for rule in foreign)


def _script(tables: dict[str, list[str]]) -> str:
    return "".join(f"*{table}\n" + "".join(f"{line}\n" for line in lines) + "COMMIT\n" for table, lines in tables.items() if lines)


class Iptables:
    """The programs of one address family. One operation at a time: they would only wait for each other in the kernel."""

    def __init__(self, version: int) -> None:
        self._name = "iptables" if version == 4 else "ip6tables"
        self._turn = asyncio.Lock()

    async def add(self, plan: Plan) -> None:
        """Raises Unavailable with what iptables said."""
        async with self._turn:
            said = await self._restore(plan.add(), plan.owner)
            for _ in range(_ATTEMPTS):
                if not said:
                    return
                said = await self._complete(plan)
        if said:
            raise Unavailable(f"{self._name}-restore failed: {said}")

    async def _complete(self, plan: Plan) -> str:
        """What is shared may be missing, for the first pod or after somebody's flush; or a plugin made it between two looks of ours."""
        saved = await self._save(plan.tables())
        there = {(table, line[1:].split(" ")[0]) for table, text in saved.items() for line in text.splitlines() if line.startswith(":")}
        make = [chain for chain in plan.shared_chains if chain not in there]
        missing = [r for r in plan.shared if (r.table, r.chain) in make or not await self._has(r, there)]
        return await self._restore(plan.complete(make, missing), plan.owner)

    async def _has(self, rule: Rule, there: Iterable[tuple[str, str]]) -> bool:
        target = rule.words[rule.words.index("-j") + 1]
        if target.startswith("CNI-") and (rule.table, target) not in there:
            return False
        return not await self._restore(_script({rule.table: [rule.line("-C")]}))

    async def remove(self, plan: Plan) -> None:
        """Whether all, some or none of it is there. Raises Unavailable."""
        async with self._turn:
            said = await self._restore(plan.remove(), plan.owner)
            for _ in range(_ATTEMPTS):
                if not said:
                    return
                saved = await self._save(plan.tables())
                script = plan.find_and_remove("".join(f"*{table}\n{text}" for table, text in saved.items()))
                said = await self._restore(script, plan.owner) if script else ""
        if said:
            raise Unavailable(f"{self._name}-restore failed: {said}")

    async def lacks(self, plan: Plan) -> str:
        """What iptables says is missing; empty if nothing is."""
        script = plan.holds()
        return await self._restore(script) if script else ""

    async def _restore(self, script: str, owner: str = "") -> str:
        """What it said if it failed."""
        code, _, errors = await run((f"{self._name}-restore", "--noflush", "-w", "10"), script.encode(), owner=owner)
        return "" if code == 0 else errors or f"exit status {code}"

    async def _save(self, tables: Iterable[str]) -> dict[str, str]:
        found = {}
        for table in tables:
            code, output, errors = await run((f"{self._name}-save", "-t", table))
            if code != 0:
                raise Unavailable(f"{self._name}-save failed: {errors}")
            found[table] = "".join(f"{line}\n" for line in output.splitlines() if line.startswith((":", "-A ")))
        return found


class ProgramMissing(CriError):
    """A program that rules are made with is not installed."""


async def run(argv: Sequence[str], data: bytes = b"", *, owner: str = "") -> tuple[int, str, str]:
    """Exit code, output, and errors in one bounded line. Raises ProgramMissing, TimeoutError."""
    pipe, environment = asyncio.subprocess.PIPE, {"PATH": PATH} | ({"CNI_CONTAINERID": owner} if owner else {})
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/")
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        package = "nftables" if argv[0] == "nft" else "iptables"
        raise ProgramMissing(f"{argv[0]} is not installed", hint=f"apt install {package}") from None
    try:
        output, errors = await asyncio.wait_for(process.communicate(data), _TIMEOUT)
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        await process.wait()
        raise
    text = " ".join(errors.decode(errors="replace").split())
    return process.returncode or 0, output.decode(errors="replace"), text[:_QUOTED]
