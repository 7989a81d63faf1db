"""OCI hooks (config.md#posix-platform-hooks): a clean environment, cwd /, the state on stdin, an end to waiting.

createRuntime, prestart, poststart and poststop run in the host's namespaces in a child of the supervisor. createContainer runs in
the container's namespaces but for a mount namespace of its own, where the host's files are found and the container's root lies
at the bundle's ``rootfs`` (CDI hooks write into it). startContainer runs inside the root. A hook never inherits the container's
environment or working directory (CVE-2024-0132, CVE-2025-23266).
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Collection
from dataclasses import dataclass

from shim.errors import Failure
from shim.linux import libc, mount, process
from shim.oci import bundle as bundles
from shim.oci.spec import Hook, Hooks, Spec
from shim.runtime.channel import Channel

DEFAULT_TIMEOUT = 60  # seconds, where the hook names none
STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def of_stage(spec: Spec, stage: str) -> tuple[Hook, ...]:
    """The hooks of one of ``STAGES``."""
    hooks = spec.hooks or Hooks()
    table = {
        "prestart": hooks.prestart,
        "createRuntime": hooks.create_runtime,
        "createContainer": hooks.create_container,
        "startContainer": hooks.start_container,
        "poststart": hooks.poststart,
        "poststop": hooks.poststop,
    }
    return table[stage]


def state(spec: Spec, container_id: str, status: str, pid: int, bundle_path: str) -> bytes:
    """The state that hooks read (runtime.md#state)."""
    fields = {"ociVersion": spec.oci_version, "id": container_id, "status": status, "bundle": bundle_path}
    if pid:
        fields["pid"] = pid  # type: ignore[assignment]
    if spec.annotations:
        fields["annotations"] = spec.annotations  # type: ignore[assignment]
    return json.dumps(fields).encode()


def run_all(hooks: tuple[Hook, ...], payload: bytes) -> None:
    """Run hooks in order. Raises Failure at the first that fails or outlives its timeout."""
    for hook in hooks:
        _run(hook, payload)


def _run(hook: Hook, payload: bytes) -> None:
    image = libc.ExecImage(
        os.fsencode(hook.path), [os.fsencode(a) for a in hook.args or (hook.path,)], [os.fsencode(e) for e in hook.env]
    )
    stdin = libc.sealed_memfd("hook-state", payload)
    output_read, output_write = os.pipe()
    try:
        pid, pidfd = libc.clone3(0, pidfd=True)
        if pid == 0:
            _become(image, stdin, output_write)
        os.close(output_write)
        output_write = -1
        _await(hook, pidfd, output_read)
    except OSError as error:
        raise Failure.wrap("hook", "exec", error, hook.path) from None
    finally:
        for fd in (stdin, output_read, output_write):
            if fd >= 0:
                os.close(fd)


def _become(image: libc.ExecImage, stdin: int, output: int) -> None:
    try:
        os.dup2(stdin, 0, inheritable=True)
        os.dup2(output, 1, inheritable=True)
        os.dup2(output, 2, inheritable=True)
        process.close_all_except({0, 1, 2})
        os.chdir("/")
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        image.exec()
    except OSError as error:
        os.write(2, f"{os.strerror(error.errno or 0)}\n".encode())
    finally:
        os._exit(127)


def _await(hook: Hook, pidfd: int, output: int) -> None:
    said = b""
    timeout = (DEFAULT_TIMEOUT if hook.timeout is None else hook.timeout) * 1000
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout):
            libc.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            raise Failure("hook", "run", path=hook.path, message=f"still running after {timeout // 1000} s, killed")
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.set_blocking(output, False)
        try:
            said = os.read(output, 4096)
        except BlockingIOError:
            said = b""
        if result is not None and (result.si_code != os.CLD_EXITED or result.si_status != 0):
            how = "exit code" if result.si_code == os.CLD_EXITED else "signal"
            text = said.decode("utf-8", "replace").strip()[:400]
            raise Failure("hook", "run", path=hook.path, message=f"{how} {result.si_status}" + (f": {text}" if text else ""))
    finally:
        os.close(pidfd)


@dataclass(frozen=True, slots=True)
class HooksJob:
    """Hooks of one stage in the host's namespaces; poststop runs every hook and reports the first failure."""

    bundle: int
    stage: str
    container_id: str
    pid: int
    bundle_path: str
    inherited: process.Inherited

    @property
    def keep(self) -> Collection[int]:
        return (self.bundle,)

    def __call__(self, channel: Channel) -> None:
        process.reset_inherited(self.inherited)
        spec = bundles.load_spec(self.bundle)
        status = {"poststop": "stopped", "poststart": "running"}.get(self.stage, "creating")
        payload = state(spec, self.container_id, status, self.pid, self.bundle_path)
        if self.stage == "poststop":
            failures = []
            for hook in of_stage(spec, self.stage):
                try:
                    _run(hook, payload)
                except Failure as failure:
                    failures.append(failure)
            if failures:
                raise failures[0]
        else:
            run_all(of_stage(spec, self.stage), payload)
        channel.send({"ok": {}})


def show_root(tree: int, host_mntns: int, bundle_path: str) -> None:
    """Enter a mount namespace with the host's files, and the detached ``tree`` at the bundle's ``rootfs``."""
    libc.setns(host_mntns, libc.CLONE_NEWNS)
    libc.unshare(libc.CLONE_NEWNS)
    mount.make_private("/")
    target = f"{bundle_path}/rootfs"
    os.makedirs(target, 0o700, exist_ok=True)
    fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount.move_mount(tree, fd)
    os.close(fd)


def create_container(spec: Spec, rootfd: int, host_mntns: int, container_id: str, bundle_path: str) -> None:
    """createContainer hooks, in a forked child that sees the host's files with the container's root at ``<bundle>/rootfs``."""
    hooks = of_stage(spec, "createContainer")
    if not hooks:
        return
    tree = mount.clone_mount(rootfd, recursive=True)
    payload = state(spec, container_id, "creating", 0, bundle_path)
    read, write = os.pipe()
    pid, pidfd = libc.clone3(0, pidfd=True)
    if pid == 0:
        code = 1
        try:
            show_root(tree, host_mntns, bundle_path)
            run_all(hooks, payload)
            code = 0
        except Failure as failure:
            os.write(write, json.dumps(failure.to_json()).encode())
        except OSError as error:
            os.write(write, json.dumps(Failure.wrap("hook", "prepare", error).to_json()).encode())
        finally:
            os._exit(code)
    os.close(write)
    os.close(tree)
    said = os.read(read, 1 << 16)
    os.close(read)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    if said:
        raise Failure.from_json(json.loads(said))
    if result is None or result.si_status != 0:
        raise Failure("hook", "createContainer", message="the process that ran the hooks died")
