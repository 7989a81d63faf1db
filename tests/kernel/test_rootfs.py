"""What a container finds in its root: file systems, devices, masked and read-only paths, layers (config.md, config-linux.md)."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.linux import mount as m
from shim.linux import path as paths
from shim.oci.bundle import Recipe
from shim.oci.spec import Device, IDMapping, Linux, Mount
from shim.rootfs import copyup, ops, overlay, plan
from tests.kernel.rootbox import DEV, NAMESPACES, NSE, PROC, SYS, USUAL, Box, file_system, kernel, shared_tmpfs

pytestmark = pytest.mark.mount

MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/nothing/here", "/sys/firmware")
READONLY = ("/proc/sys", "/proc/irq", "/proc/bus")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def linux(**fields: object) -> Linux:
    return Linux(**{"namespaces": NAMESPACES, **fields})


def mounts(result_lines: list[str]) -> dict[str, tuple[str, set[str]]]:
    """From /proc/self/mountinfo: mount point → (type, options)."""
    table = {}
    for line in result_lines:
        fields = line.split()
        dash = fields.index("-")
        table[fields[4]] = fields[dash + 1], set(fields[5].split(","))
    return table


# ---- file systems


def test_the_usual_mounts_and_no_other(box: Box) -> None:
    table = mounts(box.run("cat /proc/self/mountinfo").lines)
    assert {where: kind for where, (kind, _) in table.items()} == {
        "/": "overlay",
        "/proc": "proc",
        "/dev": "tmpfs",
        "/dev/pts": "devpts",
        "/dev/mqueue": "mqueue",
        "/sys": "sysfs",
    }
    assert {"nosuid", "nodev", "noexec", "rw"} <= table["/proc"][1]
    assert {"nosuid", "nodev", "noexec", "ro"} <= table["/sys"][1]
    assert {"nosuid", "noexec"} <= table["/dev/pts"][1]
    assert "nosuid" in table["/dev"][1]
    assert "noexec" not in table["/dev"][1]


def test_proc_is_that_of_the_new_pid_namespace(box: Box) -> None:
    result = box.run("readlink /proc/self; cd /proc; ls -d [0-9]*")
    assert result.lines[0].isdigit()
    assert int(result.lines[0]) < 10
    assert result.lines[1] == "1"


def test_devices(box: Box) -> None:
    names = "null zero full random urandom tty"
    script = f"cd /dev; for i in {names}; do stat -c '%n %F %a %t:%T' $i; done; for i in ptmx fd stdin; do readlink $i; done"
    lines = box.run(script).lines
    assert lines[:6] == [
        f"{name} character special file 666 {numbers}"
        for name, numbers in (("null", "1:3"), ("zero", "1:5"), ("full", "1:7"), ("random", "1:8"), ("urandom", "1:9"), ("tty", "5:0"))
    ]
    assert lines[6:] == ["pts/ptmx", "/proc/self/fd", "/proc/self/fd/0"]


def test_devices_work(box: Box) -> None:
    result = box.run("echo x > /dev/null; cat /dev/null; busybox head -c 3 /dev/zero | wc -c; cat /dev/zero > /dev/full")
    assert result.lines[0] == "3"
    assert "No space left" in result.out


def test_a_pty_of_its_own_instance(box: Box) -> None:
    def check(rootfd: int) -> None:
        master = paths.open_in_root(rootfd, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
        os.close(master)

    assert box.run("stat -c '%a %F' /dev/pts/ptmx; ls /dev/pts", inside=check).lines == ["666 character special file", "ptmx"]


def test_extra_devices(box: Box) -> None:
    devices = (
        Device("/dev/fuse", "c", 10, 229, 0o640, 7, 8),
        Device("/dev/net/tun", "c", 10, 200, 0o666),
        Device("/opt/deep/null", "c", 1, 3, 0o600),
        Device("/dev/pipe", "p", file_mode=0o622),
    )
    script = "stat -c '%a %u:%g %t:%T' /dev/fuse /dev/net/tun /opt/deep/null; stat -c '%a %F' /dev/pipe"
    result = box.run(script, linux=linux(devices=devices))
    assert result.lines == ["640 7:8 a:e5", "666 0:0 a:c8", "600 0:0 1:3", "622 fifo"]


def test_a_bound_dev_is_left_alone(box: Box) -> None:
    result = box.run("ls /dev/null && ls /dev | wc -l", (PROC, Mount("/dev", "bind", "/dev", ("rbind", "rslave"))), before=_share_dev)
    assert result.lines[0] == "/dev/null"


def _share_dev() -> None:
    fd = os.open("/dev", os.O_PATH)
    m.mount_setattr(fd, propagation=m.MS_SHARED)
    os.close(fd)


def test_devices_without_mknod(box: Box) -> None:
    """Nodes bound from the host, as in a user namespace; masks use them too."""
    extra = linux(devices=(Device("/dev/extra/zero", "c", 1, 5),), masked_paths=("/proc/keys",))
    script = "echo x > /dev/null; stat -c %t:%T /dev/null /dev/zero /proc/keys"
    assert box.run(script, linux=linux(masked_paths=("/proc/keys",)), mknod=False).lines == ["1:3", "1:5", "1:3"]
    with pytest.raises(Failure, match="/dev/extra/zero: ENOENT"):
        box.run(linux=extra, mknod=False)


def _spec() -> plan.Spec:
    from shim.oci.spec import Process, Root

    return plan.Spec("1.2.0", Root("rootfs"), Process(("x",)))


# ---- masked and read-only


def test_masked_paths(box: Box) -> None:
    script = "wc -c < /proc/keys; stat -c %t:%T /proc/keys; ls -A /sys/firmware | wc -l; touch /sys/firmware/x"
    result = box.run(script, linux=linux(masked_paths=MASKED))
    assert result.lines[:3] == ["0", "1:3", "0"]
    assert "Read-only" in result.out


def test_masked_paths_cannot_be_filled_by_a_container_that_may_remount(box: Box) -> None:
    """The empty directory is the same one for every container: nothing may pass through it."""
    script = "mount -o remount,rw /sys/firmware; touch /sys/firmware/x; ls -A /sys/firmware"
    assert "x" not in box.run(script, linux=linux(masked_paths=("/sys/firmware",))).lines


def test_readonly_paths(box: Box) -> None:
    script = "echo 1 > /proc/sys/kernel/panic; cat /proc/sys/kernel/ostype; echo 1 > /proc/irq/default_smp_affinity"
    result = box.run(script, linux=linux(readonly_paths=READONLY))
    assert result.out.count("Read-only file system") == 2
    assert "Linux" in result.lines


def test_readonly_covers_what_is_mounted_below(box: Box) -> None:
    paths_ = (*USUAL, Mount("/data/sub", "tmpfs", "tmpfs"))
    result = box.run("touch /data/x; touch /data/sub/x; touch /y && echo writable", paths_, linux=linux(readonly_paths=("/data",)))
    assert result.out.count("Read-only file system") == 2
    assert result.lines[-1] == "writable"


def test_readonly_root(box: Box, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    volume = Mount("/data", "bind", str(tmp_path / "volume"), ("rbind",))
    result = box.run("touch /x; touch /data/x && touch /dev/x && pwd", (*USUAL, volume), readonly=True, cwd="/made/for/me")
    assert "Read-only file system" in result.out
    assert result.lines[-1] == "/"
    assert (tmp_path / "volume/x").exists()
    assert (box.upper / "made/for/me").is_dir()


@pytest.mark.parametrize("propagation, marker", [("rshared", "shared:"), ("rslave", ""), ("private", ""), ("unbindable", "unbindable")])
def test_root_propagation(box: Box, propagation: str, marker: str) -> None:
    lines = box.run("cat /proc/self/mountinfo", linux=linux(rootfs_propagation=propagation)).lines
    root = next(line for line in lines if line.split()[4] == "/")
    optional = root.split(" - ")[0].split()[6:]
    assert marker in " ".join(optional)
    assert marker or not optional


# ---- control groups


def test_cgroup_2_view(box: Box) -> None:
    result = box.run(
        "cat /sys/fs/cgroup/cgroup.controllers > /dev/null && mkdir /sys/fs/cgroup/x",
        (*USUAL, Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*NSE, "relatime", "ro"))),
    )
    assert "Read-only file system" in result.out


def test_cgroup_1_view(box: Box, tmp_path: Path) -> None:
    """Directories stand in for groups: what is checked is which directory shows where, and that none is writable."""
    paths_ = {}
    for name in ("cpu,cpuacct", "memory"):
        directory = tmp_path / name / "group"
        directory.mkdir(parents=True)
        (directory / "tasks").write_text(name)
        for controller in name.split(","):
            paths_[controller] = str(directory)
    script = "cd /sys/fs/cgroup; for i in *; do echo $i $(cat $i/tasks); done; echo x > memory/tasks; mkdir y"
    view = Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*NSE, "relatime", "ro"))
    result = box.run(script, (*USUAL, view), version=1, cgroup_paths=paths_)
    assert result.lines[:3] == ["cpu cpu,cpuacct", "cpuacct cpu,cpuacct", "memory memory"]
    assert result.out.count("Read-only file system") == 2


@pytest.mark.skipif(not Path("/sys/fs/cgroup/memory/tasks").exists(), reason="no cgroup v1 hierarchy here")
def test_cgroup_1_view_of_the_hosts_hierarchies(box: Box) -> None:
    paths_ = {"memory": "/sys/fs/cgroup/memory", "pids": "/sys/fs/cgroup/pids"}
    view = Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*NSE, "relatime", "ro"))
    script = "ls /sys/fs/cgroup; ls /sys/fs/cgroup/memory/tasks; mkdir /sys/fs/cgroup/memory/x"
    result = box.run(script, (*USUAL, view), version=1, cgroup_paths=paths_)
    assert result.lines[:3] == ["memory", "pids", "/sys/fs/cgroup/memory/tasks"]
    assert "Read-only file system" in result.out


# ---- the root itself


def _layers(tmp_path: Path, count: int) -> tuple[str, ...]:
    for number in range(count):
        layer = tmp_path / f"layer{number}"
        layer.mkdir()
        (layer / "who").write_text(str(number))
        (layer / f"only{number}").touch()
    return tuple(str(tmp_path / f"layer{n}") for n in range(count))


@pytest.mark.parametrize("count", [2, 130])
def test_layers_topmost_first(box: Box, tmp_path: Path, count: int) -> None:
    base = box.recipe()
    recipe = dataclasses.replace(base, lower=(*_layers(tmp_path, count), str(box.image)))
    result = box.run(f"cat /who; echo; ls -d /only* | wc -l; touch /new; ls /only{count - 1}", recipe=recipe)
    assert result.lines == ["0", str(count), f"/only{count - 1}"]
    assert (Path(base.upper) / "new").exists()


def test_long_paths(box: Box, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 5)
    deep.mkdir(parents=True)
    (deep / "upper").mkdir()
    (deep / "work").mkdir()
    layers = _layers(deep, 3)
    assert len(layers[0]) > 256
    result = box.run("cat /who", recipe=Recipe("overlay", (*layers, str(box.image)), str(deep / "upper"), str(deep / "work")))
    assert result.out == "0"


@pytest.mark.parametrize("count", [3, 150])
def test_the_way_of_older_kernels(box: Box, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without "lowerdir+": one value by fsconfig, and one page by mount(2) where that is too long."""
    real = m.fsconfig_string

    def refuse(fs: int, key: str, value: str) -> None:
        if key == "lowerdir+":
            raise OSError(22, "Invalid argument")
        real(fs, key, value)

    monkeypatch.setattr(m, "fsconfig_string", refuse)
    recipe = dataclasses.replace(box.recipe(), lower=(*_layers(tmp_path, count), str(box.image)))
    result = box.run("cat /who; echo; ls -d /only* | wc -l; touch /x; wc -l < /proc/self/mountinfo", recipe=recipe)
    assert result.lines == ["0", str(count), "6"]


def test_without_an_upper_layer_the_root_is_read_only(box: Box, tmp_path: Path) -> None:
    for lower in ((str(box.image),), (*_layers(tmp_path, 2), str(box.image))):
        assert "Read-only file system" in box.run("touch /x", recipe=Recipe("overlay", lower)).out


def test_bind_recipe(box: Box) -> None:
    assert box.run("touch /x && echo ok", recipe=Recipe("bind", source=str(box.image))).out == "ok\n"
    assert (box.image / "x").exists()


def test_overlay_options_are_passed(box: Box) -> None:
    recipe = dataclasses.replace(box.recipe(), options=("volatile", "index=off"))
    lines = box.run("cat /proc/self/mountinfo", recipe=recipe).lines
    assert "volatile" in next(line for line in lines if line.split()[4] == "/")


def test_a_missing_layer_says_which(box: Box) -> None:
    recipe = dataclasses.replace(box.recipe(), lower=("/no/such/layer", str(box.image)))
    with pytest.raises(Failure, match="mount overlay /no/such/layer: ENOENT"):
        box.run(recipe=recipe)


def test_what_the_file_system_says_is_in_the_error(box: Box) -> None:
    with pytest.raises(Failure, match=r"mount tmpfs /x: EINVAL .*(Bad value|bad|Unknown)"):
        box.run(mounts=(*USUAL, Mount("/x", "tmpfs", "tmpfs", ("size=lots",))))


def test_idmapped_layers(box: Box, tmp_path: Path) -> None:
    """A layer owned by root looks owned by the mapped id in the mount that a user namespace's container gets."""
    from tests.unit.linux.test_process import in_child

    ids = (IDMapping(0, 100000, 65536),)
    recipe = box.recipe()

    def body() -> str:
        namespaces = ops.idmap.Namespaces(None, (ids, ids))
        root = overlay.root_mount(recipe, namespaces.of_root())
        return str(os.stat("bin/busybox", dir_fd=root).st_uid)

    if kernel() < (6, 15):
        pytest.skip("a detached mount as a layer needs Linux 6.15")
    assert in_child(body) == "100000"


# ---- copy-up


def test_copyup_into_an_empty_volume(box: Box, tmp_path: Path) -> None:
    data = box.image / "data"
    (data / "dir").mkdir(parents=True)
    os.chmod(data, 0o1751)
    os.chown(data, 11, 12)
    (data / "dir/file").write_text("content" * 1000)
    os.chown(data / "dir/file", 33, 44)
    os.chmod(data / "dir/file", 0o4755)
    noted = file_system(data) != m.TMPFS_MAGIC or kernel() >= (6, 6)
    if noted:
        os.setxattr(data / "dir/file", "user.note", b"kept")
    os.link(data / "dir/file", data / "second")
    os.symlink("/etc/shadow", data / "link")
    os.mkfifo(data / "fifo", 0o600)
    os.utime(data / "dir/file", (1_000_000, 2_000_000))
    volume = tmp_path / "volume"
    volume.mkdir()
    mount = Mount("/data", "bind", str(volume), ("rbind", "copyup"))
    assert box.run("cat /data/second | wc -c; ls /data", (*USUAL, mount)).lines == ["7000", "dir", "fifo", "link", "second"]
    top, file = volume.stat(), (volume / "dir/file").stat()
    assert (stat.S_IMODE(top.st_mode), top.st_uid, top.st_gid) == (0o1751, 11, 12)
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_mtime) == (0o4755, 33, 44, 2_000_000)
    assert file.st_ino == (volume / "second").stat().st_ino
    assert os.readlink(volume / "link") == "/etc/shadow"
    assert not noted or os.getxattr(volume / "dir/file", "user.note") == b"kept"
    assert box.run("echo new > /data/dir/file", (*USUAL, mount)).code == 0
    assert box.run("cat /data/dir/file", (*USUAL, mount)).out == "new\n"  # not empty any more: left alone


def test_copyup_of_a_symlinked_volume_stays_in_the_image(box: Box, tmp_path: Path) -> None:
    """CVE-2022-23648: VOLUME as a symlink copies host files."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("host")
    os.symlink(f"../../../../..{secret}", box.image / "data")
    volume = tmp_path / "volume"
    volume.mkdir()
    result = box.run("ls -A /data/", (*USUAL, Mount("/data", "bind", str(volume), ("rbind", "copyup"))))
    assert result.out == ""
    assert not list(volume.iterdir())


def test_read_only_copyup(box: Box, tmp_path: Path) -> None:
    (box.image / "data").mkdir()
    (box.image / "data/x").write_text("y")
    (tmp_path / "volume").mkdir()
    mount = Mount("/data", "bind", str(tmp_path / "volume"), ("rbind", "ro", "copyup"))
    result = box.run("cat /data/x; touch /data/z", (*USUAL, mount))
    assert result.out.startswith("y")
    assert "Read-only" in result.out


def test_tmpfs_copyup(box: Box) -> None:
    (box.image / "etc/conf").write_text("c")
    result = box.run("cat /etc/conf; touch /etc/new && stat -f -c %T /etc", (*USUAL, Mount("/etc", "tmpfs", "tmpfs", ("tmpcopyup",))))
    assert result.out.startswith("c")
    assert "tmpfs" in result.out


def test_copy_between_file_systems_of_two_kinds(tmp_path: Path) -> None:
    from tests.unit.linux.test_process import in_child

    (tmp_path / "from").mkdir()
    (tmp_path / "from/file").write_bytes(os.urandom(300_000))

    def body() -> str:
        source = os.open(tmp_path / "from", os.O_PATH)
        target = m.new_filesystem("tmpfs", {"source": "x"})
        assert copyup.copy_into_empty(source, target)
        fd = os.open("file", os.O_RDONLY, dir_fd=target)
        return str(os.read(fd, 400_000) == (tmp_path / "from/file").read_bytes())

    assert in_child(body) == "True"


# ---- what must never happen


def test_nothing_is_imported_or_opened_by_name_after_the_root_change(box: Box) -> None:
    """ARCHITECTURE §4: a FIFO planted at a source path must not be able to hang us."""
    from tests.unit.linux.test_process import in_child

    for name in ("masked", "vol"):
        (box.base / name).mkdir()
    recipe = box.recipe()
    volume = Mount("/data", "bind", str(box.base / "vol"), ("rbind", "ro", "copyup"))
    spec = dataclasses.replace(_spec(), mounts=(*USUAL, volume), linux=linux(masked_paths=MASKED, readonly_paths=READONLY))

    def body() -> str:
        from shim.linux import libc

        libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC)
        operations = plan.plan(spec, recipe, cgroup_version=2)
        prepared = ops.prepare(operations, recipe)
        os.close(ops.lean_namespace())
        libc.unshare(libc.CLONE_NEWNS)
        events: list[str] = []

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event in ("import", "exec", "compile", "ctypes.dlopen") or (event == "open" and str(args[0]).startswith("/usr")):
                events.append(f"{event} {args[0]}")

        sys.addaudithook(hook)
        rootfd = ops.attach_root(prepared)
        ops.attach(operations, prepared, rootfd)
        ops.seal(operations, prepared, rootfd)
        failing = (plan.Filesystem("/sys/fs/nope/deeper", "tmpfs"),)
        try:
            ops.attach(failing, ops.Prepared(rootfd), rootfd)
        except Failure as failure:
            text = str(failure)
        return f"{events} {text}"

    said = in_child(body)
    assert said.startswith("[] create container: mount tmpfs /sys/fs/nope/deeper: E")


def test_no_fd_and_no_host_mount_is_left(box: Box) -> None:
    """After ``seal`` the root's fd is the only one that came with the root; a failure half way leaves nothing in the host's table."""

    def count(rootfd: int) -> None:
        open_ = {fd for fd in os.listdir("/proc/self/fd") if _alive(int(fd))}
        os.mkdir("result", dir_fd=rootfd)
        os.mkdir(f"result/{len(open_)}", dir_fd=rootfd)

    everything = linux(masked_paths=MASKED, readonly_paths=READONLY, devices=(Device("/dev/net/tun", "c", 10, 200),))
    counts = {box.run("ls /result", mounts_, inside=count, linux=everything).out for mounts_ in ((PROC,), USUAL)}
    assert len(counts) == 1
    with pytest.raises(Failure):
        box.run(mounts=(*USUAL, Mount("/x", "bind", "/does/not/exist")))
    assert str(box.base) not in Path("/proc/self/mountinfo").read_text()


def _alive(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_shm_of_the_pod(box: Box) -> None:
    def shm() -> int:
        fd = m.new_filesystem("tmpfs", {"source": "shm", "size": "1m", "mode": "1777"}, m.MOUNT_ATTR_NODEV)
        os.mkdir("shared", dir_fd=fd)
        return fd

    mount = Mount("/dev/shm", "bind", "pod:shm", ("rbind",))
    assert box.run("ls /dev/shm; stat -c %a /dev/shm", (*USUAL, mount), shm=shm).lines == ["shared", "1777"]
    with pytest.raises(Failure, match="no shared"):
        box.run(mounts=(*USUAL, mount))


def test_unrelated_shared_mounts_stay_out(box: Box, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    result = box.run("cat /proc/self/mountinfo", (PROC, DEV, SYS), before=lambda: shared_tmpfs(tmp_path / "host"))
    assert str(tmp_path / "host") not in result.out
    assert len(result.lines) == 4
