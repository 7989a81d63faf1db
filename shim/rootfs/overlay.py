"""The root mount of a recipe, detached. Runs on the host's side, where the layers' paths mean something."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from shim.errors import Failure
from shim.linux import libc
from shim.linux import mount as m
from shim.oci.bundle import Recipe

_BY_FD = "/proc/self/fd/"
_STRING = 255  # bytes that one fsconfig(2) value may have
_PAGE = 4095  # bytes that mount(2) data may have
# Before Linux 6.5 overlayfs collects whatever it is given and looks at it when the superblock is made, with a line in the kernel's log if
# "lowerdir+" is among it: so that is not a way to find out. 6.5 and 6.6 refuse it at once, 6.7 and later know it.
_RELEASE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
_PARSES_AT_ONCE = _RELEASE >= (6, 5)
_DETACHED_LAYERS = _RELEASE >= (6, 15)


def root_mount(recipe: Recipe, userns: int | None = None, owner: tuple[int, int] = (0, 0)) -> int:
    """A detached mount of the container's root. ``userns``: a user namespace whose ids the layers are mapped to, the writable one too,
    so that nothing on disk depends on the mapping; ``owner``: what root is outside of it. Raises Failure."""
    try:
        if recipe.type == "bind":
            return _bound(recipe.source, userns, readonly=False, recursive=True)
        if not recipe.upper and len(recipe.lower) == 1:  # overlayfs refuses one layer alone
            return _bound(recipe.lower[0], userns, readonly=True, recursive=False)
        if not recipe.lower:
            return _bound(recipe.upper, userns, readonly=False, recursive=False)
        return _overlay(recipe) if userns is None else _overlay_mapped(recipe, userns, owner)
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


def _overlay_mapped(recipe: Recipe, userns: int, owner: tuple[int, int]) -> int:
    """The overlay of idmapped copies of all its directories.

    overlayfs does its own work with what the mounting process was, and an idmapped directory has no place for ids that are not mapped
    (EOVERFLOW, even for the work directory): so this process is the container's root to file systems for the moment, with its own
    capabilities, which the change of ids takes from the effective set only.
    """
    layers: list[int] = []
    attached = False
    place = recipe.work or recipe.lower[0]
    effective, permitted, inheritable = libc.capget()
    try:
        mapped = _mapped(recipe, userns, layers)
        if not _DETACHED_LAYERS:
            _attach_somewhere(layers, place)
            attached = True
        libc.setfsids(*owner)
        libc.capset(permitted, permitted, inheritable)
        return _overlay(mapped)
    finally:
        libc.setfsids(0, 0)
        libc.capset(effective, permitted, inheritable)
        if attached:
            m.umount2(place, m.MNT_DETACH)  # another image of this container may have layers there
        for fd in layers:
            os.close(fd)


def _mapped(recipe: Recipe, userns: int, layers: list[int]) -> Recipe:
    """The recipe with names that lead through idmapped mounts, whose fds are added to ``layers``."""

    def name(path: str) -> str:
        layers.append(m.open_tree(m.AT_FDCWD, path))
        m.mount_setattr(layers[-1], userns_fd=userns)
        return f"{_BY_FD}{layers[-1]}"

    lower = tuple(name(path) for path in recipe.lower)
    upper, work = recipe.upper, recipe.work
    if upper:  # overlayfs wants both on one mount
        parent = os.path.commonpath((upper, work))
        above = name(parent)
        upper, work = (f"{above}/{os.path.relpath(path, parent)}" for path in (upper, work))
    return replace(recipe, lower=lower, upper=upper, work=work)


def _attach_somewhere(layers: list[int], place: str) -> None:
    """Before Linux 6.15 overlayfs takes only mounts of the mounting process's mount namespace. Attach them in one that this process
    leaves for the container's next, on directories of a file system that is over ``place`` there."""
    libc.unshare(libc.CLONE_NEWNS)
    m.make_private("/")
    directory = m.new_filesystem("tmpfs", {"source": "none", "mode": "700"})
    try:
        m.attach(directory, place)
        for number, fd in enumerate(layers):
            os.mkdir(str(number), dir_fd=directory)
            target = os.open(str(number), os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            m.move_mount(fd, target)
            os.close(target)
    finally:
        os.close(directory)


def _overlay(recipe: Recipe) -> int:
    layers: list[int] = []  # fds that have to live until the superblock exists
    fs = m.fsopen("overlay")
    try:
        if not _PARSES_AT_ONCE:
            return _overlay_in_one_value(recipe, layers)
        m.fsconfig_string(fs, "source", "overlay")
        try:
            for path in recipe.lower:
                m.fsconfig_string(fs, "lowerdir+", _short(path, layers))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return _overlay_in_one_value(recipe, layers)
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


def _short(path: str, layers: list[int]) -> str:
    if len(os.fsencode(path)) <= _STRING:
        return path
    layers.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    return f"/proc/self/fd/{layers[-1]}"


def _overlay_in_one_value(recipe: Recipe, layers: list[int]) -> int:
    """fsconfig's values end at 255 bytes and mount(2)'s at a page: layers are named by fd, relative to /proc/self/fd."""
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        values = _values_by_fd(recipe, layers)
        os.chdir("/proc/self/fd")
        if max(map(len, values.values())) <= _STRING:
            return m.new_filesystem("overlay", {"source": "overlay", **{key: value or None for key, value in values.items()}})
        # mount(2) has to mount somewhere: in a mount namespace of our own, which stage1 leaves for the container's next. Layers count
        # only if they were opened in the namespace that mounts.
        if not recipe.lower[0].startswith(_BY_FD):  # idmapped layers are attached in such a namespace already
            libc.unshare(libc.CLONE_NEWNS)
            m.make_private("/")
            values = _values_by_fd(recipe, layers)
            os.chdir("/proc/self/fd")
        # An SELinux label has commas.
        quoted = {key: f'"{value}"' if key == "context" else value for key, value in values.items()}
        data = ",".join(f"{key}={value}" if value else key for key, value in quoted.items())
        if len(data) > _PAGE:
            raise OSError(errno.E2BIG, "too many layers for this kernel")
        target = recipe.work or recipe.lower[0]
        m.mount("overlay", target, "overlay", 0, data)
        try:
            return m.open_tree(m.AT_FDCWD, target)
        finally:
            m.umount2(target, m.MNT_DETACH)  # not to hide a layer from the next
    finally:
        os.fchdir(before)
        os.close(before)


def _values_by_fd(recipe: Recipe, layers: list[int]) -> dict[str, str]:
    """The options of the mount, every directory opened and named by the number of its fd."""

    def name(path: str) -> str:
        if path.startswith(_BY_FD):  # in an idmapped layer
            return path.removeprefix(_BY_FD)
        layers.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return str(layers[-1])

    values = {"lowerdir": ":".join(map(name, recipe.lower))}
    if recipe.upper:
        values |= {"upperdir": name(recipe.upper), "workdir": name(recipe.work)}
    for option in recipe.options:
        key, _, value = option.partition("=")
        values[key] = value
    return values
