"""The node's file of block I/O classes, read again when it has changed, and a container's class."""

from __future__ import annotations

import glob
import logging
import os
import stat

from cri.errors import FailedPrecondition
from cri.spec import blockio
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

_LIMIT = 1 << 20  # bytes

log = logging.getLogger("cri.blockio")


class ClassFile:
    """``runtime.blockio_config_file``."""

    def __init__(self, path: str, *, ignore_missing: bool) -> None:
        self.path, self._ignore_missing = path, ignore_missing
        self._signature: tuple[int, ...] = ()
        self._classes: blockio.Classes = {}

    def load(self) -> None:
        """Read the file if it has changed. Raises FailedPrecondition naming it and the field."""
        if not self.path:
            return
        try:
            status = os.stat(self.path)
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
            if signature == self._signature:
                return
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT:
                raise FailedPrecondition(f"{self.path}: not a regular file of at most {_LIMIT} bytes")
            with open(self.path, "rb") as file:
                self._classes = blockio.parse(_yaml(file.read(_LIMIT)))
        except OSError as error:
            raise FailedPrecondition(f"{self.path}: {error.strerror}") from None
        except blockio.BlockioError as error:
            raise FailedPrecondition(f"{self.path}: {error}") from None
        self._signature = signature

    def of(self, config: v1.ContainerConfig, pod: v1.PodSandboxConfig) -> oci.BlockIO | None:
        """The parameters of the class that the container's or the pod's annotations name, if any."""
        name = blockio.class_of(config, pod)
        if not name:
            return None
        if not self.path:
            if self._ignore_missing:
                log.debug("blockio class %r ignored: there is no blockio_config_file", name)
                return None
            raise FailedPrecondition(
                f"blockio class {name!r:.80}: this node has no classes",
                hint="set runtime.blockio_config_file, or runtime.ignore_blockio_not_enabled_errors",
            )
        self.load()
        return blockio.build(name, self._classes, block_devices)


def _yaml(data: bytes) -> object:
    import yaml  # a node without classes never needs it

    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError) as error:
        raise blockio.BlockioError(f"not YAML: {' '.join(str(error).split())}"[:300]) from None


def block_devices(pattern: str) -> list[tuple[int, int]]:
    """Numbers of the block devices that match, symbolic links followed; partitions cannot be limited and are left out."""
    found = []
    for path in sorted(glob.glob(pattern)):
        try:
            status = os.stat(path)
        except OSError as error:
            log.warning("blockio: %s: %s", path, error.strerror)
            continue
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if stat.S_ISBLK(status.st_mode) and not os.path.exists(f"/sys/dev/block/{major}:{minor}/partition"):
            found.append((major, minor))
    if not found:
        log.warning("blockio: no block device matches %s", pattern)
    return found
