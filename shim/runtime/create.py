"""Creating a container: stage1 on the host's side, then init.

Stage1 makes the cgroup, turns host paths into detached mounts and joins the pod's namespaces. With a PID namespace of its own the
container's init is forked next and finishes the work as PID 1, where nobody else can look; the program is execve'd in it. With a
PID namespace that others live in, stage1 finishes the work outside it and forks last, at start (see ``final.run_in_child``).
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NoReturn

from shim.cgroups import manager as cgroups
from shim.cgroups import oom
from shim.cgroups.group import Group
from shim.errors import Failure
from shim.linux import libc, mount
from shim.oci import bundle as bundles
from shim.oci import codec, validate
from shim.oci.bundle import Recipe
from shim.oci.spec import NamespaceType, Spec
from shim.rootfs import ops as rootfs
from shim.rootfs import plan as rootfs_plan
from shim.runtime import hooks, inside, kept, launch, listener, namespaces, pins, sysctl
from shim.runtime.channel import Channel
from shim.runtime.context import Context, PodHandles
from shim.runtime.final import Final, start_clean
from shim.runtime.hooks_outside import Order, Outside


@dataclass(frozen=True, slots=True)
class Container:
    """The job of ``container.create``; see the protocol in ``launch`` and ARCHITECTURE §4."""

    context: Context
    id: str
    bundle: int  # directory fd
    bundle_path: str
    pod: PodHandles
    slot: int
    target: int | None = None  # pidfd or PID namespace fd of the container whose PID namespace is joined
    stdin_once: bool = False

    @property
    def keep(self) -> Collection[int]:
        fds = {self.bundle, *self.context.fds(), *self.pod.named().values()}
        return fds if self.target is None else fds | {self.target}

    def order(self) -> tuple[dict[str, object], tuple[int, ...]]:
        """For a helper, whose last order this is."""
        pod = self.pod.named()
        fds = (self.bundle, *pod.values()) if self.target is None else (self.bundle, *pod.values(), self.target)
        names = {"id": self.id, "path": self.bundle_path, "pod": list(pod), "slot": self.slot, "stdin_once": self.stdin_once}
        return {"job": "container", **names}, fds

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        proc = None if self.target is None else namespaces.proc_from(self.target, self.context.host_mntns, self.context.proc)
        spec, recipe = bundles.load_spec(self.bundle), bundles.load_recipe(self.bundle)
        validate.validate(spec)
        start_clean(self.context, spec.process.oom_score_adj)
        Stage1(self, channel, spec, recipe, proc).run()


@dataclass(slots=True)
class Stage1:
    job: Container
    channel: Channel
    spec: Spec
    recipe: Recipe
    proc: int | None
    making: cgroups.Making = field(init=False)
    group: Group = field(init=False)
    oom_fds: list[int] = field(init=False)
    kept_fd: int = field(init=False)
    hooks_outside: Outside | None = None

    def run(self) -> None:
        spec, context = self.spec, self.job.context
        kept_ = kept.compile_filter(spec, context.seccomp_cache)
        pid_mode = namespaces.pid_mode(spec)
        if kept_.notifies and pid_mode is not namespaces.PidMode.NEW:
            listener.go_on_in_child(self.channel)
        stdio = None if spec.process.terminal else open_stdio(self.job.bundle, self.job.stdin_once)
        self.making = cgroups.begin(context.layout, spec.linux.cgroups_path, spec.linux.resources)
        self.channel.note("cgroup", self.making.group.to_json())  # so that a failure names what there is to remove
        user = namespaces.user_namespace(spec, self.job.pod)
        if kept_.root is not None:
            inside.raise_hard_limits(spec.process)
            if stdio is not None:
                inside.give_stdio(stdio, kept_.root)
        self.kept_fd = kept.create(self.job.bundle)
        shm = self._pod_mounts()
        self.group = self.making.group
        paths = self.group.paths if self.group.version == 1 else {}
        operations = rootfs_plan.plan(spec, self.recipe, cgroup_version=self.group.version, cgroup_paths=paths)
        if paths:
            self.making.finish()  # the container's mounts may be of its directories
        prepared = rootfs.prepare(operations, self.recipe, shm_fd=shm, userns_fd=user)
        self.making.finish()
        self.oom_fds = oom.watch(self.group)
        # Last of what needs host paths, so that little of ours is charged to the container. Being born there takes the right to write to
        # the group, which is the host's: not from within a user namespace.
        birthplace = cgroups.open_dir(self.group) if pid_mode is namespaces.PidMode.NEW and user is None else None
        if birthplace is None:
            cgroups.join(self.group)
            self.making.release()
        if kept_.root is not None and hooks.of_stage(spec, "createContainer"):
            shared = namespaces.shared(spec, self.job.pod)
            self.hooks_outside = Outside(Order(spec, self.job.id, self.job.bundle_path, kept_.root, context.host_mntns, shared))
        namespaces.join(spec, self.job.pod, self.job.target)
        namespaces.new_mount_namespace(self.job.pod.mount, user)
        if user is not None:
            launch.ids_changed()

        def build() -> tuple[Final, int | None]:
            return self._build(operations, prepared, stdio, kept_, own_pid=pid_mode is namespaces.PidMode.NEW)

        if pid_mode is namespaces.PidMode.NEW:
            self._fork_init(build, birthplace, notifies=kept_.notifies)
        else:
            self._finish_outside(build)

    def _pod_mounts(self) -> int | None:
        """Clones of the pod's /dev/shm and, where its PID namespace is joined, of its /proc."""
        wants_shm = any(m.source == "pod:shm" for m in self.spec.mounts)
        pid = self.spec.namespace(NamespaceType.PID)
        wants_proc = pid is not None and pid.path == "pod:pid"
        if not (wants_shm or wants_proc):
            return None
        libc.setns(self.job.pod.mount, libc.CLONE_NEWNS)
        shm = mount.open_tree(mount.AT_FDCWD, "/shm") if wants_shm else None
        if wants_proc:
            self.proc = mount.open_tree(mount.AT_FDCWD, "/proc")
        libc.setns(self.job.context.host_mntns, libc.CLONE_NEWNS)
        return shm

    def _fork_init(self, build: namespaces.Build, birthplace: int | None, *, notifies: bool) -> None:
        """Fork PID 1 of a new PID namespace as the supervisor's child, in the cgroup ``birthplace`` or else in that of this process.
        The kernel tells its pid through the slot."""
        address = self.job.context.slots.address(self.job.slot)
        flags = libc.CLONE_NEWPID | libc.CLONE_PARENT
        pins_ = self.job.context.pins
        if notifies:  # our descriptors are its own then, and it has closed them when we go on
            if libc.clone3(flags | listener.SHARED, exit_signal=0, cgroup=birthplace, parent_tid_address=address)[0] == 0:
                self._init(build)
            listener.hand_over(self.channel)
        pid, pidfd = libc.clone3(flags, exit_signal=0, pidfd=True, cgroup=birthplace, parent_tid_address=address)
        if pid == 0:
            self._init(build)
        self.making.release()
        if pins_ is not None and self._pins_itself:
            pins.pin(pins_, self.job.id, pidfd)

    @property
    def _pins_itself(self) -> bool:
        """Whether this launch pins its process: not one that is forked after all privileges are gone."""
        seccomp = self.spec.linux.seccomp
        asks = seccomp is not None and bool(seccomp.listener_path or seccomp.notifier)  # see ``_fork_init``
        return namespaces.pid_mode(self.spec) is namespaces.PidMode.NEW and self.spec.namespace(NamespaceType.USER) is None and not asks

    def _init(self, build: namespaces.Build) -> NoReturn:
        code = 127
        try:
            final, master = build()
            self._announce(self.job.context.slots.pid(self.job.slot), final, master)
            self._await_start(final)
            final.run(self.channel)
        except BaseException as error:
            launch.report(self.channel, error)
        finally:
            os._exit(code)

    def _finish_outside(self, build: namespaces.Build) -> None:
        final, master = build()
        self._announce(0, final, master)
        self._await_start(final)
        if not final.listened:
            self.channel.narrow()
        final.run_in_child(self.job.context.slots.address(self.job.slot))

    def _build(
        self,
        operations: tuple[rootfs_plan.Op, ...],
        prepared: rootfs.Prepared,
        stdio: tuple[int, int, int] | None,
        kept_: kept.Kept,
        *,
        own_pid: bool,
    ) -> tuple[Final, int | None]:
        """Everything between the namespaces and the wait for start."""
        spec = self.spec
        if (new := spec.namespace(NamespaceType.CGROUP)) is not None and not new.path:
            libc.unshare(libc.CLONE_NEWCGROUP)
        self._host_hooks(own_pid)
        if kept_.root is not None:
            rootfs.make_visible(operations, prepared, proc_fd=self.proc)
        rootfd = rootfs.attach_root(prepared)
        rootfs.attach(operations, prepared, rootfd, proc_fd=self.proc)
        if self.hooks_outside is not None:
            self.hooks_outside.run(rootfd)
        else:
            hooks.create_container(spec, rootfd, self.job.context.host_mntns, self.job.id, self.job.bundle_path)
        namespaces.set_names(spec)
        if spec.linux.sysctl:
            sysctl.apply(self.job.context.proc, spec.linux.sysctl)
        resolved = inside.resolve_user(spec.process, rootfd)
        kept.store(self.kept_fd, replace(kept_, home=resolved.home))
        process = replace(spec.process, user=resolved.user)
        final, master = Final.prepare(process, resolved.home, rootfd, stdio, kept_.filter())
        if spec.process.terminal:
            inside.bind_console(rootfd, inside.Console(master or -1, final.stdio[0]))
        rootfs.seal(operations, prepared, rootfd)
        inside.enter_cwd(rootfd, spec.process.cwd)
        return final, master

    def _host_hooks(self, own_pid: bool) -> None:
        for stage in ("prestart", "createRuntime"):
            if not hooks.of_stage(self.spec, stage):
                continue
            pid = self.job.context.slots.pid(self.job.slot) if own_pid else os.getpid()
            self.channel.send({"hooks": stage, "pid": pid})
            answer = self.channel.receive()
            if answer is None:
                os._exit(1)
            if answer.get("hooks") != "ok":
                raise Failure.from_json(answer.get("error", {"phase": "hook", "operation": stage}))

    def _announce(self, pid: int, final: Final, master: int | None) -> None:
        fds = {f"oom{i}": fd for i, fd in enumerate(self.oom_fds)}
        if master is not None:
            fds["console"] = master
        if not pid and not final.listened:
            fds["report"] = self.channel.report()
        user = codec.to_json(final.user)
        later = [stage for stage in ("poststart", "poststop") if hooks.of_stage(self.spec, stage)]
        facts = {"pid": pid, "user": user, "cgroup": self.group.to_json(), "hooks": later, "pinned": self._pins_itself, "fds": list(fds)}
        self.channel.send({"ok": facts}, tuple(fds.values()))
        final.close_others(self.channel)

    def _await_start(self, final: Final) -> None:
        """Block until start; a supervisor that is gone can not start us any more (its successor reports the container dead)."""
        gc.disable()
        answer = self.channel.receive()
        if answer is None:
            os._exit(128 + signal.SIGKILL)
        hooks.run_all(hooks.of_stage(self.spec, "startContainer"), hooks.state(self.spec, self.job.id, "created", 0, self.job.bundle_path))


def open_stdio(bundle: int, stdin_once: bool) -> tuple[int, int, int]:
    """The container's ends of its FIFOs, /dev/null where there is no stdin.

    Open for reading and writing, so that a container outlives every reader and writer of ours: no SIGPIPE and no early end of file.
    Only stdin that closes after its first client must be able to end, and is opened for reading only.
    """
    stdout = os.open("stdout", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
    stderr = os.open("stderr", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
    try:
        if stdin_once:
            stdin = os.open("stdin", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
            os.set_blocking(stdin, True)
        else:
            stdin = os.open("stdin", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=bundle)
    except FileNotFoundError:
        stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    return stdin, stdout, stderr

