"""The exec agent: its code is its source, its programs are what the tables say, and blocks are what execve takes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cgroups import Group
from shim.errors import Failure
from shim.linux import caps, libc
from shim.linux.process import Inherited
from shim.oci import command
from shim.oci.spec import Capabilities, ExecCPUAffinity, Process, Rlimit, User
from shim.runtime import agent, program
from shim.runtime.kept import Kept

GROUP = Group(1, "/g", {"cpu": "/sys/fs/cgroup/cpu/g", "pids": "/sys/fs/cgroup/pids/g"})
LIMITS = [(1024, 4096)] * 16
KEPT = Kept(b"\x06\0\0\0\0\0\xff\x7f", 4, "/home/app", None)  # one instruction: allow
INHERITED = Inherited(((7, 1024, 4096),), (0,))


def steps(code: bytes) -> list[tuple[str, tuple[int, ...], int]]:
    """(system call, arguments, kind) of each operation."""
    names = {number: name for name, number in program.NR.items()}
    found = []
    at = struct.unpack_from("<Q", code)[0] - agent.PROGRAM
    while True:
        *words, kind, _, _, _ = struct.unpack_from("<7QBBHI", code, at)
        found.append((names.get(words[0], "") if kind < 6 else program.Kind(kind).name, tuple(words[1:]), kind))
        if found[-1][0] == "exit_group":
            return found
        at += 64


def process(**fields: object) -> Process:
    names = ("CAP_CHOWN", "CAP_KILL")
    capabilities = Capabilities(names, names, (), names, ())
    return Process((), user=User(1000, 1001, additional_gids=(5,)), capabilities=capabilities, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_restrictions_come_in_the_checked_order(no_new_privileges: bool) -> None:
    planned = agent.plan(process(no_new_privileges=no_new_privileges), GROUP, KEPT, INHERITED, LIMITS, {1, 2})
    names = [name for name, _, _ in steps(planned)]
    order = ["setns", "fchdir", "setgroups", "setresgid", "setresuid", "capset", "clone", "setsid", "CANDIDATES", "exit_group"]
    assert [n for n in names if n in order] == order
    filter_at, fork_at = names.index("seccomp"), names.index("clone")
    assert filter_at == fork_at + 2 if no_new_privileges else filter_at < names.index("setresgid")
    # Once a filter is on: only what a minimal one allows (ARCHITECTURE §4).
    allowed = {"prctl", "setresgid", "setresuid", "capset", "clone", "setsid", "CANDIDATES", "exit_group", "seccomp"}
    assert set(names[filter_at:]) <= allowed
    # What can be seen in the container does nothing else.
    assert set(names[fork_at + 1 :]) <= {"setsid", "seccomp", "CANDIDATES", "exit_group"}


def test_drops_and_closes() -> None:
    planned = steps(agent.plan(process(), GROUP, KEPT, INHERITED, LIMITS, {1}))
    dropped = {args[1] for name, args, _ in planned if name == "prctl" and args[0] == libc.PR_CAPBSET_DROP}
    assert dropped == set(range(caps.last_cap() + 1)) - {caps.NUMBERS["CAP_CHOWN"], caps.NUMBERS["CAP_KILL"]}
    assert [args[0] for name, args, _ in planned if name == "fchown"] == [1]
    names = [name for name, _, _ in planned]
    assert names.index("close_range") == 0
    last_close = max(i for i, name in enumerate(names) if name in ("close", "close_range"))
    assert last_close < names.index("setgroups")
    # The page with the pid is kept from the process forked last, which somebody in the container may write to.
    shared = next(args[0] for name, args, _ in planned if name == "mmap" and args[3] & 1)
    assert ("madvise", shared, 10) in [(name, args[0], args[2]) for name, args, _ in planned]


def test_limits_are_the_process_own_then_what_was_inherited() -> None:
    wanted = process(rlimits=(Rlimit("RLIMIT_NOFILE", 10, 20), Rlimit("RLIMIT_CORE", 0, 0)))
    planned = agent.plan(wanted, GROUP, KEPT, Inherited(((7, 1, 2), (8, 512, 1024)), (0,)), LIMITS, ())
    found = {}
    for name, args, _ in steps(planned):
        if name == "prlimit64":
            found[args[1]] = struct.unpack_from("<QQ", planned, args[2] - agent.PROGRAM)
    assert found == {7: (10, 20), 4: (0, 0), 8: (512, 1024)}
    with pytest.raises(Failure, match="RLIMIT_NONSENSE"):
        agent.plan(process(rlimits=(Rlimit("RLIMIT_NONSENSE", 1, 1),)), GROUP, KEPT, INHERITED, LIMITS, ())


def test_version_2_is_born_in_its_group() -> None:
    names = [name for name, _, _ in steps(agent.plan(process(), Group(2, "/g", {"": "/sys/fs/cgroup/g"}), KEPT, INHERITED, LIMITS, ()))]
    assert names.index("clone3") < names.index("prctl"), "the death signal is not inherited by forks"
    assert names.count("openat") == 3  # group, oom_score_adj, root


def test_affinity_follows_the_cgroup() -> None:
    """execCPUAffinity: the first before the group is joined, the second when its cpuset allows it."""
    planned = agent.plan(process(exec_cpu_affinity=ExecCPUAffinity("0-1", "3")), GROUP, KEPT, INHERITED, LIMITS, ())
    found = steps(planned)
    at = [i for i, (name, _, _) in enumerate(found) if name == "sched_setaffinity"]
    joins = [i for i, (name, _, _) in enumerate(found) if name == "write"][: len(GROUP.directories)]
    assert at[0] < joins[0] < joins[-1] < at[1]
    masks = [int.from_bytes(planned[found[i][1][2] - agent.PROGRAM :][: found[i][1][1]], "little") for i in at]
    assert masks == [0b11, 0b1000]


words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, max_size=6))
def test_blocks_are_vectors_at_their_address(args: list[str], env: list[str]) -> None:
    block = command.block(args, env)

    def word(address: int) -> int:
        return int(struct.unpack_from("<Q", block, address - command.BLOCK)[0])

    def text(address: int) -> str:
        start = address - command.BLOCK
        return block[start : block.index(b"\0", start)].decode()

    def vector(address: int) -> list[str]:
        found = []
        while pointer := word(address):
            found.append(text(pointer))
            address += 8
        return found

    argv, envp, home = (word(command.BLOCK + 8 * i) for i in range(3))
    assert vector(argv) == args
    assert vector(envp) == env
    assert vector(command.BLOCK + 24) == command.candidates(args, env)
    spare = envp + 8 * len(env)
    assert home == (spare if not any(e.startswith("HOME=") for e in env) else spare + 16)
    assert word(spare) == word(spare + 8) == word(home) == 0


def test_blocks_refuse_what_would_be_cut() -> None:
    with pytest.raises(Failure, match="NUL"):
        command.block(["a\0b"], [])
    with pytest.raises(Failure, match="bytes of arguments"):
        command.block(["x"] * 3, ["y" * command.BLOCK_SIZE])
