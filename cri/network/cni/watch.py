"""The configuration directory, as it is now: looked at whenever somebody needs it, read again only if something in it changed.

The network is the first usable file by name. Looking costs one scan of a small directory (20 µs), needs no inotify instance (of which a
node of many containers runs out) and sees a change before the next pod does.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cri.network.cni import conf
from cri.network.cni.conf import ConfError, NetworkConf

_Signature = tuple[tuple[str, int, int, int], ...]

#: containerd's words: tools and people look for them.
NOT_INITIALIZED = "cni plugin not initialized"

log = logging.getLogger("cri.network")


class Watch:
    """The network of this node."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._signature: _Signature | None = None
        self._network: NetworkConf | None = None
        self._problems: list[str] = []

    def current(self) -> NetworkConf:
        """The network. Raises ConfError, which says why there is none."""
        signature = self._look()
        if signature != self._signature:
            self._network, self._problems = conf.load(self._directory)
            self._signature = signature
            for problem in self._problems:
                log.error("network configuration %s", problem)
            if self._network is not None:
                log.info("network %s of %s, CNI %s", self._network.name, self._network.source, ", ".join(self._network.versions))
        if self._network is None:
            raise ConfError(f"{NOT_INITIALIZED}: {'; '.join(self._problems) or f'no network config found in {self._directory}'}")
        return self._network

    def _look(self) -> _Signature:
        """All regular files, those in the directories of plugins too."""
        found = []
        for directory in (str(self._directory), *self._subdirectories()):
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.name.endswith(conf.SUFFIXES) and entry.is_file():
                            facts = entry.stat()
                            found.append((entry.path, facts.st_mtime_ns, facts.st_size, facts.st_ino))
            except FileNotFoundError:
                continue  # as it should be until a network is installed
            except OSError as error:
                raise ConfError(f"{NOT_INITIALIZED}: {directory}: {error.strerror}") from None
        return tuple(sorted(found))

    def _subdirectories(self) -> list[str]:
        try:
            with os.scandir(self._directory) as entries:
                return [entry.path for entry in entries if entry.is_dir()]
        except OSError:
            return []  # the scan of the directory itself says why
