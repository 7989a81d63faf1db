"""Whether a network is ready: CNI's STATUS, asked in the background, because whoever asks us does not wait."""

from __future__ import annotations

import asyncio
import time

from cri.errors import CriError
from cri.network.cni import chain
from cri.network.cni.conf import NetworkConf, at_least
from cri.network.cni.execute import PluginFailed, Plugins
from cri.network.native.chain import Native

_REST = 1.0  # seconds between two questions


class Health:
    """What the plugins of the current network said last."""

    def __init__(self, plugins: Plugins, versions: chain.Versions, native: Native) -> None:
        self._plugins, self._versions, self._native = plugins, versions, native
        self._about: NetworkConf | None = None
        self._problem = ""
        self._asking: asyncio.Task[None] | None = None
        self._answered = 0.0

    def problem(self, conf: NetworkConf) -> str:
        """Why a pod could not be connected; empty: it can. Never waits, and asks again for the next time."""
        options = self._native.options(conf)
        if options is not None:
            self.close()
            return self._native.problem(conf, options)
        try:
            for plugin in conf.plugins:
                for kind in plugin.types:
                    self._plugins.find(kind)
        except PluginFailed as error:
            return str(error)
        if not at_least(conf.versions[0], chain.STATUS_SINCE) and len(conf.versions) == 1:
            return ""
        if conf is not self._about:
            self.close()
            self._about, self._problem, self._answered = conf, f"network {conf.name}: its plugins have not answered STATUS yet", 0.0
        if self._asking is None and time.monotonic() - self._answered > _REST:
            self._asking = asyncio.get_running_loop().create_task(self._ask(conf), name="CNI STATUS")
        return self._problem

    async def _ask(self, conf: NetworkConf) -> None:
        try:
            await chain.status(self._plugins, conf, await self._versions.choose(conf))
            problem = ""
        except (CriError, OSError) as error:
            problem = f"network {conf.name}: {error}"
        if conf is self._about:
            self._problem, self._answered, self._asking = problem, time.monotonic(), None

    @property
    def pending(self) -> bool:
        """The plugins have been asked for the first time and have not answered."""
        return self._asking is not None and not self._answered

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
