"""The composition root: builds every part, hands each the parts it uses, serves until SIGTERM. Nothing else constructs anything.

Imported only after the supervisor runs (``startup.serve``): from here on the process has threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from cri import apparmor, startup
from cri.api import server
from cri.api.archive import ArchiveService
from cri.api.image import ImageService
from cri.api.interceptor import Edge, Observer
from cri.api.runtime import Parts, RuntimeService
from cri.cgroups import Driver, accounts_swap
from cri.config import Config
from cri.containers.exits import Exits
from cri.containers.model import Containers
from cri.dump import dump
from cri.events import Events
from cri.images.store import Images
from cri.network.base import Network
from cri.node import Node
from cri.pods.model import Pod, Pods
from cri.pods.recover import Recovery
from cri.spec import host
from cri.spec.inputs import HostFacts
from cri.state.layout import Layout, boot_id
from cri.stats.layers import Layers
from cri.stats.meters import Meters
from cri.streaming.server import Server as StreamingServer
from cri.supervisor import Supervisor
from protos.people.v1 import people_pb2 as people
from protos.runtime.v1 import api_pb2 as v1
from shim import client
from shim.cgroups import layout as cgroups

#: Seconds for RPCs in flight after SIGTERM. Whatever takes longer is safe to cut short: it would be at a SIGKILL too.
GRACE = 3.0

log = logging.getLogger("cri.daemon")


def main(config: Config, driver: Driver, link: client.Link) -> int:
    """Runs until SIGTERM or SIGINT. Containers, supervisor and stdio go on."""
    if sys.version_info < (3, 12):
        # Waits for CNI plugins and unpack helpers without a thread each; later Pythons do so by themselves.
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    asyncio.run(_serve(config, driver, link))
    return 0


async def _serve(config: Config, driver: Driver, link: client.Link) -> None:
    stop = asyncio.Event()
    _signals(stop)
    async with _parts(config, driver, link) as (parts, recovery):
        edge = _edge(config, parts)
        services = v1.DESCRIPTOR.services_by_name
        table = {
            **edge.handlers(RuntimeService(parts), services["RuntimeService"]),
            **edge.handlers(ImageService(parts.images, parts.node.handlers), services["ImageService"]),
            **edge.handlers(ArchiveService(parts.images), people.DESCRIPTOR.services_by_name["ArchiveService"]),
        }
        recovery.load()
        listening = await server.listen(config.socket, table)
        settling = asyncio.create_task(recovery.settle(), name="recovery")
        settling.add_done_callback(_report)
        # What is alive now stays alive: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _notify("READY=1")
        log.info("serving", extra={"fields": {"socket": str(config.socket), "pid": os.getpid()}})
        await stop.wait()
        _notify("STOPPING=1")
        log.info("stopping")
        parts.events.close()
        await listening.stop(GRACE)
        await edge.quiet(GRACE)
        config.socket.unlink(missing_ok=True)
        settling.cancel()


@contextlib.asynccontextmanager
async def _parts(config: Config, driver: Driver, link: client.Link) -> AsyncIterator[tuple[Parts, Recovery]]:
    """Everything that verbs collaborate with; closed in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        layout = Layout(Path(config.root), Path(config.state))
        layout.prepare()
        supervisor = await Supervisor.start(
            layout.state, python=startup.interpreter(), runtime_cgroup=driver.runtime, link=link
        )
        stack.callback(supervisor.close)
        images = Images(layout.root / "images", config.images)
        images.load()
        stack.push_async_callback(images.close)
        network = _network(config, layout, supervisor)
        stack.push_async_callback(network.close)
        pods = Pods(layout)
        containers = Containers(layout, pods)
        stack.callback(containers.flush)
        exits = Exits(containers, supervisor)
        supervisor.on_exit, supervisor.on_oom = exits.reported, exits.out_of_memory
        events = Events()
        no_users = await supervisor.probe_user_namespaces(layout.root / "userns-probe")
        if no_users:
            log.info("pods cannot have user namespaces: %s", no_users)
        facts = replace(_host(driver), no_user_namespaces=no_users)
        if facts.apparmor and (reason := apparmor.load()):
            log.warning("AppArmor is enabled, but containers do not get a default profile: %s", reason)
            facts = replace(facts, no_apparmor_default=reason)
        meters = Meters(cgroups.detect(), Layers(images.usage, str(images.root)))
        stack.callback(meters.close)
        pods.watchers += events.changed, meters.changed
        containers.watchers += events.changed, meters.changed
        streaming = StreamingServer(config.streaming)
        await streaming.start()
        stack.push_async_callback(streaming.close)
        pods.watchers.append(partial(_end_streams, streaming))
        parts = Parts(pods, containers, supervisor, images, network, Node.of(config, facts), events, meters, streaming)
        yield parts, Recovery(pods, containers, supervisor, network, images, exits)


def _end_streams(streaming: StreamingServer, pod: Pod, event: v1.ContainerEventType) -> None:
    """A port-forward holds sockets in the pod's network namespace, which would outlive the pod with them."""
    if event in (v1.CONTAINER_STOPPED_EVENT, v1.CONTAINER_DELETED_EVENT):
        streaming.end(pod.id)


def _host(driver: Driver) -> HostFacts:
    layout = cgroups.detect()
    controllers, swap = frozenset(layout.controllers), accounts_swap(layout, driver)
    return host.detect(cgroup_version=layout.version, cgroup_driver=driver.name, controllers=controllers, swap=swap)


def _network(config: Config, layout: Layout, supervisor: Supervisor) -> Network:
    if config.network.mode == "bridge":
        from cri.network.bridge import BridgeNetwork

        return BridgeNetwork(layout.root / "network", subnets=config.network.subnets, boot_id=boot_id())
    from cri.network.cni.network import CniNetwork

    return CniNetwork(layout.root / "network", config.network.cni, netlink=supervisor.pod_netlink, sysctls=supervisor.pod_sysctls)


def _edge(config: Config, parts: Parts) -> Edge:
    observe: Observer | None = None
    if config.metrics.listen:
        from cri import metrics
        from cri.stats.refusals import RefusalMetrics

        observe = metrics.listen(config.metrics.listen, parts.images.pulls.measures, [RefusalMetrics(parts.containers)])
    return Edge(config.log.format, config.log.level, polls=config.log.polls, observe=observe)


def _signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Not through the loop: it should work while the loop is stuck, which is when one wants to know.
    signal.signal(signal.SIGUSR1, lambda number, frame: dump(loop))


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("%s failed", task.get_name(), exc_info=error)


def _notify(state: str) -> None:
    """sd_notify(3); nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError as error:
            log.warning("systemd cannot be notified: %s", error)
