"""Operations on pods: their namespaces, made in a child and held here as fds."""

from __future__ import annotations

import os
import signal
from typing import Any

from shim import cgroups
from shim.errors import Failure
from shim.linux import process as processes
from shim.runtime import jobs
from shim.runtime import pod as making
from shim.supervisor import leftovers
from shim.supervisor.children import Failed
from shim.supervisor.logs import Logs
from shim.supervisor.request import Request
from shim.supervisor.table import Core, Pod, forget, save

_DEATH = 10.0  # s
_SOCKETS = 8  # of each address family: what one message of a child carries


async def create(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Make the namespaces. The daemon gets a copy of every fd, for a successor of this process."""
    if request.id in core.table.pods:
        raise Failure("create pod", path=request.id, message="the pod exists")
    pod = core.table.pods[request.id] = Pod(request.id, request.take(0))
    slot = core.children.take_slot()
    try:
        facts, fds = await core.children.call(making.Pod(core.context, pod.directory, slot), "create pod")
        netlink = fds.pop("netlink", None)
        if netlink is not None:
            request.given["netlink"] = netlink
        pod.fds = fds
        pod.init, slot = core.children.adopt_slot(slot), -1
        if facts.get("cgroup"):
            pod.group = cgroups.Group.from_json(facts["cgroup"])
        if pod.init is not None:
            pod.starttime = processes.starttime(pod.init.pid)
        save(core, pod.directory, pod)
    except BaseException as error:
        if slot >= 0:
            pod.init = core.children.adopt_slot(slot)
        if isinstance(error, Failed) and error.body.get("cgroup"):
            pod.group = cgroups.Group.from_json(error.body["cgroup"])
        await _release(core, pod, quietly=True)
        raise
    pod.ready = True
    request.lent.update(pod.fds)
    return {"pid": pod.pid, "starttime": pod.starttime}


async def adopt(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Take over namespaces that the daemon held for an earlier supervisor. What is known already stays."""
    names = request.body["names"]
    if len(names) != len(request.fds) or not all(isinstance(name, str) for name in names):
        raise Failure("adopt pod", path="names", message="does not name the fds")
    pod = core.table.pods.get(request.id)
    if pod is None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        pod = core.table.pods[request.id] = Pod(request.id, os.open(f"pods/{request.id}", flags, dir_fd=core.state))
    for index, name in enumerate(names):
        if name not in pod.fds and name != "netlink":
            pod.fds[name] = request.take(index)
    pod.ready = True
    save(core, pod.directory, pod)
    return {}


async def handles(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Copies of a pod's fds, for a daemon that has been restarted."""
    request.lent.update(core.table.pod(request.id).fds)
    return {}


async def netlink(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """A rtnetlink socket inside the pod's network namespace."""
    pod = core.table.pod(request.id)
    if "network" not in pod.fds:
        raise Failure("netlink", path=request.id, message="the pod has no network namespace of its own")
    _, fds = await core.children.call(jobs.Netlink(pod.fds["network"]), "netlink")
    request.given.update(fds)
    return {}


async def sysctls(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """Write and read parameters of the pod's network namespace."""
    pod = core.table.pod(request.id)
    if "network" not in pod.fds:
        raise Failure("sysctl", path=request.id, message="the pod has no network namespace of its own")
    if not all(text is None or isinstance(text, str) for text in request.body["write"].values()):
        raise Failure("sysctl", path=request.id, message="a value is not text")
    facts, _ = await core.children.call(jobs.Sysctls(core.context, pod.fds["network"], request.body["write"]), "sysctl")
    return facts


async def sockets(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """TCP sockets inside the pod's network namespace, for port-forward to connect."""
    pod = core.table.pod(request.id)
    if "network" not in pod.fds:
        raise Failure("sockets", path=request.id, message="the pod has no network namespace of its own")
    _, fds = await core.children.call(jobs.Sockets(pod.fds["network"], _SOCKETS), "sockets")
    request.given.update(fds)
    return {}


async def delete(core: Core, logs: Logs, request: Request) -> dict[str, Any]:
    """End PID 1, remove its cgroup, let go of the namespaces and their pin. Safe to repeat."""
    pod = core.table.pods.get(request.id)
    if pod is not None:
        await core.loop.joined(core.table.deleting, pod, lambda: _release(core, pod, quietly=False))
    else:
        await leftovers.release(core, "pods", request.id)
        for pin in _pins(core, request.id):
            await core.children.call(jobs.Unpin(pin), "delete pod")
    return {}


def _pins(core: Core, name: str) -> list[str]:
    """Paths at which namespaces of the pod are pinned."""
    found = []
    for pin in (f"netns/{name}", f"userns/{name}"):
        try:
            os.stat(pin, dir_fd=core.state, follow_symlinks=False)
        except FileNotFoundError:
            continue
        found.append(f"{core.state_path}/{pin}")
    return found


async def _release(core: Core, pod: Pod, *, quietly: bool) -> None:
    """All steps run; the first failure is raised, or with ``quietly`` logged because another one is being reported."""
    failures: list[Failure] = []
    if pod.init is not None:
        pod.init.signal(signal.SIGKILL)
        if not await core.loop.within(pod.init.ended, _DEATH):
            failures.append(Failure("delete pod", path=pod.id, message=f"PID 1 ({pod.init.pid}) is still there {_DEATH:g} s after SIGKILL"))
    work: list[jobs.RemoveCgroup | jobs.Unpin] = [jobs.Unpin(pin) for pin in _pins(core, pod.id)]
    if pod.group is not None:
        work.insert(0, jobs.RemoveCgroup(pod.group))
    for job in work:
        try:
            await core.children.call(job, "delete pod")
        except Failure as failure:
            failures.append(failure)
    if failures and not quietly:
        raise failures[0]
    for each in failures:
        core.log(f"pod {pod.id}: {each}")
    forget(pod.directory)
    if core.table.pods.get(pod.id) is pod:
        del core.table.pods[pod.id]
        pod.close()
