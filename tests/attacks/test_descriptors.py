"""ATTACKS.md, "File descriptors, /proc/self/exe, environment": what has leaked from runtimes into containers and back."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import stat
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.attacks.conftest import digest
from tests.daemon.builders import unique
from tests.daemon.harness import REPOSITORY, Daemon, Node, running
from tests.registry import DockerRegistry

PTRACE = v1.LinuxContainerSecurityContext(capabilities=v1.Capability(add_capabilities=["SYS_PTRACE"]))


def mount(host: Path, inside: str, *, readonly: bool = False) -> v1.Mount:
    return v1.Mount(container_path=inside, host_path=str(host), readonly=readonly)


def capable(pod: v1.PodSandboxConfig, *names: str) -> v1.LinuxContainerSecurityContext:
    context = v1.LinuxContainerSecurityContext(capabilities=v1.Capability(add_capabilities=names))
    context.namespace_options.CopyFrom(pod.linux.security_context.namespace_options)
    return context


@pytest.mark.parametrize("shared_pid", [False, True])
def test_cwd_through_a_descriptor(daemon: Daemon, busybox: str, sentinel: Path, shared_pid: bool) -> None:
    """CVE-2024-21626: WORKDIR /proc/self/fd/N must not reach a directory of the host, for any N."""
    pod = daemon.run_pod(shared_pid=shared_pid)
    look = f"pwd; ls -a; cat ../../../../../../..{sentinel}/secret"
    started = 0
    for number in range(3, 51):
        try:
            container = daemon.create(pod, busybox, "sh", "-c", look, working_dir=f"/proc/self/fd/{number}")
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
        except grpc.RpcError as error:
            assert f"/proc/self/fd/{number}" in (error.details() or ""), error.details()
            continue
        started += 1
        daemon.wait_exit(container)
        assert "host-secret" not in daemon.log_text(container)
    assert started == 0, "a descriptor path was accepted as working directory"


def test_a_joining_process_cannot_be_read(daemon: Daemon, busybox: str, hostile: Callable[[str], Path]) -> None:
    """CVE-2016-9962: a container with SYS_PTRACE that shares its PID namespace watches others being exec'd into it. It must see
    no memory of ours (here: the environment of a container in another pod), no interpreter, and no descriptor of the host."""
    secret = secrets.token_hex(16)
    other = daemon.run_pod()
    daemon.run(other, busybox, "sleep", "600", env={"OTHER_POD_SECRET": secret})
    pod = daemon.run_pod(shared_pid=True)
    watched = daemon.run(pod, busybox, "sleep", "600")
    program = hostile("memscan")
    spy = daemon.run(
        pod, busybox, "/spy/memscan", "8", secret.encode().hex(), mounts=(mount(program, "/spy"),), security=capable(pod[1], "SYS_PTRACE")
    )
    end = time.monotonic() + 7
    execs = 0
    while time.monotonic() < end:
        assert daemon.exec(watched, "/bin/true").exit_code == 0
        started = daemon.run(pod, busybox, "true", env={"OWN": "1"})
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=started), timeout=10)
        execs += 1
    daemon.wait_exit(spy)
    text = daemon.log_text(spy)
    rounds = re.search(r"rounds (\d+) pids (\d+)", text)
    assert rounds and int(rounds[1]) > 10 and int(rounds[2]) >= 2, text[-500:]
    assert execs > 5
    for bad in ("marker ", "exe ", "writable ", "fd "):
        # The file for an error report is anybody's: see shim.runtime.channel.
        found = [line for line in text.splitlines() if re.search(rf"stdout F {bad}", line) and "memfd:cri-shim-report" not in line]
        assert not found, found[:5]


def test_the_spy_sees_what_is_there(daemon: Daemon, busybox: str, hostile: Callable[[str], Path]) -> None:
    """The test above can fail: the same program does find a marker that a visible process holds."""
    pod = daemon.run_pod(shared_pid=True)
    secret = secrets.token_hex(16)
    daemon.run(pod, busybox, "sh", "-c", "X=$MARK; while :; do sleep 1; done", env={"MARK": secret})
    spy = daemon.run(
        pod, busybox, "/spy/memscan", "2", secret.encode().hex(),
        mounts=(mount(hostile("memscan"), "/spy"),), security=capable(pod[1], "SYS_PTRACE"),
    )  # fmt: skip
    daemon.wait_exit(spy)
    assert "stdout F marker " in daemon.log_text(spy)


def interpreter_files() -> list[Path]:
    """The interpreter and every shared object it may load."""
    found = [Path(os.path.realpath(sys.executable))]
    for name in ("LIBDIR", "DESTSHARED"):
        directory = sysconfig.get_config_var(name)
        if directory:
            found += sorted(Path(directory).glob("libpython*.so*")) + sorted(Path(directory).glob("*.so"))
    return found


def test_proc_self_exe_is_not_ours_to_overwrite(daemon: Daemon, busybox: str, tmp_path: Path) -> None:
    """CVE-2019-5736: a program that is a script run by /proc/self/exe, as entrypoint and as exec target, while others in the
    container try to write to whatever /proc/PID/exe is. The interpreter and its libraries stay as they are."""
    before = [digest(p) for p in interpreter_files()]
    bait = tmp_path / "bait"
    bait.mkdir()
    (bait / "script").write_text("#!/proc/self/exe\n")
    (bait / "script").chmod(0o755)
    overwrite = "while :; do for e in /proc/[0-9]*/exe; do echo pwned > $e; done; done 2>/dev/null"
    pod = daemon.run_pod(shared_pid=True)
    victim = daemon.run(pod, busybox, "sh", "-c", overwrite, mounts=(mount(bait, "/bait"),), security=capable(pod[1], "SYS_PTRACE"))
    for _ in range(40):
        # What runs, if anything, is the interpreter; in this root it lacks its loader (ENOENT).
        with contextlib.suppress(grpc.RpcError):
            daemon.exec(victim, "/bait/script")
    for _ in range(10):
        container = daemon.create(pod, busybox, "/bait/script", mounts=(mount(bait, "/bait"),))
        try:
            daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
            daemon.wait_exit(container)
        except grpc.RpcError as error:
            assert "start" in (error.details() or "")
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert [digest(p) for p in interpreter_files()] == before


def test_nothing_is_loaded_from_the_root(daemon: Daemon, busybox: str, tmp_path: Path) -> None:
    """CVE-2019-14271, CVE-2026-41567: trojan libraries and configuration in the root, and FIFOs where our own sources and the
    interpreter's lie on the host: an error inside the root must neither load nor open any of them."""
    marker = tmp_path / "shared"
    marker.mkdir()
    trojan = tmp_path / "trojan"
    trojan.mkdir()
    for name in ("libc.so.6", "libnss_files.so.2", "libseccomp.so.2", "unpigz", "nsswitch.conf"):
        (trojan / name).write_text("#!/bin/sh\ntouch /shared/loaded\n")
        (trojan / name).chmod(0o755)
    sources = tmp_path / "sources"
    for path in sorted((REPOSITORY / "shim").rglob("*.py")):
        fifo = sources / path.relative_to(REPOSITORY / "shim")
        fifo.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(fifo)
    mounts = (
        mount(trojan, "/lib/x86_64-linux-gnu"), mount(trojan, "/usr/lib"), mount(trojan, "/lib64"), mount(trojan, "/usr/local/bin"),
        mount(sources, str(REPOSITORY / "shim")), mount(sources, os.path.dirname(os.__file__)), mount(marker, "/shared"),
    )  # fmt: skip
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "/bin/sleep", "60", mounts=mounts)
    assert daemon.exec(container, "/bin/true").exit_code == 0
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as error:
        daemon.exec(container, "/does/not/exist")
    assert "no such file" in (error.value.details() or "").lower()
    failing = daemon.create(pod, busybox, "/does/not/exist", mounts=mounts)
    with pytest.raises(grpc.RpcError):
        daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=failing), timeout=10)
    with pytest.raises(grpc.RpcError, match="(?i)nosuchuser"):
        daemon.create(pod, busybox, "true", mounts=mounts, security=v1.LinuxContainerSecurityContext(run_as_username="nosuchuser"))
    assert time.monotonic() - began < 5
    assert not (marker / "loaded").exists()


def test_no_abstract_sockets(daemon: Daemon, busybox: str, node: Node) -> None:
    """CVE-2020-15257: pods on the host network see the host's abstract sockets, so there are none, and the sockets there are refuse
    everybody but root by the directory they lie in."""
    pod = daemon.run_pod(host_network=True)
    container = daemon.run(pod, busybox, "sleep", "60")
    table = daemon.exec(container, "cat", "/proc/net/unix").stdout.decode()
    assert not [line for line in table.splitlines() if line.split()[-1].startswith("@")], table
    for path in (daemon.state, daemon.root):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    # the supervisor checks credentials even if somebody opened the directory
    daemon.state.chmod(0o711)
    try:
        assert _refused_as(65534, daemon.state / "supervisor.sock")
    finally:
        daemon.state.chmod(0o700)


def _refused_as(uid: int, path: Path) -> bool:
    """Whether a process of that user gets no answer from the socket."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(3)
                sock.connect(str(path))
                sock.send(b'{"v":1,"id":1,"op":"hello","version":1}')
                code = 0 if not sock.recv(4096) else 1
        except PermissionError:
            code = 0
        except ConnectionError:
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_environments_do_not_mix(node: Node, registry: DockerRegistry) -> None:
    """CVE-2021-21334, CVE-2020-14370, CVE-2026-57231: each container has exactly its own environment, also when many are made at
    once, and nothing of the daemon's."""
    with running(node, env={"DAEMON_SECRET": "leaked-from-daemon"}) as daemon:
        image = f"{registry.host}/busybox:latest"
        daemon.images.PullImage(v1.PullImageRequest(image=v1.ImageSpec(image=image)), timeout=60)
        pod = daemon.run_pod()

        def one(number: int) -> str:
            container = daemon.run(pod, image, "env", env={f"ONLY_{number}": f"value-{number}"}, name=unique("env"))
            daemon.wait_exit(container)
            return daemon.log_text(container)

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(one, range(24)))
        for number, text in enumerate(texts):
            names = {line.split(" F ", 1)[1].partition("=")[0] for line in text.splitlines()}
            assert names == {"PATH", "HOSTNAME", "HOME", f"ONLY_{number}"}, names


def test_lengths_do_not_overflow(daemon: Daemon, busybox: str) -> None:
    """CVE-2021-43784: a megabyte of environment arrives whole; a path of 70 KiB is refused clearly; both leave the daemon serving."""
    pod = daemon.run_pod()
    env = {f"BIG_{i}": "x" * 100_000 for i in range(10)}
    container = daemon.run(pod, busybox, "sh", "-c", "env | wc -c", env=env)
    daemon.wait_exit(container)
    assert int(daemon.log_text(container).split()[-1]) > 1_000_000
    with pytest.raises(grpc.RpcError) as error:
        daemon.create(pod, busybox, "true", mounts=(v1.Mount(container_path="/x", host_path="/" + "y" * 70_000),))
    assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    with pytest.raises(grpc.RpcError):
        daemon.create(pod, busybox, "true", log_path="z" * 70_000)
    assert daemon.runtime.Version(v1.VersionRequest(), timeout=5).runtime_name == "cri-shim"


def test_state_is_for_root_only(node: Node) -> None:
    """CVE-2021-41103, CVE-2024-25621: state and root are 0700, and a start repairs them."""
    with running(node) as daemon:
        daemon.kill()
        for path in (daemon.root, daemon.state):
            path.chmod(0o755)
        daemon.start()
        for path in (daemon.root, daemon.state):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        for top in (daemon.root, daemon.state):
            for path in top.rglob("*"):
                if path.is_file() and not path.is_symlink() and "netns" not in path.parts and path.name != "pins":  # nsfs says 0444
                    assert not stat.S_IMODE(path.lstat().st_mode) & 0o007 or "/fs/" in str(path), path
