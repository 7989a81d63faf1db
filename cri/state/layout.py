"""Where things live: every path that the daemon's records and verbs use, in one place.

``root`` survives a reboot, ``state`` must not matter after one. Both are 0700: records and specs carry environments, and
environments carry secrets (CVE-2021-41103 and CVE-2024-25621 were state directories that others could read).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below the two directories of the configuration."""

    root: Path
    state: Path

    @property
    def pod_records(self) -> Path:
        return self.root / "pods"

    @property
    def container_records(self) -> Path:
        return self.root / "containers"

    @property
    def volumes(self) -> Path:
        """Image VOLUMEs: ``volumes/<container>/<n>/``."""
        return self.root / "volumes"

    @property
    def pods(self) -> Path:
        return self.state / "pods"

    @property
    def bundles(self) -> Path:
        return self.state / "containers"

    @property
    def namespaces(self) -> Path:
        return self.state / "netns"

    def pod(self, pod_id: str) -> Path:
        """A pod's state directory: sandbox.json, intent.json and the files that its containers mount."""
        return self.pods / pod_id

    def bundle(self, container_id: str) -> Path:
        return self.bundles / container_id

    def container_volumes(self, container_id: str) -> Path:
        return self.volumes / container_id

    def netns(self, pod_id: str) -> Path:
        """The pin of the pod's network namespace."""
        return self.namespaces / pod_id

    def userns(self, pod_id: str) -> Path:
        """The pin of the pod's user namespace, where the host's network leaves nothing else to find it by."""
        return self.state / "userns" / pod_id

    def prepare(self) -> None:
        """Make the directories; one that others may enter is repaired."""
        for directory in (
            self.root,
            self.state,
            self.pod_records,
            self.container_records,
            self.volumes,
            self.pods,
            self.bundles,
            self.namespaces,
            self.state / "userns",
        ):
            directory.mkdir(parents=True, exist_ok=True)
            os.chmod(directory, 0o700)


def boot_id() -> str:
    """This boot of the machine; facts recorded under another one are about processes that are gone."""
    return BOOT_ID.read_text().strip()
