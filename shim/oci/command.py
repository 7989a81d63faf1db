"""Arguments and environment of a process as execve(2) takes them, laid out for a fixed address.

The daemon lays them out, the exec agent maps them (``shim.runtime.agent``); nothing between the two reads them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from shim.errors import Failure

BLOCK = 0x20000000  # where the block will be mapped
BLOCK_SIZE = 0x2000000  # bytes that are mapped; arguments are limited by the kernel to a quarter of the stack limit
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def candidates(args: Sequence[str], env: Sequence[str]) -> list[str]:
    """The files that may be the program, in the order of execvp(3): the name itself if it has a slash, else along PATH."""
    name = args[0]
    if "/" in name:
        return [name]
    search = next((e[5:] for e in reversed(env) if e.startswith("PATH=")), DEFAULT_PATH)
    return [f"{d or '.'}/{name}" for d in search.split(":")]


def block(args: Sequence[str], env: Sequence[str], base: int = BLOCK) -> bytes:
    """Words: argv, envp, address of the word that takes HOME, candidates, 0; the two vectors; the strings. For the address ``base``.

    HOME goes into a spare word at the end of envp, or into one that nobody reads if ``env`` has it. Raises Failure for a NUL, which would
    cut a string short, and for more than can be mapped.
    """
    paths = candidates(args, env)
    texts = [os.fsencode(text) for text in (*args, *env, *paths)]
    for text in texts:
        if b"\0" in text:
            raise Failure("exec", message="string has a NUL", path="process")
    words = 3 + len(paths) + 1 + len(args) + 1 + len(env) + 2 + 1
    at, addresses = base + 8 * words, []
    for text in texts:
        addresses.append(at)
        at += len(text) + 1
    if at >= base + BLOCK_SIZE:
        raise Failure("exec", message=f"{at - base} bytes of arguments and environment")
    argv, rest = addresses[: len(args)], addresses[len(args) :]
    envp, programs = rest[: len(env)], rest[len(env) :]
    argv_at = base + 8 * (3 + len(paths) + 1)
    envp_at = argv_at + 8 * (len(args) + 1)
    spare = envp_at + 8 * len(env)
    unread = spare + 16
    home = unread if any(e.startswith("HOME=") for e in env) else spare
    vectors = [argv_at, envp_at, home, *programs, 0, *argv, 0, *envp, 0, 0, 0]
    return struct.pack(f"<{words}Q", *vectors) + b"".join(text + b"\0" for text in texts)
