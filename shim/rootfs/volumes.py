"""Image volumes: an image, or a directory in it, as a detached read-only mount. Runs on the host's side, before the root change.

The sub path comes from the pod's author and the tree from the image's: it is resolved by the kernel inside the very mount that is then
shown, and what was found is mounted by fd. There is no moment at which a name could come to mean something else (CVE-2017-1002101,
CVE-2021-25741).
"""

from __future__ import annotations

import errno
import os
import stat

from shim.errors import Failure
from shim.linux import libc
from shim.linux import mount as m
from shim.linux import path as paths
from shim.oci.bundle import IMAGE_VOLUME, Recipe
from shim.rootfs import idmap, overlay
from shim.rootfs.plan import ImageVolume

_PHASE = "create container"
# What the walk can say about the image's own files; anything else is the host's trouble.
_REASONS = {
    errno.ENOENT: "does not exist in the image",
    errno.ENOTDIR: "leads over something that is not a directory",
    errno.ELOOP: "has too many symbolic links",
    errno.EXDEV: "leaves the image",
    errno.ENAMETOOLONG: "is too long",
}


def prepare(op: ImageVolume, namespaces: idmap.Namespaces) -> int:
    """An fd of the mount. On kernels before 6.15 this may leave the host's mount namespace for a copy. Raises Failure."""
    userns = None if op.mappings is None else namespaces.of(op.mappings)
    owner = (0, 0) if op.mappings is None else idmap.root_ids(op.mappings)
    fd = -1
    try:
        options = (f"context={op.label}",) if op.label else ()
        fd = overlay.root_mount(Recipe("overlay", op.lower, options=options), userns, owner)
        if op.sub_path:
            whole, fd = fd, _directory(fd, op.sub_path, op.lower[0])
            os.close(whole)
        m.mount_setattr(fd, set=op.attributes, propagation=m.MS_PRIVATE)
    except OSError as error:
        _close(fd)
        raise Failure(_PHASE, IMAGE_VOLUME, errno=error.errno, path=op.destination, message=m.detail(error)) from None
    except Failure as failure:
        _close(fd)
        # Under the one name of operation, whatever step of it: the daemon looks for it.
        raise Failure(
            _PHASE, IMAGE_VOLUME, errno=failure.errno, path=op.destination, message=failure.message or failure.path, hint=failure.hint
        ) from None
    return fd


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _directory(whole: int, sub_path: str, place: str) -> int:
    """A detached mount of the directory ``sub_path`` of the detached mount ``whole``, as a process chrooted into it would find it."""
    try:
        found = paths.open_in_root(whole, sub_path, resolve=paths.RESOLVE_NO_XDEV)
    except OSError as error:
        raise _no(sub_path, _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))) from None
    try:
        if not stat.S_ISDIR(os.fstat(found).st_mode):
            raise _no(sub_path, "is not a directory in the image")
        try:
            return m.clone_mount(found)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return _clone_attached(whole, found, place)
    finally:
        os.close(found)


def _clone_attached(whole: int, found: int, place: str) -> int:
    """Before Linux 6.15 only what is attached can be cloned: for a moment, in a mount namespace that nobody else is in."""
    libc.unshare(libc.CLONE_NEWNS)
    m.make_private("/")
    m.attach(whole, place)
    try:
        return m.clone_mount(found)
    finally:
        m.umount2(place, m.MNT_DETACH)


def _no(sub_path: str, why: str) -> Failure:
    return Failure(_PHASE, IMAGE_VOLUME, message=f"sub path {sub_path!r:.200} {why}")
