"""The pod network of CNI plugins: ``base.Network`` for ``network.mode = "cni"``.

Every ADD has an intent on disk before it and a DEL after it, whoever dies in between: a failed ADD is undone at once, a failed DEL is tried
again until it works (the kubelet asks again, too; a pod whose creation failed is never asked about), and a daemon that starts looks for
attachments of pods that are gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Coroutine
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from cri.config import Cni
from cri.errors import CriError, InvalidArgument, Unavailable, Unknown
from cri.network.base import PodNetwork, Result, Status
from cri.network.cni import arguments, chain, orphans, result, template
from cri.network.cni.cache import Attachment, Cache
from cri.network.cni.conf import ConfError, NetworkConf
from cri.network.cni.exclusion import Gate
from cri.network.cni.execute import Plugins
from cri.network.cni.health import Health
from cri.network.cni.watch import Watch
from cri.network.native.chain import Native, Netlink, Parameters
from cri.state import failpoints
from cri.undo import Undo
from shim.errors import Failure
from shim.linux import libc
from shim.linux import path as paths

INTERFACE = "eth0"
_NSFS = 0x6E736673
_CIDR_FILE = "pod_cidr"
_AT_ONCE = 8  # attachments of gone pods that are deleted side by side at a start
_PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0, 300.0)  # seconds before a DEL that failed is tried again
_DESPERATE = 3  # attempts after which the configuration of now may replace one that never worked

log = logging.getLogger("cri.network")


class CniNetwork:
    """``directory`` is ``root/network``."""

    def __init__(self, directory: Path, config: Cni, *, netlink: Netlink | None = None, sysctls: Parameters | None = None) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._config = config
        self._cache = Cache(directory / "cni")
        self._watch = Watch(Path(config.conf_dir))
        self._plugins = Plugins(config.bin_dirs, config.timeout)
        self._versions = chain.Versions(self._plugins)
        self._native = Native(config.native_plugins, config.timeout, netlink, sysctls)
        self._health = Health(self._plugins, self._versions, self._native)
        self._gate = Gate()
        self._cidrs = self._recorded_cidrs()
        self._inherited = self._cache.pods()  # their plugins may still run
        self._ending: asyncio.Task[None] | None = None
        self._deleting: dict[str, asyncio.Task[None]] = {}
        self._retrying: dict[str, asyncio.Task[None]] = {}
        self._kept: dict[str, int] = {}  # namespaces, by pin: of pods whose DEL has failed
        self._checking: asyncio.Task[None] | None = None

    # -- base.Network

    def status(self) -> Status:
        try:
            problem = self._health.problem(self._watch.current())
        except ConfError as error:
            problem = str(error)
        # containerd's words, by which the kubelet's message is known: "container runtime network not ready: NetworkReady=false reason:…"
        if not problem:
            return Status(True)
        return Status(False, "NetworkPluginNotReady", f"Network plugin returns error: {problem}", pending=self._health.pending)

    async def setup(self, pod: PodNetwork) -> Result:
        try:
            conf = self._watch.current()
        except ConfError as error:
            raise Unavailable(f"set up pod network: {error}") from None
        attachment = self._attachment(pod, conf.name)
        await self.teardown(pod)  # of an attempt that was interrupted
        version = await self._choose(conf)
        attachment.config = conf.encode(version)
        async with Undo("set up pod network") as undo:
            undo.push("DEL", lambda: self.teardown(pod), timeout=self._patience(conf))
            async with self._gate.shared():
                ips = await self._add(conf, attachment, pod)
        detail = {"network": conf.name, "configuration": conf.source, "cniVersion": version, "cniResult": attachment.result}
        return Result(ips=ips, raw=detail)

    def _attachment(self, pod: PodNetwork, network: str) -> Attachment:
        """What plugins are to know of a pod. Raises InvalidArgument for what they must not be told."""
        return Attachment(
            container_id=pod.pod_id,
            if_name=INTERFACE,
            network_name=network,
            netns=pod.netns_path,
            cni_args=arguments.arguments(pod),
            capability_args=arguments.capabilities(pod, self._cidrs),
        )

    async def _choose(self, conf: NetworkConf) -> str:
        options = self._native.options(conf)
        return await self._versions.choose(conf, self._native.versions(options) if options is not None else None)

    async def _add(self, conf: NetworkConf, attachment: Attachment, pod: PodNetwork) -> tuple[str, ...]:
        failpoints.hit("add network", "intent")
        self._cache.write(attachment)
        network = attachment.network()
        assert network is not None, "it has just been encoded"
        options = self._native.options(network)
        if options is not None and pod.netlink is not None:
            attachment.result = await self._native.add(network, options, attachment, pod.netlink)
        else:
            attachment.result = await chain.add(self._plugins, network, attachment)
        failpoints.hit("add network", "result")
        try:
            ips = result.addresses(attachment.result, INTERFACE)
        except ConfError as error:
            raise Unknown(f"network {conf.name}: its result has {error}") from None
        if not ips:
            # the kubelet would make one sandbox after the other
            raise Unknown(f"network {conf.name} gave interface {INTERFACE} no address")
        self._cache.write(attachment)
        return ips

    async def teardown(self, pod: PodNetwork) -> None:
        await self._delete(pod.pod_id, pod)

    async def recover(self, live: Collection[str]) -> None:
        keep = set(live)
        some = asyncio.Semaphore(_AT_ONCE)

        async def delete(pod_id: str) -> None:
            async with some:
                try:
                    await self._delete(pod_id)
                except (CriError, Failure, OSError) as error:  # and it is tried again
                    log.error("network of pod %s, which is gone: %s", pod_id, error)

        gone = sorted(self._cache.pods() - keep)
        if gone:
            log.info("deleting the networks of %d pods that are gone", len(gone))
        await asyncio.gather(*(delete(pod_id) for pod_id in gone))
        try:
            conf = self._watch.current()
            await self._collect(conf)
        except ConfError:
            pass  # status() says it
        except (CriError, OSError) as error:
            log.error("network garbage: %s", error)
        self._checking = self._spawn(self._check_all(sorted(self._inherited & keep)), "CNI CHECK")

    def update_pod_cidr(self, cidr: str) -> None:
        """For the capability ``ipRanges`` of new pods, and for the configuration that ``conf_template`` describes."""
        try:
            cidrs = tuple(str(ip_network(c.strip())) for c in cidr.split(",") if c.strip())
        except ValueError as error:
            raise InvalidArgument(str(error), field="runtime_config.network_config.pod_cidr") from None
        if cidrs != self._cidrs:
            _write(self._directory, _CIDR_FILE, ",".join(cidrs).encode())
            self._cidrs = cidrs
        if cidrs and self._config.conf_template:
            template.install(Path(self._config.conf_template), Path(self._config.conf_dir), cidrs)

    async def close(self) -> None:
        self._health.close()
        tasks = [*self._retrying.values(), *self._deleting.values(), *(t for t in (self._ending, self._checking) if t is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for fd in self._kept.values():
            os.close(fd)
        await self._native.close()
        self._cache.close()

    # -- DEL

    async def _delete(self, pod_id: str, pod: PodNetwork | None = None, attempt: int = 0) -> None:
        """DEL of all that a pod has. Joined by whoever else wants it; a caller that gives up does not end it."""
        task = self._deleting.get(pod_id)
        if task is None:
            if pod_id not in self._cache.pods():
                return
            task = self._deleting[pod_id] = self._spawn(self._delete_all(pod_id, pod, attempt), f"CNI DEL {pod_id}")
            task.add_done_callback(lambda _: self._deleting.pop(pod_id, None))
        await asyncio.shield(task)

    async def _delete_all(self, pod_id: str, pod: PodNetwork | None, attempt: int) -> None:
        await self._end_orphans(pod_id)
        try:
            async with self._gate.shared():
                for attachment in self._cache.of(pod_id):
                    if pod is not None and not attachment.config:  # its record is torn
                        attachment = self._attachment(pod, attachment.network_name)
                    await self._delete_one(attachment, attempt)
        except Exception:
            if pod_id not in self._retrying:
                self._retrying[pod_id] = self._spawn(self._retry(pod_id), f"CNI DEL {pod_id} again")
                self._retrying[pod_id].add_done_callback(lambda _: self._retrying.pop(pod_id, None))
            raise
        self._inherited.discard(pod_id)

    async def _delete_one(self, attachment: Attachment, attempt: int) -> None:
        conf = attachment.network()
        if conf is None or (attachment.result is None and attempt > _DESPERATE and attempt % 2):
            # The record is torn; or no ADD succeeded and DEL keeps failing: a configuration that was wrong may have been corrected since.
            conf = self._current(attachment.network_name)
        options, netns = self._native.options(conf), self._namespace(attachment.netns)
        try:
            if options is not None:
                await self._native.delete(conf, options, attachment, netns)
            else:
                await chain.delete(self._plugins, conf, attachment, netns)
        except CriError as error:
            self._keep_namespace(attachment.netns)
            if not error.hint:
                error.hint = f"to give it up, remove {self._cache.path(attachment)}"
            raise
        failpoints.hit("delete network", "record")
        self._cache.remove(attachment)
        if attachment.netns in self._kept:
            os.close(self._kept.pop(attachment.netns))

    def _namespace(self, path: str) -> str:
        """CNI_NETNS for DEL: the pin, or the namespace that we kept, or nothing."""
        fd = _open_namespace(path)
        if fd >= 0:
            os.close(fd)
            return path
        return f"/proc/{os.getpid()}/fd/{self._kept[path]}" if path in self._kept else ""

    def _keep_namespace(self, path: str) -> None:
        """Whoever fails to create a pod goes on to delete its namespaces, and plugins clean up less of what they cannot look into."""
        if path not in self._kept and (fd := _open_namespace(path)) >= 0:
            self._kept[path] = fd

    def _current(self, name: str) -> NetworkConf:
        """For an attachment whose record is torn: the network of that name, if it is still there."""
        try:
            conf = self._watch.current()
        except ConfError as error:
            raise Unavailable(f"tear down pod network: {error}") from None
        if conf.name != name:
            raise Unavailable(f"tear down pod network: network {name} has no configuration any more")
        return conf

    async def _retry(self, pod_id: str) -> None:
        number = 0
        while pod_id in self._cache.pods():
            await asyncio.sleep(_PAUSES[min(number, len(_PAUSES) - 1)])
            number += 1
            try:
                await self._delete(pod_id, attempt=number)
            except (CriError, Failure, OSError) as error:
                log.warning("network of pod %s: attempt %d to delete it: %s", pod_id, number + 1, error)

    async def _end_orphans(self, pod_id: str) -> None:
        if pod_id in self._inherited:
            if self._ending is None:
                self._ending = self._spawn(asyncio.to_thread(orphans.end, frozenset(self._inherited)), "CNI orphans")
            await asyncio.shield(self._ending)

    # -- GC and CHECK

    async def _collect(self, conf: NetworkConf) -> None:
        version, options = await self._choose(conf), self._native.options(conf)
        async with self._gate.alone():
            # those that could not be deleted, too: GC is no substitute for DEL
            valid = [a for a in self._cache.all(self._cache.pods()) if a.network_name == conf.name]
            if options is not None:
                failures = await self._native.collect(conf, options, version, {(a.container_id, a.if_name) for a in valid})
            else:
                failures = await chain.collect(self._plugins, conf, version, valid)
            for error in failures:
                log.error("network garbage: %s", error)

    async def _check_all(self, pods: Collection[str]) -> None:
        """Say in the log whose network was broken while no daemon was looking. One at a time: nobody waits for it."""
        for pod_id in pods:
            try:
                await self.check(pod_id)
            except (CriError, OSError) as error:
                log.warning("network of pod %s: %s", pod_id, error)

    async def check(self, pod_id: str) -> None:
        """CHECK: raises what a plugin finds missing."""
        for attachment in self._cache.of(pod_id):
            conf = attachment.network()
            if conf is not None:
                options = self._native.options(conf)
                async with self._gate.shared():
                    if options is not None:
                        await self._native.check(conf, options, attachment)
                    else:
                        await chain.check(self._plugins, conf, attachment)

    # -- plumbing

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        # whoever waits raises it; if nobody does any more it has been seen all the same
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _patience(self, conf: NetworkConf) -> float:
        return (self._config.timeout + 5) * len(conf.plugins) + 5

    def _recorded_cidrs(self) -> tuple[str, ...]:
        try:
            text = (self._directory / _CIDR_FILE).read_text()
        except FileNotFoundError:
            return ()
        return tuple(part.strip() for part in text.split(",") if part.strip())


def _open_namespace(path: str) -> int:
    """A pinned namespace; -1 where the pin holds none any more: it is an empty file then, or nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    if libc.fstatfs_type(fd) == _NSFS:
        return fd
    os.close(fd)
    return -1


def _write(directory: Path, name: str, data: bytes) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        paths.write_atomic(fd, name, data)
    finally:
        os.close(fd)
