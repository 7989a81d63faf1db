"""The plugins of a network in this process: the same operations as ``cri.network.cni.chain`` has, without executing anything but iptables.

A network is native as a whole or not at all. What its plugins want of iptables is collected and applied at the end of ADD and DEL, so that
a pod costs one ``iptables-restore`` for each address family that has rules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from cri.errors import CriError
from cri.network.cni import arguments
from cri.network.cni.cache import Attachment
from cri.network.cni.chain import CHECK_SINCE
from cri.network.cni.conf import ConfError, NetworkConf, Object, at_least
from cri.network.cni.execute import PluginFailed, PluginTimeout
from cri.network.native import bandwidth, bridge, firewall, interface, ipam, loopback, portmap, ptp, result, rules, tuning
from cri.network.native.call import Call, Host
from cri.network.native.options import Bridge, Firewall, NotNative, Options, Portmap, Ptp, understand, versions
from cri.network.native.result import Result
from cri.state import failpoints
from shim.errors import Failure

_MODULES: Mapping[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module for module in (bandwidth, bridge, firewall, loopback, portmap, ptp, tuning)
}
T = TypeVar("T")
_IPV6 = Path("/proc/sys/net/ipv6")
Netlink = Callable[[str], Awaitable[int]]
Parameters = Callable[[str, Mapping[str, str | None]], Awaitable[tuple[dict[str, str], dict[str, int]]]]

log = logging.getLogger("cri.network")


class Native:
    """The native plugins of this node. ``netlink`` and ``sysctls`` lead into the network namespace of a pod, by its id."""

    def __init__(
        self,
        enabled: Collection[str],
        timeout: float,
        netlink: Netlink | None,
        sysctls: Parameters | None,
    ) -> None:
        self._enabled, self._timeout = frozenset(enabled), timeout
        self._netlink, self._sysctls = netlink, sysctls
        self._host = Host()
        self._said: dict[str, str] = {}  # why a network is executed, by its source

    async def close(self) -> None:
        await self._host.close()

    # -- which networks

    def options(self, conf: NetworkConf) -> tuple[Options, ...] | None:
        """Of a network whose plugins are native; None for one that is executed. The log says why, once."""
        if not self._enabled:
            return None
        try:
            found = understand(conf, self._enabled)
            if any(isinstance(o, Firewall) and not o.backend for o in found) and firewall.firewalld_runs():
                raise NotNative("firewall: firewalld runs")
        except NotNative as reason:
            if self._said.get(conf.name) != str(reason):
                self._said[conf.name] = str(reason)
                log.info("the plugins of network %s are executed: %s", conf.name, reason)
            return None
        if self._said.pop(conf.name, "native") != "native":
            log.info("the plugins of network %s are native", conf.name)
        return found

    @staticmethod
    def problem(conf: NetworkConf, options: Sequence[Options]) -> str:
        """STATUS: why a pod could not be connected."""
        if versions(tuple(options)).isdisjoint(conf.versions):
            return f"network {conf.name}: its plugins do not speak CNI {', '.join(conf.versions)}"
        wanted = [kind for one in options if (kind := _needs_rules(one))]
        if wanted and shutil.which("iptables-restore", path=rules.PATH) is None:
            return f"network {conf.name}: {wanted[0]} needs iptables, which is not installed"
        return ""

    @staticmethod
    def versions(options: tuple[Options, ...]) -> frozenset[str]:
        return versions(options)

    # -- operations

    async def add(
        self, conf: NetworkConf, options: Sequence[Options], attachment: Attachment, netlink: Callable[[], Awaitable[int]]
    ) -> Object:
        """ADD; the result. What a failure leaves is for ``delete``. Raises PluginFailed, PluginTimeout."""
        call = self._call(conf, attachment, attachment.netns)
        call.netlink = netlink
        previous: Result | None = None
        try:
            for plugin, one in zip(conf.plugins, options, strict=True):
                failpoints.hit("add network", plugin.type)
                call.runtime = arguments.runtime_config(plugin, attachment.capability_args)
                previous = await _guard(plugin.type, "add", self._timeout, _MODULES[plugin.type].add(one, call, previous))
            failpoints.hit("add network", "rules")
            await _guard(conf.plugins[-1].type, "add", self._timeout, self._apply(conf, attachment, call))
            assert previous is not None, "a network has plugins"
            return previous.encode(call.version)
        except ConfError as error:
            raise PluginFailed(f'plugin type="{conf.plugins[-1].type}" failed (add): {error}') from None
        finally:
            call.close()

    async def _apply(self, conf: NetworkConf, attachment: Attachment, call: Call) -> None:
        iptables = self._host.iptables
        await _all(iptables[version].add(plan) for version, plan in call.plans.items() if plan)
        for plugin in conf.plugins:
            if plugin.type == "portmap":
                call.runtime = arguments.runtime_config(plugin, attachment.capability_args)
                await portmap.applied(call)

    async def delete(self, conf: NetworkConf, options: Sequence[Options], attachment: Attachment, netns: str) -> None:
        """DEL, also of what was added only in part, or by plugins that were executed, or is gone. Rules go before the address is free:
        no port may lead to the next one who has it."""
        call = self._call(conf, attachment, netns)
        try:
            previous = result.parse(attachment.result) if attachment.result is not None else None
        except ConfError as error:
            raise PluginFailed(f"network {conf.name}: {error}") from None
        for plugin, one in reversed(list(zip(conf.plugins, options, strict=True))):
            failpoints.hit("delete network", plugin.type)
            call.runtime = arguments.runtime_config(plugin, attachment.capability_args)
            if isinstance(one, Bridge | Ptp):
                if one.ip_masq and previous is not None:
                    interface.masquerade(call, [ip.address for ip in previous.ips])
                call.withdrawing = asyncio.create_task(self._withdraw(call))  # the link may go meanwhile, the address not
            try:
                await _guard(plugin.type, "delete", self._timeout, _MODULES[plugin.type].delete(one, call, previous))
            finally:
                await _guard(plugin.type, "delete", self._timeout, call.withdrawn())
        await _guard(conf.plugins[0].type, "delete", self._timeout, self._withdraw(call))

    async def _withdraw(self, call: Call) -> None:
        plans = call.take_plans()
        if not _IPV6.exists():  # nothing can be there, and ip6tables fails
            plans.pop(6, None)
        try:
            await _all(self._host.iptables[version].remove(plan) for version, plan in plans.items() if plan)
        except rules.ProgramMissing:
            log.warning("network %s: no iptables, so there are no rules to remove", call.network)

    async def check(self, conf: NetworkConf, options: Sequence[Options], attachment: Attachment) -> None:
        """CHECK, where the configuration allows it. Raises PluginFailed."""
        if conf.disable_check or attachment.result is None or not at_least(attachment.version(conf), CHECK_SINCE):
            return
        call = self._call(conf, attachment, attachment.netns)
        if self._netlink is not None:
            call.netlink = partial(self._netlink, attachment.container_id)
        previous = result.parse(attachment.result)
        try:
            for plugin, one in zip(conf.plugins, options, strict=True):
                call.runtime = arguments.runtime_config(plugin, attachment.capability_args)
                await _guard(plugin.type, "check", self._timeout, _MODULES[plugin.type].check(one, call, previous))
                for version, plan in call.take_plans().items():
                    if plan and (missing := await self._host.iptables[version].lacks(plan)):
                        raise PluginFailed(f'plugin type="{plugin.type}" failed (check): a rule is missing: {missing}')
        finally:
            call.close()

    async def collect(
        self, conf: NetworkConf, options: Sequence[Options], version: str, valid: Collection[tuple[str, str]]
    ) -> list[CriError]:
        """GC: addresses that belong to nobody of ``valid`` are given back. Links and rules go with their namespaces and DELs."""
        if conf.disable_gc or not at_least(version, "1.1.0"):
            return []
        failures: list[CriError] = []
        for one in options:
            if isinstance(one, Bridge | Ptp) and one.ipam is not None:
                try:
                    gone = await _guard(one.type, "gc", self._timeout, ipam.collect(one.ipam, conf.name, valid, self._timeout))
                except (PluginFailed, PluginTimeout) as error:
                    failures.append(error)
                else:
                    for address in gone:
                        log.info("network %s: address %s belonged to nobody", conf.name, address)
        return failures

    def _call(self, conf: NetworkConf, attachment: Attachment, netns: str) -> Call:
        call = Call(conf.name, attachment.container_id, attachment.if_name, netns, attachment.version(conf), self._host, self._timeout)
        if self._sysctls is not None:
            call.sysctls = partial(self._sysctls, attachment.container_id)
        return call


def _needs_rules(one: Options) -> str:
    """The plugin's type if it does."""
    return one.type if isinstance(one, Portmap | Firewall) or (isinstance(one, Bridge | Ptp) and one.ip_masq) else ""


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Both families side by side; the first failure once both have ended."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _guard(kind: str, verb: str, limit: float, work: Awaitable[T]) -> T:
    """What a plugin raises, in the words that one that is executed would fail with."""
    what = f'plugin type="{kind}" failed ({verb})'
    try:
        return await work
    except TimeoutError:
        raise PluginTimeout(f"{what}: something that it waits for had not ended after {limit:g} s") from None
    except OSError as error:
        raise PluginFailed(f"{what}: {error.strerror or os.strerror(error.errno or 0)}{_of(error)}") from None
    except (ValueError, Failure) as error:
        raise PluginFailed(f"{what}: {error}") from None
    except (PluginFailed, PluginTimeout):
        raise
    except CriError as error:
        raise PluginFailed(f"{what}: {error.message}", hint=error.hint) from None


def _of(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
