"""A container's mounts: the defaults, the pod's files, the image's volumes, the request's mounts, in the order they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cri.errors import FailedPrecondition, ImageVolumeMountFailed, InvalidArgument, RROUnsupported
from cri.spec import namespaces, strings
from cri.spec.inputs import ContainerInputs, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

DEFAULTS = (
    oci.Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    oci.Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    oci.Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    oci.Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    oci.Mount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    oci.Mount("/sys/fs/cgroup", "cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
)
SHM = "pod:shm"  # arrives by fd
POD_FILE = "pod:"  # before a file of ours: its content, on the pod's own file system, which is too small to hurt (CVE-2020-8557)

_PROPAGATION = {
    v1.PROPAGATION_PRIVATE: "rprivate",
    v1.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    v1.PROPAGATION_BIDIRECTIONAL: "rshared",
}
# mount_options of a request: what restricts, and the access time modes. Nothing that undoes a field of its own (readonly,
# propagation, the mappings) and nothing that gives more than a plain bind (suid, dev, exec are its defaults).
_OPTIONS = frozenset({"noexec", "nosuid", "nodev", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow"})
# An image's VOLUME there would replace what the runtime itself writes to or vouches for (CVE-2019-16884, CVE-2023-27561).
_OURS = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class Mounts:
    mounts: tuple[oci.Mount, ...]
    rootfs_propagation: str  # what the request's propagation modes need of the root


def build(inputs: ContainerInputs) -> Mounts:
    """All mounts, shallow ones first among equals of a kind, so that a deep one is never hidden by one that contains it."""
    context = inputs.config.linux.security_context
    users = namespaces.user_mappings(inputs.pod.linux.security_context.namespace_options)
    requested = [_requested(m, f"config.mounts[{i}]", inputs) for i, m in enumerate(inputs.config.mounts)]
    taken = {m.destination for m in requested}
    extra: dict[str, oci.Mount] = {}
    # Later sources give way to earlier ones: the pod's files, then its shared memory, then the image's volumes.
    for mount in (*_files(inputs), *_shm(inputs), *_volumes(inputs.volumes)):
        if mount.destination not in taken:
            extra.setdefault(mount.destination, _of_the_pod(mount, users))
    usual = {m.destination: m for m in DEFAULTS}
    for mount in inputs.handler.base.mounts if inputs.handler.base is not None else ():
        destination = strings.clean(mount.destination)
        if destination in usual:
            usual[destination] = mount
        elif destination not in taken:
            extra.setdefault(destination, mount)
    merged = sorted((*requested, *extra.values()), key=lambda m: _depth(m.destination))
    taken |= extra.keys()
    defaults = [m for m in usual.values() if m.destination not in taken and not ("/dev" in taken and m.destination.startswith("/dev/"))]
    if context.privileged:
        defaults = [_writable(m) for m in defaults]
    return Mounts((*defaults, *merged), _root_propagation(inputs.config.mounts))


def _writable(mount: oci.Mount) -> oci.Mount:
    """/sys and the cgroups of a privileged container."""
    if mount.type not in ("sysfs", "cgroup"):
        return mount
    return oci.Mount(mount.destination, mount.type, mount.source, tuple("rw" if o == "ro" else o for o in mount.options))


def _of_the_pod(mount: oci.Mount, users: tuple[oci.IDMapping, oci.IDMapping] | None) -> oci.Mount:
    """What we made for the pod looks its root's in its user namespace."""
    if users is None or not mount.source.startswith(("/", f"{POD_FILE}/")) or mount.destination == "/dev/shm":
        return mount
    return replace(mount, uid_mappings=users[:1], gid_mappings=users[1:])


def _depth(destination: str) -> int:
    return 0 if destination == "/" else destination.count("/")


def _files(inputs: ContainerInputs) -> Iterable[oci.Mount]:
    access = "ro" if inputs.config.linux.security_context.readonly_rootfs else "rw"
    for destination, source in (
        ("/etc/hostname", inputs.files.hostname),
        ("/etc/hosts", inputs.files.hosts),
        ("/etc/resolv.conf", inputs.files.resolv_conf),
    ):
        if source:
            yield oci.Mount(destination, "bind", f"{POD_FILE}{source}", ("rbind", "rprivate", access))


def _shm(inputs: ContainerInputs) -> Iterable[oci.Mount]:
    shared = inputs.pod.linux.security_context.namespace_options.ipc != v1.NODE
    yield oci.Mount("/dev/shm", "bind", SHM if shared else "/dev/shm", ("rbind", "rprivate", "rw"))


def _volumes(volumes: Mapping[str, str]) -> Iterable[oci.Mount]:
    for name, directory in volumes.items():
        destination = volume_path(name)
        yield oci.Mount(destination, "bind", directory, ("rbind", "rprivate", "rw", "copyup"))


def volume_path(name: str) -> str:
    """Where an image's VOLUME is mounted; InvalidArgument for a place that is not the image's to give."""
    destination = strings.clean(strings.line(name, "image config.Volumes"))
    if destination == "/" or any(destination == ours or destination.startswith(f"{ours}/") for ours in _OURS):
        raise InvalidArgument(f"a volume at {destination!r:.200} is refused", field="image config.Volumes")
    return destination


def _requested(mount: v1.Mount, field: str, inputs: ContainerInputs) -> oci.Mount:
    destination = strings.absolute(mount.container_path, f"{field}.container_path")
    if destination == "/":
        raise InvalidArgument("is the root", field=f"{field}.container_path")
    if mount.HasField("image"):
        return _image(mount, destination, field, inputs)
    if mount.image_sub_path:
        raise InvalidArgument("set without image", field=f"{field}.image_sub_path")
    options = ["rbind", _propagation(mount, field)]
    source = strings.absolute(mount.host_path, f"{field}.host_path")
    _check_source(mount, source, field, inputs.host)
    options.append(_access(mount, field, inputs.host))
    options += _extra_options(mount.mount_options, f"{field}.mount_options")
    uids, gids = _mapping_pair(mount, field, inputs.host)
    if mount.propagation == v1.PROPAGATION_BIDIRECTIONAL and namespaces.user_mappings(inputs.pod.linux.security_context.namespace_options):
        # Mounts of a user namespace's making would reach the host.
        raise InvalidArgument("BIDIRECTIONAL in a user namespace", field=f"{field}.propagation")
    return oci.Mount(destination, "bind", source, tuple(options), uid_mappings=uids, gid_mappings=gids)


def check_image(mount: v1.Mount, field: str) -> None:
    """Refuse a mount of an image that can never be right."""
    if not mount.image.image:
        raise InvalidArgument("must not be empty", field=f"{field}.image.image")
    strings.absolute(mount.container_path, f"{field}.container_path")
    if mount.host_path:
        raise InvalidArgument("set together with image", field=f"{field}.host_path")
    if not mount.readonly:
        raise InvalidArgument("an image can only be mounted read-only", field=f"{field}.readonly")
    if mount.propagation == v1.PROPAGATION_BIDIRECTIONAL:
        raise InvalidArgument("BIDIRECTIONAL for an image, whose mounts are nobody else's", field=f"{field}.propagation")
    sub_path = strings.line(mount.image_sub_path, f"{field}.image_sub_path")
    # The walk itself cannot leave the image. These are the words of one that is meant to, and the kubelet's name for it.
    if sub_path.startswith("/") or ".." in sub_path.split("/"):
        raise ImageVolumeMountFailed(f"{field}.image_sub_path: {sub_path!r:.200} is not a path inside the image")


def _image(mount: v1.Mount, destination: str, field: str, inputs: ContainerInputs) -> oci.Mount:
    """A mount of type "image". Its layers are in the recipe. Nothing is ever mounted in it or comes to it: every propagation is private,
    and read-only is recursively so."""
    check_image(mount, field)
    _propagation(mount, field)
    _access(mount, field, inputs.host)
    options = ("ro", *_extra_options(mount.mount_options, f"{field}.mount_options"))
    uids, gids = _mapping_pair(mount, field, inputs.host)
    users = namespaces.user_mappings(inputs.pod.linux.security_context.namespace_options)
    if not uids and users is not None:
        uids, gids = users[:1], users[1:]  # the image's root is the pod's, as in the container's own image
    source = inputs.image_mounts[destination]
    return oci.Mount(destination, "image", source, options, uid_mappings=uids, gid_mappings=gids)


def _mapping_pair(mount: v1.Mount, field: str, host: HostFacts) -> tuple[tuple[oci.IDMapping, ...], tuple[oci.IDMapping, ...]]:
    uids, gids = _mappings(mount.uidMappings, f"{field}.uidMappings"), _mappings(mount.gidMappings, f"{field}.gidMappings")
    if bool(uids) != bool(gids):
        raise InvalidArgument("set without the other kind", field=f"{field}.{'uidMappings' if uids else 'gidMappings'}")
    if uids and host.no_user_namespaces:
        raise FailedPrecondition(f"{field}.uidMappings: {host.no_user_namespaces}")
    return uids, gids


def _propagation(mount: v1.Mount, field: str) -> str:
    mode = _PROPAGATION.get(mount.propagation)
    if mode is None:
        raise InvalidArgument(f"{mount.propagation} is unknown", field=f"{field}.propagation")
    return mode


def _check_source(mount: v1.Mount, source: str, field: str, host: HostFacts) -> None:
    """Mounts can travel only through a mount that takes part in propagation; silence would leave the two sides apart."""
    if mount.propagation == v1.PROPAGATION_PRIVATE:
        return
    wanted = ("shared",) if mount.propagation == v1.PROPAGATION_BIDIRECTIONAL else ("shared", "slave")
    found = host.propagation(source)
    if found not in wanted:
        raise InvalidArgument(
            f"{source!r:.200} is on a mount that is {found}, not {' or '.join(wanted)}",
            field=f"{field}.propagation",
            hint="mount --make-rshared the file system on the host",
        )


def _access(mount: v1.Mount, field: str, host: HostFacts) -> str:
    if not mount.recursive_read_only:
        return "ro" if mount.readonly else "rw"
    if not mount.readonly:
        raise InvalidArgument("set on a mount that is not read-only", field=f"{field}.recursive_read_only")
    if mount.propagation != v1.PROPAGATION_PRIVATE:
        raise InvalidArgument("needs private propagation", field=f"{field}.recursive_read_only")
    if not host.recursive_read_only:
        raise RROUnsupported(f"{field}.recursive_read_only: this kernel cannot (host path {mount.host_path!r:.200})")
    return "rro"


def _extra_options(options: Iterable[str], field: str) -> list[str]:
    wanted = list(options)
    for i, option in enumerate(wanted):
        if option not in _OPTIONS:
            raise InvalidArgument(f"{option!r:.40} is not one of {', '.join(sorted(_OPTIONS))}", field=f"{field}[{i}]")
    return wanted


def _mappings(mappings: Iterable[v1.IDMapping], field: str) -> tuple[oci.IDMapping, ...]:
    return tuple(namespaces.id_mapping(mapping, f"{field}[{i}]") for i, mapping in enumerate(mappings))


def _root_propagation(mounts: Iterable[v1.Mount]) -> str:
    modes = {m.propagation for m in mounts if not m.HasField("image")}
    if v1.PROPAGATION_BIDIRECTIONAL in modes:
        return "rshared"
    return "rslave" if v1.PROPAGATION_HOST_TO_CONTAINER in modes else ""
