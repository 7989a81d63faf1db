"""Attachments on disk: what was asked of the plugins, and what they answered. libcni's format (``cniCacheV1``), readable with ``cat``.

A file without ``result`` is an intent: written before ADD, so that a daemon that dies at any instruction leaves something to DEL by.
It carries the configuration of that moment, because DEL must be given the same one, whatever has become of the file (SPEC.md section 3).
A torn file (power cut) still tells the network and the pod by its name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from cri.network.cni import conf
from cri.network.cni.conf import NetworkConf
from shim.linux import path as paths

KIND = "cniCacheV1"
_NAME = re.compile(r"(?P<network>.+)-(?P<pod>[0-9a-f]{64})-(?P<interface>[^-]+)")

log = logging.getLogger("cri.network")


class Attachment(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """One pod on one network."""

    kind: str = ""
    container_id: str
    config: bytes = b""  # empty: lost
    if_name: str
    network_name: str
    netns: str = ""
    cni_args: tuple[tuple[str, str], ...] = ()
    capability_args: dict[str, Any] = {}
    result: dict[str, Any] | None = None

    @property
    def file(self) -> str:
        return f"{self.network_name}-{self.container_id}-{self.if_name}"

    def network(self) -> NetworkConf | None:
        """The configuration of its ADD; None if that is lost."""
        return conf.parse(self.config) if self.config else None

    def version(self, network: NetworkConf) -> str:
        """The version of its ADD. ``encode`` left only that one; a configuration that replaces a lost one may have several."""
        return network.versions[0]


class Cache:
    """``directory/results``. One thread, no locks: the event loop's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "results"
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[str, set[str]] = {}  # by pod
        for name in os.listdir(self._fd):
            match = _NAME.fullmatch(name)
            if match is not None:
                self._files.setdefault(match["pod"], set()).add(name)
            else:
                os.unlink(name, dir_fd=self._fd)  # the temporary file of a writer that died

    def close(self) -> None:
        os.close(self._fd)

    def pods(self) -> set[str]:
        """Every pod that has, or may have, something at a plugin."""
        return set(self._files)

    def of(self, pod_id: str) -> list[Attachment]:
        """A pod's attachments. A file that somebody has removed by hand is one that they wanted to be given up."""
        found = []
        for name in sorted(self._files.get(pod_id, ())):
            try:
                data = (self._directory / name).read_bytes()
            except FileNotFoundError:
                self._forget(pod_id, name)
                continue
            found.append(self._decode(name, data))
        return found

    def all(self, pods: Iterable[str]) -> list[Attachment]:
        return [attachment for pod_id in pods for attachment in self.of(pod_id)]

    def _decode(self, name: str, data: bytes) -> Attachment:
        match = _NAME.fullmatch(name)
        assert match is not None
        try:
            attachment = msgspec.json.decode(data, type=Attachment)
            attachment.network()
            if attachment.kind != KIND or attachment.file != name:
                raise ValueError("it belongs to something else")
        except (ValueError, msgspec.MsgspecError) as error:
            log.error("network attachment %s cannot be used (%s); it is deleted by what its name says", self._directory / name, error)
            return Attachment(container_id=match["pod"], if_name=match["interface"], network_name=match["network"])
        return attachment

    def path(self, attachment: Attachment) -> Path:
        return self._directory / attachment.file

    def write(self, attachment: Attachment) -> None:
        """Replace the record. Not flushed: what it speaks of dies with the power, or its name survives (see cri/state/records.py)."""
        attachment.kind = KIND
        self._files.setdefault(attachment.container_id, set()).add(attachment.file)
        paths.write_atomic(self._fd, attachment.file, msgspec.json.encode(attachment) + b"\n")

    def remove(self, attachment: Attachment) -> None:
        """Once DEL has succeeded. Removing nothing is fine."""
        try:
            os.unlink(attachment.file, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        self._forget(attachment.container_id, attachment.file)

    def _forget(self, pod_id: str, name: str) -> None:
        names = self._files.get(pod_id, set())
        names.discard(name)
        if not names:
            self._files.pop(pod_id, None)
