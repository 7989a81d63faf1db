"""Whether pods on this machine can have user namespaces, found out by doing what their containers would need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import mount
from shim.oci.bundle import Recipe
from shim.oci.spec import IDMapping
from shim.rootfs import overlay
from shim.rootfs.plan import Mappings
from shim.runtime import userns
from shim.runtime.channel import Channel
from shim.runtime.context import Context

_IDS = (IDMapping(0, 65536, 65536),)


@dataclass(frozen=True, slots=True)
class UserNamespaces:
    """A job: ``{"ok": {"reason": …}}`` says why not, and nothing where they can be had. It makes a user namespace, an idmapped tmpfs (Linux
    6.3) and an overlay of idmapped directories (5.19) on the file system of the images, in a directory of its own."""

    context: Context
    directory: str  # is made and removed

    @property
    def keep(self) -> Collection[int]:
        return tuple(self.context.fds())

    def __call__(self, channel: Channel) -> None:
        reason = ""
        try:
            self._try((_IDS, _IDS))
        except Failure as failure:
            reason = str(failure)
        except OSError as error:
            reason = str(Failure.wrap("user namespace", "probe", error))
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
        channel.send({"ok": {"reason": reason}})

    def _try(self, mappings: Mappings) -> None:
        user = userns.new(self.context.proc, mappings, ())["user"]
        try:
            mount.mount_setattr(mount.new_filesystem("tmpfs", {"source": "none"}), userns_fd=user)
        except OSError as error:
            raise Failure.wrap("user namespace", "idmap", error, "tmpfs") from None
        lower, upper, work = (f"{self.directory}/{name}" for name in ("lower", "upper", "work"))
        shutil.rmtree(self.directory, ignore_errors=True)
        for each in (self.directory, lower, upper, work):
            os.mkdir(each, 0o700)
        root = overlay.root_mount(Recipe("overlay", (lower,), upper, work), user, (_IDS[0].host_id, _IDS[0].host_id))
        os.close(root)
