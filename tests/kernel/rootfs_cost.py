"""What one container's root costs: ``python -m tests.kernel.rootfs_cost [ROUNDS] [--bare] [--v1]``, as root.

Each round forks a child from this warm process, as the supervisor does, and makes the whole root of a typical pod's container: overlay,
13 mounts, /dev, 12 masked and 5 read-only paths. Printed: median and smallest time and page faults per phase, and the number of system
calls. ``--bare``: the image lacks the mount points (each then costs a mkdir or a create in the overlay). ``--v1``: with a cgroup v1 view.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from shim.linux import libc
from shim.linux import mount as m
from shim.oci import codec
from shim.oci.bundle import Recipe
from shim.oci.spec import Linux, Mount, Namespace, NamespaceType, Process, Root, Spec
from shim.rootfs import lean, ops, plan

NSE = ("nosuid", "noexec", "nodev")
MASKED = tuple(
    f"/proc/{name}"
    for name in ("asound", "acpi", "interrupts", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
V1 = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "systemd")
FILES = ("etc/hosts", "etc/hostname", "etc/resolv.conf")
ACCOUNT = "var/run/secrets/kubernetes.io/serviceaccount"


def specification(base: Path) -> Spec:
    private = ("rbind", "rprivate")
    mounts = (
        Mount("/proc", "proc", "proc", NSE),
        Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        Mount("/dev/mqueue", "mqueue", "mqueue", NSE),
        Mount("/sys", "sysfs", "sysfs", (*NSE, "ro")),
        Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*NSE, "relatime", "ro")),
        Mount("/dev/shm", "bind", plan.SHM, ("rbind",)),
        *(Mount(f"/{name}", "bind", str(base / "file"), private) for name in FILES),
        Mount("/dev/termination-log", "bind", str(base / "file"), private),
        Mount("/data", "bind", str(base / "volume"), private),
        Mount(f"/{ACCOUNT}", "bind", str(base / "volume"), (*private, "ro")),
    )
    kinds = (NamespaceType.PID, NamespaceType.MOUNT, NamespaceType.IPC, NamespaceType.NETWORK)
    masked = (*MASKED, "/sys/firmware", "/sys/devices/virtual/powercap")
    linux = Linux(namespaces=tuple(Namespace(kind) for kind in kinds), masked_paths=masked, readonly_paths=READONLY)
    return Spec("1.2.0", Root("rootfs"), Process(("/bin/sh",)), mounts=mounts, linux=linux)


def make_image(base: Path, bare: bool) -> tuple[str, ...]:
    for number in range(5):
        (base / f"layer{number}").mkdir()
    bottom = base / "layer4"
    for name in ("proc", "sys", "dev", "etc", *(() if bare else ("data", ACCOUNT))):
        (bottom / name).mkdir(parents=True)
    for name in () if bare else FILES:
        (bottom / name).touch()
    (base / "file").write_text("x")
    (base / "volume").mkdir()
    return tuple(str(base / f"layer{n}") for n in range(5))


def round_(lean_fd: int, text: bytes, recipe: Recipe, v1: bool) -> dict[str, tuple[float, float, int]]:
    """In a child: microseconds, microseconds of CPU and page faults by phase."""
    spec = codec.decode(Spec, text)  # not counted, but stage1 does it first, and much of Python's memory is touched by then
    libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC)
    shm = m.new_filesystem("tmpfs", {"source": "shm", "mode": "1777"})
    marks = []

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))

    mark("")
    groups = {name: f"/sys/fs/cgroup/{name}" for name in V1} if v1 else {}
    operations = plan.plan(spec, recipe, cgroup_version=1 if v1 else 2, cgroup_paths=groups)
    mark("plan")
    prepared = ops.prepare(operations, recipe, shm_fd=shm)
    mark("prepare")
    libc.setns(lean_fd, libc.CLONE_NEWNS)
    libc.unshare(libc.CLONE_NEWNS)
    mark("namespace")
    rootfd = ops.attach_root(prepared)
    mark("attach_root")
    ops.attach(operations, prepared, rootfd)
    mark("attach")
    ops.seal(operations, prepared, rootfd)
    mark("seal")
    return {b[0]: ((b[1] - a[1]) * 1e6, (b[2] - a[2]) * 1e6, b[3] - a[3]) for a, b in pairwise(marks)}


def lean_fd() -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, _ = libc.clone3(0)
    if pid == 0:
        socket.send_fds(theirs, [b"x"], [lean.lean_namespace()])
        os._exit(0)
    os.waitpid(pid, 0)
    return socket.recv_fds(ours, 10, 1)[1][0]


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    bare, v1 = "--bare" in sys.argv, "--v1" in sys.argv
    base = Path(tempfile.mkdtemp(prefix="rootfs-cost-"))
    try:
        layers, spec, fd = make_image(base, bare), specification(base), lean_fd()
        plan.warm()  # as the supervisor does
        text = codec.encode(spec)
        for _ in range(20):
            codec.decode(Spec, text)
        gc.collect()
        gc.freeze()
        results = []
        for number in range(int(words[0]) if words else 100):
            recipe = Recipe("overlay", layers, str(base / f"upper{number}"), str(base / f"work{number}"))
            os.mkdir(recipe.upper)
            os.mkdir(recipe.work)
            read, write = os.pipe()
            pid, _ = libc.clone3(0)
            if pid == 0:
                try:
                    os.write(write, json.dumps(round_(fd, text, recipe, v1)).encode())
                finally:
                    os._exit(0)
            os.close(write)
            results.append(json.loads(os.read(read, 1 << 16)))
            os.close(read)
            os.waitpid(pid, 0)
    finally:
        shutil.rmtree(base)
    for name in results[0]:
        show(name, [r[name] for r in results])
    show("all", [tuple(map(sum, zip(*r.values(), strict=True))) for r in results])


def show(name: str, rows: Sequence[Sequence[float]]) -> None:
    wall, cpu, faults = zip(*rows, strict=True)
    median = statistics.median
    print(f"{name:12} {median(wall):7.0f} µs (least {min(wall):5.0f})  {median(cpu):7.0f} µs of CPU  {median(faults):5.0f} page faults")


if __name__ == "__main__":
    main()
