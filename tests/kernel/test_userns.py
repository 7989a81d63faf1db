"""User namespaces of pods in the core: who owns what, idmapped roots on every way to mount them, what is done before joining."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import pytest

from shim.errors import Failure
from shim.linux import libc
from shim.linux import mount as m
from shim.oci import bundle
from shim.oci.bundle import Recipe
from shim.oci.sandbox import Sandbox
from shim.oci.spec import Device, Hook, Hooks, IDMapping, Linux, Mount, Namespace, NamespaceType, Process, Rlimit, Root, Spec
from shim.rootfs import idmap, ops, overlay, plan
from shim.runtime import probe, sysctl, userns
from shim.runtime.channel import Channel
from tests.kernel.rootbox import kernel
from tests.kernel.supervised import Rig, rig, until
from tests.unit.linux.test_process import in_child

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

BASE, SIZE = 300000, 65536
IDS = (IDMapping(0, BASE, SIZE),)
N = NamespaceType
_NS_GET_USERNS = 0xB701


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that can be idmapped: tmpfs before Linux 6.3 cannot."""
    directory = tmp_path_factory.mktemp("disk")
    if m.fstatfs_type(os.open(directory, os.O_PATH)) != m.TMPFS_MAGIC or kernel() >= (6, 3):
        yield directory
        return
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def make_layers(directory: Path, count: int = 1) -> Recipe:
    """Layers of root's with a file of id 7 each, lowest first in name, topmost first in the recipe."""
    base = directory / token_hex(4)
    lower = [base / f"layer{number}" for number in range(count)]
    for number, layer in enumerate(lower):
        (layer / "etc").mkdir(parents=True)
        (layer / f"file{number}").write_text(str(number))
        os.chown(layer / f"file{number}", 7, 8)
    for name in ("upper", "work"):
        (base / name).mkdir()
    return Recipe("overlay", tuple(map(str, reversed(lower))), str(base / "upper"), str(base / "work"))


def use_root(recipe: Recipe) -> str:
    """Mount, look and write as root of the user namespace; what was seen."""
    user = idmap.user_namespace((IDS, IDS))
    root = overlay.root_mount(recipe, user, (BASE, BASE))
    before = libc.capget()
    libc.setns(user, libc.CLONE_NEWUSER)
    userns.become_root()
    libc.unshare(libc.CLONE_NEWNS)
    m.attach(root, "/mnt")
    seen = [f"{os.stat(f'/mnt/{name}').st_uid}:{os.stat(f'/mnt/{name}').st_gid}" for name in (".", "etc", "file0")]
    Path("/mnt/new").write_text("x")
    os.chown("/mnt/new", 5, 6)
    with open("/mnt/file0", "a") as file:  # copied up
        file.write("more")
    os.rmdir("/mnt/etc")
    os.mkdir("/mnt/etc")
    return " ".join([*seen, str(os.stat("/mnt/file0").st_uid), str(before[0] == before[1])])


@pytest.mark.parametrize("layers", [1, 3, 60])
@pytest.mark.parametrize("how", ["as this kernel can", "attached", "attached, in one value"])
def test_idmapped_overlay(disk: Path, monkeypatch: pytest.MonkeyPatch, layers: int, how: str) -> None:
    """The layers' ids inside are those on the disk, for reading, writing and copying up, also as kernels before 6.15 and 6.5 need it."""
    if how != "as this kernel can":
        monkeypatch.setattr(overlay, "_DETACHED_LAYERS", False)
    if how == "attached, in one value":
        monkeypatch.setattr(overlay, "_PARSES_AT_ONCE", False)
    recipe = make_layers(disk, layers)
    assert in_child(lambda: use_root(recipe)) == "0:0 0:0 7:8 7 True"
    upper = Path(recipe.upper)
    owners = {name: (os.stat(upper / name).st_uid, os.stat(upper / name).st_gid) for name in ("new", "file0", "etc", ".")}
    assert owners == {"new": (5, 6), "file0": (7, 8), "etc": (0, 0), ".": (0, 0)}
    assert os.getxattr(upper / "etc", "trusted.overlay.opaque") == b"y"
    assert (upper / "file0").read_text() == "0more"


def test_set_id_and_file_capabilities_of_the_image(disk: Path) -> None:
    """They work inside, and a copied-up file keeps the layer's attribute, which says nothing of the mapping."""
    recipe = make_layers(disk)
    layer, capability = Path(recipe.lower[0]), struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # revision 2: cap_net_bind_service=ep
    for name in ("set-id", "capable"):
        shutil.copy("/usr/bin/cat", layer / name)
    os.chmod(layer / "set-id", 0o4755)
    os.setxattr(layer / "capable", "security.capability", capability)

    def body() -> str:
        user = idmap.user_namespace((IDS, IDS))
        root = overlay.root_mount(recipe, user, (BASE, BASE))
        libc.setns(user, libc.CLONE_NEWUSER)
        userns.become_root()
        libc.unshare(libc.CLONE_NEWNS)
        m.attach(root, "/mnt")
        os.utime("/mnt/capable")
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        texts = [
            subprocess.run([f"/mnt/{name}", "/proc/self/status"], stdout=subprocess.PIPE, text=True).stdout
            for name in ("set-id", "capable")
        ]
        fields = [dict(line.split(":", 1) for line in text.splitlines()) for text in texts]
        return f"{fields[0]['Uid'].split()[1]} {int(fields[1]['CapEff'], 16):x}"

    assert in_child(body) == "0 400"
    assert os.getxattr(Path(recipe.upper, "capable"), "security.capability") == capability


def test_namespaces_belong_to_the_user_namespace() -> None:
    def body() -> str:
        proc = m.new_proc()
        fds = userns.new(proc, (IDS, IDS), (N.NETWORK, N.IPC))
        more = userns.further(proc, fds["user"], (N.UTS,))
        own = os.fstat(fds["user"]).st_ino
        owners = [os.fstat(fcntl.ioctl(fd, _NS_GET_USERNS)).st_ino for fd in (fds["network"], fds["ipc"], more["uts"])]
        assert os.fstat(userns.owner(fds["network"])).st_ino == own
        return str((sorted(fds), [o == own for o in owners], libc.capget()[0] == libc.capget()[1]))

    assert in_child(body) == "(['ipc', 'network', 'user'], [True, True, True], True)"


def test_sysctls_of_both_owners() -> None:
    """IPC's may be written by its user namespace's root only, the domain name by the host's only."""

    def body() -> str:
        proc = m.new_proc()
        fds = userns.new(proc, (IDS, IDS), (N.NETWORK, N.IPC, N.UTS))
        for name, flag in (("network", libc.CLONE_NEWNET), ("ipc", libc.CLONE_NEWIPC), ("uts", libc.CLONE_NEWUTS)):
            libc.setns(fds[name], flag)
        values = {"kernel.msgmax": "4096", "fs.mqueue.msg_max": "12", "net.ipv4.ip_forward": "1", "kernel.domainname": "example"}
        sysctl.apply(proc, values, owner=BASE)
        return " ".join(Path("/proc/sys", sysctl.file_of(name)).read_text().strip() for name in values) + f" {os.geteuid()}"

    assert in_child(body) == "4096 12 1 example 0"


class _Recorder(Channel):
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object, fds: object = ()) -> None:
        self.sent.append(message)


def probed(directory: Path) -> str:
    class Lent:
        proc = m.new_proc()

        @staticmethod
        def fds() -> tuple[int, ...]:
            return ()

    channel = _Recorder()
    probe.UserNamespaces(Lent(), str(directory))(channel)  # type: ignore[arg-type]
    (message,) = channel.sent
    assert isinstance(message, dict)
    return str(message["ok"]["reason"])


def test_probe(disk: Path, tmp_path: Path) -> None:
    reason = in_child(lambda: probed(disk / "probe") or "none")
    assert (reason == "none") == (kernel() >= (6, 3)), reason
    assert not (disk / "probe").exists()


def test_probe_of_a_file_system_without_idmaps(tmp_path: Path) -> None:
    def body() -> str:
        libc.unshare(libc.CLONE_NEWNS)
        m.make_private("/")
        m.attach(m.new_filesystem("ramfs", {"source": "none"}), str(tmp_path))
        return probed(tmp_path / "probe")

    assert "EINVAL" in in_child(body)


def test_a_bound_device_must_be_that_device() -> None:
    """A name in the container is not a name of the host: nothing else may be brought in under it."""
    linux = Linux((Namespace(N.MOUNT),), devices=(Device("/etc/passwd", "c", 1, 3),))
    spec = Spec("1.2.0", Root("rootfs"), Process(("x",)), linux=linux)
    operations = plan.plan(spec, Recipe("bind", source="/"), cgroup_version=2, mknod=False)
    with pytest.raises(Failure, match="device /etc/passwd"):
        ops.prepare(operations, Recipe("bind", source="/"))


# ---- through a supervisor


async def user_pod(node: Rig, *kinds: NamespaceType) -> str:
    name = token_hex(32)
    directory = node.state / "pods" / name
    directory.mkdir(mode=0o700)
    (node.state / "userns").mkdir(exist_ok=True)
    pin = str(node.state / "netns" / name) if N.NETWORK in kinds else ""
    sandbox = Sandbox(
        name, (*kinds, N.USER), hostname="pod" if N.UTS in kinds else "", netns_path=pin, shm_size=1 << 20,
        cgroups_path=node.place(name[:8]), uid_mappings=IDS, gid_mappings=IDS,
        userns_path="" if pin else str(node.state / "userns" / name),
    )  # fmt: skip
    bundle.write_sandbox(directory, sandbox)
    node.pods.add(name)
    handles = await node.supervisor.create_pod(name, directory)
    if handles.netlink is not None:
        os.close(handles.netlink)
    return name


def in_userns(*changes: Callable[[Spec], Spec], without: tuple[NamespaceType, ...] = ()) -> Callable[[Spec], Spec]:
    def change(spec: Spec) -> Spec:
        namespaces = (*(n for n in spec.linux.namespaces if n.type not in without), Namespace(N.USER, "pod:user"))
        spec = replace(spec, linux=replace(spec.linux, namespaces=namespaces, uid_mappings=IDS, gid_mappings=IDS))
        for each in changes:
            spec = each(spec)
        return spec

    return change


ALL = (N.NETWORK, N.IPC, N.UTS)


@pytest.fixture(autouse=True)
def _needs_idmaps(request: pytest.FixtureRequest) -> None:
    if request.node.name.startswith("test_supervised") and kernel() < (6, 3):
        pytest.skip("the root of these tests may be on a tmpfs, which Linux 6.3 learned to idmap")


async def test_supervised_container() -> None:
    async with rig() as node:
        pod = await user_pod(node, *ALL)
        extra = (Mount("/sys", "sysfs", "sysfs", ("ro",)), Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")))
        change = in_userns(lambda s: replace(s, mounts=(*s.mounts, *extra)))
        name = await node.run(pod, "sh", "-c", "cat /proc/self/uid_map; id -u; ls /sys/class/net; hostname; sleep 60", change=change)
        await until(lambda: "pod" in node.lines(name))
        assert " ".join(node.lines(name)).split() == ["0", str(BASE), str(SIZE), "0", "lo", "pod"]
        pid = node.supervisor.snapshot().containers[name].pid
        assert os.stat(f"/proc/{pid}").st_uid == BASE
        owner = userns.owner(os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY))
        assert os.readlink(f"/proc/self/fd/{owner}") == os.readlink(f"/proc/{pid}/ns/user"), "the PID namespace belongs to it"
        code, text = await node.output(name, "cat", "/proc/self/uid_map")
        assert (code, text.split()) == (0, ["0", str(BASE), str(SIZE)])


async def test_supervised_limits_above_ours() -> None:
    """A hard limit cannot be raised inside, where even all capabilities are not CAP_SYS_RESOURCE outside."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    wanted = 1 << 40 if hard == resource.RLIM_INFINITY else hard
    async with rig() as node:
        pod = await user_pod(node, *ALL)
        limits = (Rlimit("RLIMIT_CORE", 4096, wanted), Rlimit("RLIMIT_NOFILE", 64, 64))
        change = in_userns(lambda s: replace(s, process=replace(s.process, rlimits=limits)))
        name = await node.run(pod, "sh", "-c", "ulimit -c; ulimit -Hc; ulimit -n", change=change)
        await node.exit(name)
        assert node.lines(name)[2] == "64"


async def test_supervised_only_the_pods_user_namespace() -> None:
    async with rig() as node:
        pod = await node.pod()
        with pytest.raises(Failure, match="join user pod:user"):
            await node.create(pod, "true", change=in_userns())


async def test_supervised_hooks_that_need_the_host() -> None:
    """createContainer hooks use the host's programs and write into the idmapped root, as its root."""

    def hooked(script: str) -> Callable[[Spec], Spec]:
        hooks = Hooks(create_container=(Hook("/bin/sh", ("sh", "-c", script), ("PATH=/usr/bin:/bin",)),))
        return in_userns(lambda s: replace(s, hooks=hooks))

    script = (
        'b=$(sed \'s/.*"bundle": *"\\([^"]*\\).*/\\1/\'); echo made > $b/rootfs/etc/made; ln -s made $b/rootfs/etc/link; '
        "hostname >> $b/rootfs/etc/made; ls $b/rootfs/proc/self"
    )
    async with rig() as node:
        pod = await user_pod(node, *ALL)
        name = await node.run(pod, "sh", "-c", "cat /etc/link; ls -ln /etc/made", change=hooked(script))
        await node.exit(name)
        assert node.lines(name)[:2] == ["made", "pod"]
        assert node.lines(name)[2].split()[2:4] == ["0", "0"]
        with pytest.raises(Failure, match="exit code 3: it says why"):
            await node.create(pod, "true", change=hooked("echo it says why; exit 3"))
        assert not (node.root / "etc/made").is_symlink()
        assert os.stat(node.root / "etc/made").st_uid == 0, "on the disk, too"


@pytest.mark.parametrize("kinds", [ALL, (N.IPC,), (*ALL, N.PID)])
async def test_supervised_successor(kinds: tuple[NamespaceType, ...]) -> None:
    """A supervisor that nobody handed anything finds the user namespace by the network namespace's owner, or by its pin."""
    async with rig() as node:
        pod = await user_pod(node, *kinds)
        change = in_userns(without=tuple(k for k in ALL if k not in kinds))
        first = await node.run(pod, "sleep", "100", change=change)
        pid = node.supervisor.snapshot().containers[first].pid
        before = os.readlink(f"/proc/{pid}/ns/user")
        dead, stdio = node.supervisor.pid, node.stdio_pid
        node.supervisor.close()  # what a SIGKILL of the daemon does to the connection
        os.kill(dead, signal.SIGKILL)
        os.kill(stdio, signal.SIGKILL)
        await asyncio.sleep(0.3)
        await node.open()
        assert node.supervisor.pid != dead
        second = await node.run(pod, "sh", "-c", "cat /proc/self/uid_map; sleep 60", change=change)
        await until(lambda: bool(node.lines(second)))
        pid = node.supervisor.snapshot().containers[second].pid
        assert os.readlink(f"/proc/{pid}/ns/user") == before
        assert await node.output(first, "echo", "still") == (0, "still\n")
