"""SELinux labels of a pod's and a container's processes and files.

As libselinux's users do it: ``lxc_contexts`` of the loaded policy says what containers are, the request's options replace parts of that,
and a pod gets a level of its own (two of the 1024 categories), so that containers of different pods cannot touch each other's files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from typing import NamedTuple

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import strings
from protos.runtime.v1 import api_pb2 as v1

CATEGORIES = 1024
_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_LEVEL = re.compile(r"s[0-9]{1,3}(-s[0-9]{1,3})?(:c[0-9]{1,4}([.,]c[0-9]{1,4})*(-s[0-9]{1,3}:c[0-9]{1,4}([.,]c[0-9]{1,4})*)?)?")


class Contexts(NamedTuple):
    """What the policy says of containers: ``user:role:type:level`` of their processes and of their files."""

    process: str
    file: str


class Labels(NamedTuple):
    """Empty: as the kernel labels it without being told."""

    process: str
    mount: str


def parse_contexts(text: str) -> Contexts | None:
    """An ``lxc_contexts`` file; None if it does not say both."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not name.lstrip().startswith("#"):
            found[name.strip()] = value.strip().strip('"')
    process, file = found.get("process", ""), found.get("file", "")
    return Contexts(process, file) if process.count(":") >= 2 and file.count(":") >= 2 else None


def check(options: v1.SELinuxOption, field: str) -> None:
    """Parts that a label can be made of; also on hosts without SELinux, where they mean nothing."""
    for name in ("user", "role", "type"):
        value = strings.line(getattr(options, name), f"{field}.{name}")
        if value and not _PART.fullmatch(value):
            raise InvalidArgument(f"{value!r:.80} is no part of a label", field=f"{field}.{name}")
    level = strings.line(options.level, f"{field}.level")
    if level and not _LEVEL.fullmatch(level):
        raise InvalidArgument(f"{level!r:.80} is no level", field=f"{field}.level")


def pick_level(contexts: Contexts, taken: Collection[str]) -> str:
    """A level that no pod has: the policy's sensitivity and two categories. Raises FailedPrecondition when there is none left."""
    sensitivity = (contexts.process.split(":", 3)[3:] or ["s0"])[0].partition(":")[0].partition("-")[0] or "s0"
    if len(taken) < CATEGORIES * (CATEGORIES - 1) // 2:
        while True:
            low, high = sorted(random.sample(range(CATEGORIES), 2))
            level = f"{sensitivity}:c{low},c{high}"
            if level not in taken:
                return level
    raise FailedPrecondition("every pair of SELinux categories is in use by a pod")


def labels(options: v1.SELinuxOption, pod_level: str, contexts: Contexts | None, *, privileged: bool, field: str) -> Labels:
    """Of a container in a pod with ``pod_level``. A privileged container's process is not labelled, as in containerd, unless asked for."""
    check(options, field)
    named = bool(options.user or options.role or options.type)
    if contexts is None:
        if not named:
            return Labels("", "")
        raise FailedPrecondition(f"{field}: the loaded SELinux policy has no lxc_contexts, so a label cannot be completed")
    level = options.level or pod_level
    user, role, kind, *_ = contexts.process.split(":")
    process = ":".join((options.user or user, options.role or role, options.type or kind, *([level] if level else [])))
    owner, object_role, object_type, *_ = contexts.file.split(":")
    mount = ":".join((owner, object_role, object_type, *([level] if level else [])))
    return Labels("" if privileged and not named else process, mount)
