"""Out-of-memory kills of containers: counted from the fds that ``shim.cgroups.oom`` opened, told to the daemon."""

from __future__ import annotations

import os

from shim.cgroups import oom
from shim.supervisor.loop import OOM
from shim.supervisor.table import Container, Core


def watch(core: Core, container: Container, fds: list[int]) -> None:
    """Count the group's kills; the fds were opened by the child that made the group, or by one that looked it up."""
    if container.group is None or container.oom is not None or not fds:
        for fd in fds:
            os.close(fd)
        return
    watching = container.oom = oom.OomWatch(container.group.version, fds)
    now = watching.above()
    if now is not None:
        core.table.kills_above.setdefault(_above(container), now)
        if container.kills_before is None:
            container.kills_before = now
    for fd in watching.filenos():
        core.loop.add(fd, lambda: count(core, container), OOM, watching.events)


def unwatch(core: Core, container: Container) -> None:
    if container.oom is None:
        return
    for fd in container.oom.filenos():
        core.loop.remove(fd)
    container.oom.close()
    container.oom = None
    if not _neighbours(core, container):
        core.table.kills_above.pop(_above(container), None)


def count(core: Core, container: Container) -> None:
    """Read the counter, which on cgroup v1 moves only after its event, and tell the daemon when it has moved."""
    watching = container.oom
    if watching is None:
        return
    watching.read()
    above = watching.above()
    if above is not None:
        _explain(core, container, above)
    if watching.gone:  # an events file whose group is gone polls as ready for ever
        for fd in watching.filenos():
            core.loop.remove(fd)
    before, container.oom_kills = container.oom_kills, max(container.oom_kills, watching.count)
    if container.oom_kills > before:
        core.publish({"event": "container.oom", "id": container.id})


def _explain(core: Core, container: Container, above: int) -> None:
    """Whose were the kills that the group above has counted? Those that no group below it tells of are of one that is gone.

    Of several that are gone at once none can be blamed. With none gone they were of groups that are not ours.
    """
    gone, explained = [], core.table.kills_above.get(_above(container), above)
    for each in [container, *_neighbours(core, container)]:
        if each.oom is None:
            continue
        explained += each.oom.read() - each.oom.accounted
        each.oom.accounted = each.oom.count
        if each.oom.gone and not each.oom.settled:
            each.oom.settled = True  # its kills came before its end, so "above" has them all
            gone.append(each)
    if len(gone) == 1 and gone[0].oom is not None and above > explained:
        gone[0].oom.count += above - explained
        gone[0].oom.accounted = gone[0].oom.count
        if gone[0] is not container:
            core.loop.call_soon(lambda: count(core, gone[0]))
    elif len(gone) > 1 and above > explained:
        names = " ".join(each.id[:12] for each in gone)
        core.log(f"{above - explained} OOM kills in {_above(container)}: of one of {names}, whose groups are gone")
    core.table.kills_above[_above(container)] = max(above, explained)


def alone(core: Core, container: Container) -> bool:
    """Whether no other container that is known was in the same slice."""
    here = _above(container)
    return not any(each is not container and _above(each) == here for each in core.table.containers.values())


def _above(container: Container) -> str:
    return os.path.dirname(container.group.path) if container.group is not None else ""


def _neighbours(core: Core, container: Container) -> list[Container]:
    """Other containers in the same slice."""
    here = _above(container)
    return [each for each in core.table.containers.values() if each is not container and each.oom is not None and _above(each) == here]
