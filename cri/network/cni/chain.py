"""The plugins of a network, one after the other (SPEC.md section 3): ADD in order, DEL in reverse, CHECK, GC and STATUS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from cri.errors import CriError
from cri.network.cni import arguments, result
from cri.network.cni.cache import Attachment
from cri.network.cni.conf import NEWEST, ConfError, NetworkConf, Object, Plugin, at_least, choose_version
from cri.network.cni.execute import Call, PluginFailed, Plugins, PluginTimeout
from cri.state import failpoints

CHECK_SINCE, PREVIOUS_ON_DELETE_SINCE, STATUS_SINCE = "0.4.0", "0.4.0", "1.1.0"
_QUESTION = 10.0  # seconds for VERSION and STATUS
#: Keys that the runtime makes; in a file they mean nothing.
_OURS = ("capabilities", "prevResult")


def request(conf: NetworkConf, plugin: Plugin, version: str, **fields: Any) -> bytes:
    """What a plugin reads on stdin: its configuration unchanged, but for what the protocol says about it. None is left out."""
    raw: Object = {k: v for k, v in plugin.raw.items() if k not in _OURS and not k.startswith("cni.dev/")}
    raw.update({"name": conf.name, "cniVersion": version}, **{k: v for k, v in fields.items() if v is not None})
    return json.dumps(raw).encode()


async def add(plugins: Plugins, conf: NetworkConf, attachment: Attachment) -> Object:
    """ADD; the result of the last plugin. What a failure leaves is for ``delete``."""
    version, previous = attachment.version(conf), None
    call = _call("ADD", attachment, attachment.netns)
    for plugin in conf.plugins:
        failpoints.hit("add network", plugin.type)
        output = await plugins.run(plugin.type, call, request(conf, plugin, version, prevResult=previous, **_runtime(plugin, attachment)))
        try:
            previous = result.parse(output, version)
        except ConfError as error:
            raise PluginFailed(f'plugin type="{plugin.type}" failed (add): its result is {error}') from None
    assert previous is not None, "a network has plugins"
    return previous


async def delete(plugins: Plugins, conf: NetworkConf, attachment: Attachment, netns: str) -> None:
    """DEL, also of what was added only in part. ``netns`` is empty when the namespace is gone. The first failure ends it."""
    version = attachment.version(conf)
    previous = attachment.result if at_least(version, PREVIOUS_ON_DELETE_SINCE) else None
    for plugin in reversed(conf.plugins):
        failpoints.hit("delete network", plugin.type)
        configuration = request(conf, plugin, version, prevResult=previous, **_runtime(plugin, attachment))
        try:
            await plugins.run(plugin.type, _call("DEL", attachment, netns), configuration)
        except PluginFailed as error:
            if not _nothing_to_do(error, attachment):
                raise


def _nothing_to_do(error: PluginFailed, attachment: Attachment) -> bool:
    """Whether what a plugin says to DEL means that there is nothing of its own to clean up."""
    code = error.refusal.code if error.refusal is not None else 0
    if code == result.INCOMPATIBLE:
        return attachment.result is None  # nor could it ADD; one that was replaced since is another matter
    return code == result.CONTAINER_UNKNOWN


async def check(plugins: Plugins, conf: NetworkConf, attachment: Attachment) -> None:
    """CHECK, where the configuration allows it."""
    version = attachment.version(conf)
    if conf.disable_check or attachment.result is None or not at_least(version, CHECK_SINCE):
        return
    for plugin in conf.plugins:
        configuration = request(conf, plugin, version, prevResult=attachment.result, **_runtime(plugin, attachment))
        await plugins.run(plugin.type, _call("CHECK", attachment, attachment.netns), configuration)


async def collect(plugins: Plugins, conf: NetworkConf, version: str, valid: Iterable[Attachment]) -> list[CriError]:
    """GC: plugins forget every attachment that is not ``valid``. All are asked; the failures."""
    if conf.disable_gc or not at_least(version, STATUS_SINCE):
        return []
    listed = [{"containerID": a.container_id, "ifname": a.if_name} for a in valid]
    failures: list[CriError] = []
    for plugin in conf.plugins:
        # plugins built with libcni 1.1 read the second spelling (containernetworking/cni#1101)
        keys = {"cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}
        try:
            await plugins.run(plugin.type, Call("GC"), request(conf, plugin, version, **keys))
        except (PluginFailed, PluginTimeout) as error:
            failures.append(error)
    return failures


async def status(plugins: Plugins, conf: NetworkConf, version: str) -> None:
    """STATUS; raises what the first plugin says that is not ready."""
    if at_least(version, STATUS_SINCE):
        for plugin in conf.plugins:
            await plugins.run(plugin.type, Call("STATUS"), request(conf, plugin, version), timeout=_QUESTION)


class Versions:
    """Which versions a plugin speaks: asked once per binary, and again when it was replaced."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._known: dict[str, tuple[tuple[int, int], frozenset[str] | None]] = {}

    async def choose(self, conf: NetworkConf, native: frozenset[str] | None = None) -> str:
        """The newest version that the configuration allows and all its plugins speak.

        ``native`` is what our own plugins speak. Those that are installed have a say then, too: they may have to do the DEL.
        """
        if len(conf.versions) == 1 and (native is None or conf.versions[0] in native):
            return conf.versions[0]  # no choice: a plugin that cannot will say so
        kinds = sorted({kind for plugin in conf.plugins for kind in plugin.types})
        if native is not None:
            kinds = [kind for kind in kinds if self._plugins.has(kind)]
        spoken = {kind: known for kind in kinds if (known := await self._spoken(kind)) is not None}
        if native is not None:
            spoken["native"] = native
        chosen = choose_version(conf.versions, spoken.values())
        if not chosen:
            said = "; ".join(f"{kind}: {', '.join(sorted(known)) or 'none'}" for kind, known in spoken.items())
            raise PluginFailed(f"network {conf.name} allows CNI {', '.join(conf.versions)}, its plugins speak other versions ({said})")
        return chosen

    async def _spoken(self, kind: str) -> frozenset[str] | None:
        """None for a plugin that does not say (before 0.2.0 there was no VERSION): the configuration decides."""
        path = self._plugins.find(kind)
        identity = _identity(path)
        known = self._known.get(path)
        if known is None or known[0] != identity:
            call = Call("VERSION", netns="dummy", interface="dummy", container_id="dummy")  # old plugins want to see them
            try:
                answer = await self._plugins.run(kind, call, json.dumps({"cniVersion": NEWEST}).encode(), timeout=_QUESTION)
                known = (identity, result.spoken(answer))
            except (PluginFailed, PluginTimeout, ConfError):
                known = (identity, None)
            self._known[path] = known
        return known[1]


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns


def _call(command: str, attachment: Attachment, netns: str) -> Call:
    return Call(command, attachment.container_id, netns, attachment.if_name, attachment.cni_args)


def _runtime(plugin: Plugin, attachment: Attachment) -> Mapping[str, Any]:
    config = arguments.runtime_config(plugin, attachment.capability_args)
    return {"runtimeConfig": config} if config else {}
