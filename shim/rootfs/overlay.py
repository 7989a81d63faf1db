"""The root mount of a recipe, detached. Runs on the host's side, where the layers' paths mean something."""

from __future__ import annotations

import errno
import os

from shim.errors import Failure
from shim.linux import libc
from shim.linux import mount as m
from shim.oci.bundle import Recipe

_STRING = 255  # bytes that one fsconfig(2) value may have
_PAGE = 4095  # bytes that mount(2) data may have
# Before Linux 6.5 overlayfs collects whatever it is given and looks at it when the superblock is made, with a line in the kernel's log if
# "lowerdir+" is among it: so that is not a way to find out. 6.5 and 6.6 refuse it at once, 6.7 and later know it.
_PARSES_AT_ONCE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 5)


def root_mount(recipe: Recipe, userns: int | None = None) -> int:
    """A detached mount of the container's root. ``userns``: a user namespace whose ids the layers are mapped to. Raises Failure."""
    try:
        if recipe.type == "bind":
            return _bound(recipe.source, userns, readonly=False, recursive=True)
        if not recipe.upper and len(recipe.lower) == 1:  # overlayfs refuses one layer alone
            return _bound(recipe.lower[0], userns, readonly=True, recursive=False)
        if not recipe.lower:
            return _bound(recipe.upper, userns, readonly=False, recursive=False)
        return _overlay(recipe, userns)
    except OSError as error:
        named = [path for path in (*recipe.lower, recipe.upper, recipe.work, recipe.source) if path]
        where = next((path for path in named if not os.path.isdir(path)), named[-1] if named else "")  # the kernel does not say which
        raise Failure("create container", f"mount {recipe.type}", errno=error.errno, path=where, message=m.detail(error)) from None


def _bound(source: str, userns: int | None, *, readonly: bool, recursive: bool) -> int:
    fd = m.open_tree(m.AT_FDCWD, source, m.OPEN_TREE_CLONE | (m.AT_RECURSIVE if recursive else 0))
    try:
        m.mount_setattr(fd, propagation=m.MS_PRIVATE, recursive=recursive)
        if readonly or userns is not None:
            m.mount_setattr(fd, set=m.MOUNT_ATTR_RDONLY if readonly else 0, userns_fd=userns)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _overlay(recipe: Recipe, userns: int | None) -> int:
    layers: list[int] = []  # fds that have to live until the superblock exists
    fs = m.fsopen("overlay")
    try:
        lower = [_layer(path, userns, layers) for path in recipe.lower] if userns is not None else list(recipe.lower)
        if not _PARSES_AT_ONCE:
            return _overlay_in_one_value(recipe, lower, layers)
        m.fsconfig_string(fs, "source", "overlay")
        try:
            for path in lower:
                m.fsconfig_string(fs, "lowerdir+", _short(path, layers))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return _overlay_in_one_value(recipe, lower, layers)
        if recipe.upper:
            m.fsconfig_string(fs, "upperdir", _short(recipe.upper, layers))
            m.fsconfig_string(fs, "workdir", _short(recipe.work, layers))
        for option in recipe.options:
            key, equals, value = option.partition("=")
            if equals:
                m.fsconfig_string(fs, key, value)
            else:
                m.fsconfig_flag(fs, key)
        m.fsconfig_create(fs)
        return m.fsmount(fs)
    finally:
        os.close(fs)
        for fd in layers:
            os.close(fd)


def _layer(path: str, userns: int | None, layers: list[int]) -> str:
    """An idmapped, detached copy of a layer, by the name that only this process can resolve."""
    layers.append(m.open_tree(m.AT_FDCWD, path))
    m.mount_setattr(layers[-1], userns_fd=userns)
    return f"/proc/self/fd/{layers[-1]}"


def _short(path: str, layers: list[int]) -> str:
    if len(os.fsencode(path)) <= _STRING:
        return path
    layers.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    return f"/proc/self/fd/{layers[-1]}"


def _overlay_in_one_value(recipe: Recipe, lower: list[str], layers: list[int]) -> int:
    """fsconfig's values end at 255 bytes and mount(2)'s at a page: layers are named by fd, relative to /proc/self/fd."""
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        values = _values_by_fd(recipe, lower, layers)
        os.chdir("/proc/self/fd")
        if max(map(len, values.values())) <= _STRING:
            return m.new_filesystem("overlay", {"source": "overlay", **{key: value or None for key, value in values.items()}})
        # mount(2) has to mount somewhere: in a mount namespace of our own, which stage1 leaves for the container's next. Layers count
        # only if they were opened in the namespace that mounts.
        libc.unshare(libc.CLONE_NEWNS)
        m.make_private("/")
        values = _values_by_fd(recipe, lower, layers)
        os.chdir("/proc/self/fd")
        data = ",".join(f"{key}={value}" if value else key for key, value in values.items())
        if len(data) > _PAGE:
            raise OSError(errno.E2BIG, "too many layers for this kernel")
        target = recipe.work or recipe.lower[0]
        m.mount("overlay", target, "overlay", 0, data)
        return m.open_tree(m.AT_FDCWD, target)
    finally:
        os.fchdir(before)
        os.close(before)


def _values_by_fd(recipe: Recipe, lower: list[str], layers: list[int]) -> dict[str, str]:
    """The options of the mount, every directory opened and named by the number of its fd."""

    def name(path: str) -> str:
        if path.startswith("/proc/self/fd/"):  # an idmapped layer: already one
            return path.rpartition("/")[2]
        layers.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return str(layers[-1])

    values = {"lowerdir": ":".join(map(name, lower))}
    if recipe.upper:
        values |= {"upperdir": name(recipe.upper), "workdir": name(recipe.work)}
    for option in recipe.options:
        key, _, value = option.partition("=")
        values[key] = value
    return values
