"""Perform planned writes in one group's directories."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from shim.cgroups import group as files
from shim.cgroups.group import Group
from shim.cgroups.plan import Write
from shim.errors import Failure

_HINTS = {
    errno.EBUSY: "more is in use than the new limit allows; nothing was killed",
    errno.EINVAL: "the kernel does not take this value here: a parent's limit or another limit of the group may forbid it",
    errno.ENOSPC: "the parent group does not have these CPUs or memory nodes",
    errno.EACCES: "the parent group does not have these CPUs or memory nodes",
    errno.ENOENT: "this kernel has no such control file",
    errno.ENODEV: "there is no such device, or it cannot be limited this way",
}


def execute(group: Group, writes: Sequence[Write], phase: str = "cgroup") -> None:
    """In order; Failure at the first that the kernel refuses."""
    later = []
    for write in writes:
        try:
            _perform(group, write)
        except OSError as error:
            if error.errno != errno.EINVAL or not write.again:
                raise _failure(phase, write, error) from error
            later.append(write)
    for write in later:
        try:
            _perform(group, write)
        except OSError as error:
            raise _failure(phase, write, error) from error


def change(group: Group, writes: Sequence[Write]) -> None:
    """The same for a group in use: what was written before a refusal is set back, so a refused update changes nothing."""
    before = snapshot(group, writes)
    try:
        execute(group, writes, "update cgroup")
    except Failure as refusal:
        try:
            execute(group, before)
        except Failure as second:
            refusal.message += f" (and setting back {second.path} failed: {second})"
        raise


def snapshot(group: Group, writes: Sequence[Write]) -> list[Write]:
    """What sets back the files that ``writes`` change."""
    return [Write(w.controller, w.file, value, again=True) for w in writes if (value := _present(group, w))]


# Files that read back as what may be written. The rest are lists of devices, which an update adds to one by one.
_REVERSIBLE = ("memory.", "cpu.", "cpuset.", "pids.", "hugetlb.")


def _present(group: Group, write: Write) -> str:
    directory = group.directory(write.controller)
    if directory is None or not write.file.startswith(_REVERSIBLE) or write.file == "memory.oom_control":
        return ""
    try:
        return files.read(f"{directory}/{write.file}").strip()
    except OSError as error:
        if error.errno == errno.ENOENT:
            return ""
        raise Failure.wrap("update cgroup", "read", error) from error


def _perform(group: Group, write: Write) -> None:
    directory = group.directory(write.controller)
    if directory is None:
        if write.optional:
            return
        raise OSError(errno.ENOENT, "the group has no directory for this controller", write.file)
    try:
        files.write(f"{directory}/{write.file}", write.value)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        if write.otherwise is not None:
            files.write(f"{directory}/{write.otherwise[0]}", write.otherwise[1])
        elif not write.optional:
            raise


def _failure(phase: str, write: Write, error: OSError) -> Failure:
    path = error.filename if isinstance(error.filename, str) else write.file
    hint = _HINTS.get(error.errno or 0, "")
    return Failure(phase, "write", errno=error.errno, path=path, message=f"value {write.value!r}", hint=hint)
