"""Containers' groups made by systemd: a delegated transient scope each, its limits as unit properties and as control files.

systemd knows of the scope, so it neither removes nor resets it; inside of it we are the ones who write. What the scope's properties do
not cover (other hierarchies of version 1, huge pages, "unified", device lists with exceptions) is written beside them, and the rest once
more, exactly: systemd rounds. Imported only where this driver is in use, with the one library that it takes (see ``bus``).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace

from shim.cgroups import bpf, devices, names, plan, units, v1, v2
from shim.cgroups import group as files
from shim.cgroups.bus import NO_SUCH_UNIT, UNIT_EXISTS, Bus, Refused
from shim.cgroups.execute import execute, snapshot
from shim.cgroups.group import Group, group_at
from shim.cgroups.holder import Holder
from shim.cgroups.layout import Layout
from shim.errors import Failure
from shim.oci.spec import Resources

_TRANSIENT = "/run/systemd/transient"  # where systemd keeps the definition of a transient unit for as long as it knows it
_CREATE, _UPDATE, _REMOVE = "create cgroup", "update cgroup", "remove cgroup"
_COLLECT = 0.02  # s that an empty scope gets to be collected by itself before systemd is asked
_COMING = 10.0  # s that an empty unit of the runtime's own gets to go
_ALONE = 2.0  # s, the same where systemd cannot be asked

_warm: Bus | None = None  # connected before there was anything to do


def warm() -> frozenset[int]:
    """Connect ahead of the first order; the fds to keep for that. A bus that does not answer is reported by whoever needs it."""
    global _warm
    if _warm is None or not _warm.alive():
        try:
            _warm = Bus("connect", 5.0)
        except Failure:
            _warm = None
    return frozenset() if _warm is None else frozenset((_warm.fileno(),))


def _bus(phase: str) -> Bus:
    """The connection that is there, if it still is one, or another."""
    global _warm
    if _warm is None or not _warm.alive():
        _warm = Bus(phase)
    _warm.begin(phase)
    return _warm


# ---- create


class Starting:
    """A scope that systemd has been asked for, and works on while the caller does something else.

    ``finish`` waits for it, and ``release`` is due once a process of the container is in it.
    """

    __slots__ = ("_bus", "_finished", "_holder", "_layout", "_policy", "_properties", "_serial", "_writes", "group")

    def __init__(self, layout: Layout, cgroups_path: str, wanted: Resources) -> None:
        """Raises Failure, having left nothing."""
        scope, self._finished = names.scope(cgroups_path), False
        self._layout, self.group = layout, group_at(layout, cgroups_path)
        self._writes = plan.resources(wanted, layout)
        self._policy = devices.policy(wanted.devices) if wanted.devices else None
        self._bus = _bus(_CREATE)
        try:
            self._holder = Holder()
        except OSError as error:
            raise Failure.wrap(_CREATE, "start the scope's first process", error) from None
        self._properties = (
            *units.scope(scope.slice, f"cri-shim {cgroups_path.rpartition(':')[2]}", self._holder.pid),
            *units.resources(wanted, layout.version),
            *units.devices(self._policy),
        )
        try:
            self._bus.follow(scope.unit)
            self._serial = self._ask()
        except BaseException:
            self._holder.release()
            raise

    def _ask(self) -> int:
        return self._bus.ask("StartTransientUnit", "ssa(sv)a(sa(sv))", self.group.unit, "fail", list(self._properties), [])

    def finish(self) -> Group:
        """The group with all its limits and device rules. Raises Failure, having left nothing."""
        if self._finished:
            return self.group
        made: list[str] = []
        try:
            self._wait()
            self._complete(made)
        except BaseException as error:
            self.release()
            self._undo(error, made)
            raise
        finally:
            self._bus.unfollow(self.group.unit)
        self._finished = True
        return self.group

    def release(self) -> None:
        self._holder.release()

    def _wait(self) -> None:
        unit = self.group.unit
        try:
            job = self._bus.answer(self._serial, "StartTransientUnit", unit)[0]
        except Refused as refused:
            if refused.name != UNIT_EXISTS:
                raise
            self._replace(refused)
            job = self._bus.answer(self._ask(), "StartTransientUnit", unit)[0]
        result = self._bus.job(job, "StartTransientUnit", unit)
        if result != "done":
            said = f"systemd's job ended as {result!r}"
            raise Failure(_CREATE, "StartTransientUnit", path=unit, message=said, hint=f"see journalctl -u {unit}")

    def _replace(self, refused: Refused) -> None:
        """A unit of that name is there: what a crash has left, or one in use."""
        if _pids(self.group):
            raise Failure(_CREATE, path=self.group.unit, errno=errno.EEXIST, message="the unit exists and is in use") from refused
        _stop(self._bus, self.group.unit)

    def _complete(self, made: list[str]) -> None:
        """What systemd has no property for, and everything else once more as it was asked for."""
        group, layout = self.group, self._layout
        if group.version == 1:
            v1.complete(group, layout, self._writes, self._policy, made)
            return
        if not os.path.isdir(group.paths[""]):
            raise Failure(_CREATE, path=group.paths[""], message="systemd started the scope, and it is not here", hint="see systemd-cgls")
        v2.complete(group, layout, self._writes)
        if self._policy is not None:
            _check_devices(group, self._policy)

    def _undo(self, error: BaseException, made: list[str]) -> None:
        try:
            _stop(self._bus, self.group.unit)
        except Failure as second:
            if isinstance(error, Failure):
                error.message += f" (and removing {self.group.unit} failed: {second})"
        files.undo(made, error)


def _check_devices(group: Group, policy: devices.Policy) -> None:
    """systemd only logs it if its program cannot be attached, and has no property for "all but some": then it is ours."""
    directory = os.open(group.paths[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        attached = bpf.attached(directory)
    except OSError as error:
        raise Failure.wrap(_CREATE, "query device program", error, group.paths[""]) from error
    finally:
        os.close(directory)
    if policy.exceptions and (policy.allow or not attached):
        bpf.attach(group.paths[""], policy)


# ---- update


def apply(group: Group, layout: Layout, wanted: Resources) -> None:
    """The files first: they are what refuses, and then nothing has changed. Then the unit, so that it stays that way."""
    writes = plan.resources(wanted, layout, update=True)
    before = snapshot(group, writes)
    (v1 if group.version == 1 else v2).apply(group, layout, wanted)
    policy = devices.policy(wanted.devices) if wanted.devices else None
    properties = [*units.resources(_whole(group, wanted), group.version, update=True), *units.devices(policy, update=True)]
    if not properties:
        return
    try:
        _bus(_UPDATE).call("SetUnitProperties", "sba(sv)", group.unit, True, properties, unit=group.unit)
    except Failure as refusal:
        try:
            execute(group, before, _UPDATE)
        except Failure as second:
            refusal.message += f" (and setting back {second.path} failed: {second})"
        raise


def _whole(group: Group, wanted: Resources) -> Resources:
    """The property for a quota is one per second: it takes period and quota, of which an update may bring one."""
    cpu = wanted.cpu
    if cpu is None or not (cpu.quota or cpu.period):
        return wanted
    directory = group.directory("cpu")
    try:
        if group.version == 1:
            quota, period = (files.read_value(f"{directory}/cpu.cfs_{name}_us") for name in ("quota", "period"))
        else:
            quota, period = files.read_value(f"{directory}/cpu.max").split()
    except OSError as error:
        raise Failure.wrap(_UPDATE, "read", error) from error
    return replace(wanted, cpu=replace(cpu, quota=-1 if quota == "max" else int(quota), period=int(period)))


# ---- remove


def remove(group: Group, retry: Callable[[str], None], deadline: float) -> None:
    """The unit, and with it the group; then what is left in hierarchies that systemd does not manage. Gone already is fine."""
    wait = min(deadline, time.monotonic() + _COLLECT)
    while (there := _known(group)) and time.monotonic() < wait:
        time.sleep(0.001)
    if there:
        _ask_to_stop(group, deadline)
    (v1 if group.version == 1 else v2).remove(group, retry)


def _ask_to_stop(group: Group, deadline: float) -> None:
    while left := _pids(group):
        if time.monotonic() >= deadline:
            some = ", ".join(map(str, left[:8]))
            raise Failure(_REMOVE, errno=errno.EBUSY, path=group.path, message=f"it holds {some}")
        time.sleep(0.002)
    try:
        bus = _bus(_REMOVE)
        bus.follow(group.unit)
        _stop(bus, group.unit)
        bus.unfollow(group.unit)
    except Failure:
        # systemd is not to be had by the bus, but may still collect what is empty. To remove the group behind its back would leave it
        # with a unit that nothing ends.
        wait = time.monotonic() + _ALONE
        while _known(group):
            if time.monotonic() >= wait:
                raise
            time.sleep(0.02)


def _stop(bus: Bus, unit: str) -> None:
    """End a unit that holds no process, and have it forgotten; ``bus`` follows it. One that is not there is fine."""
    try:
        bus.job(bus.call("StopUnit", "ss", unit, "replace", unit=unit)[0], "StopUnit", unit)
        if os.path.lexists(f"{_TRANSIENT}/{unit}"):
            bus.call("ResetFailedUnit", "s", unit, unit=unit)
    except Refused as refused:
        if refused.name != NO_SUCH_UNIT:
            raise


def _known(group: Group) -> bool:
    return os.path.lexists(f"{_TRANSIENT}/{group.unit}") or any(os.path.isdir(directory) for directory in _tracked(group))


def _tracked(group: Group) -> list[str]:
    """Where systemd watches for the end of the last process."""
    if group.version == 2:
        return [group.paths[""]]
    return [directory for directory in (group.paths.get("name=systemd", ""), group.unified) if directory]


def _pids(group: Group) -> list[int]:
    return v1.pids(group) if group.version == 1 else v2.pids(group)


# ---- the runtime itself


def enter(layout: Layout, cgroups_path: str) -> None:
    """Move this process into a scope of its own, which is made where it is missing: it outlives the service that started us, however
    that is stopped."""
    group = group_at(layout, cgroups_path)
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        if any(line.rstrip("\n").endswith(f":{group.path}") for line in file):
            return
    bus = Bus("start supervisor")
    deadline = time.monotonic() + _COMING
    try:
        while not (_entered_new(bus, names.scope(cgroups_path)) or _entered(group)):
            # An earlier supervisor's, empty by now and being collected: neither there nor gone.
            if time.monotonic() >= deadline:
                raise Failure("start supervisor", path=group.unit, message=f"systemd has not collected the empty unit in {_COMING:g} s")
            time.sleep(0.02)
    finally:
        bus.close()


def _entered_new(bus: Bus, scope: names.Scope) -> bool:
    """False if there is such a unit already."""
    bus.follow(scope.unit)
    properties = [*units.scope(scope.slice, "cri-shim runtime: supervisor, stdio and helpers", os.getpid()), *units.RUNTIME]
    try:
        job = bus.call("StartTransientUnit", "ssa(sv)a(sa(sv))", scope.unit, "fail", properties, [], unit=scope.unit)[0]
    except Refused as refused:
        if refused.name == UNIT_EXISTS:
            return False
        raise
    result = bus.job(job, "StartTransientUnit", scope.unit)
    if result != "done":
        raise Failure("start supervisor", "StartTransientUnit", path=scope.unit, message=f"systemd's job ended as {result!r}")
    return True


def _entered(group: Group) -> bool:
    """Join a scope that an earlier supervisor's stdio still lives in: it is delegated, its members are ours to say. False if it is gone."""
    try:
        (v1 if group.version == 1 else v2).join(group)
    except Failure as failure:
        if failure.errno in (errno.ENOENT, errno.ENODEV):
            return False
        raise
    return True
