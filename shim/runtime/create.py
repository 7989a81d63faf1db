"""Creating a container: stage1 on the host's side, and the container's first process.

Stage1 makes the cgroup, turns host paths into detached mounts, joins the pod's namespaces and puts the root together. With a PID namespace
of its own the first process is forked early and waits in it as PID 1 (``init``): stage1 itself never enters a PID namespace, and goes when
everything but start is done. With a PID namespace that others live in, stage1 restricts itself and forks last, at start (``final``).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import NoReturn

from shim import lsm
from shim.cgroups import manager as cgroups
from shim.cgroups import oom
from shim.cgroups.group import Group
from shim.errors import Failure
from shim.linux import libc, mount, process
from shim.oci import bundle as bundles
from shim.oci import codec, validate
from shim.oci.bundle import Recipe
from shim.oci.spec import NamespaceType, Process, Spec, User
from shim.rootfs import ops as rootfs
from shim.rootfs import plan as rootfs_plan
from shim.runtime import hooks, inside, kept, launch, listener, namespaces, pins, podfiles, sysctl
from shim.runtime.channel import Channel
from shim.runtime.context import Context, PodHandles
from shim.runtime.final import Final
from shim.runtime.hooks_outside import Order, Outside
from shim.runtime.init import Birth, Init
from shim.runtime.namespaces import PidMode


@dataclass(frozen=True, slots=True)
class Container:
    """The job of ``container.create``; see the protocol in ``launch`` and ARCHITECTURE §4. After its answer the supervisor talks to the
    container over ``line``: start, and what became of it."""

    context: Context
    id: str
    bundle: int  # directory fd
    bundle_path: str
    pod: PodHandles
    slot: int
    line: int  # the container's end of a socket pair
    target: int | None = None  # pidfd or PID namespace fd of the container whose PID namespace is joined
    stdin_once: bool = False

    @property
    def keep(self) -> Collection[int]:
        fds = {self.bundle, self.line, *self.context.fds(), *self.pod.named().values()}
        return fds if self.target is None else fds | {self.target}

    def order(self) -> tuple[dict[str, object], tuple[int, ...]]:
        """For a helper."""
        pod = self.pod.named()
        fds = (self.bundle, self.line, *pod.values(), *(() if self.target is None else (self.target,)))
        names = {"id": self.id, "path": self.bundle_path, "pod": list(pod), "slot": self.slot, "stdin_once": self.stdin_once}
        return {"job": "container", **names}, fds

    def again(self, facts: dict[str, object]) -> bool:
        return bool(facts["again"])

    def __call__(self, channel: Channel) -> None:
        launch.die_with_supervisor()
        process.reset_inherited(self.context.inherited, join_keyring=False)
        self.make(channel)

    def make(self, channel: Channel) -> bool:
        """Create it and answer. Whether this process, which has shed what it inherited, can make another one, once it is back in the
        host's namespaces."""
        proc = None if self.target is None else namespaces.proc_from(self.target, self.context.host_mntns, self.context.proc)
        spec, recipe = bundles.load_spec(self.bundle), bundles.load_recipe(self.bundle)
        validate.validate(spec)
        line = Channel(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=self.line))
        try:
            return Stage1(self, channel, line, spec, recipe, proc).run()
        finally:
            line.close()


@dataclass(slots=True)
class Stage1:
    job: Container
    channel: Channel
    line: Channel
    spec: Spec
    recipe: Recipe
    proc: int | None
    making: cgroups.Making = field(init=False)
    group: Group = field(init=False)
    oom_fds: list[int] = field(init=False)
    kept_fd: int = field(init=False)
    operations: tuple[rootfs_plan.Op, ...] = field(init=False)
    prepared: rootfs.Prepared = field(init=False)
    stdio: tuple[int, int, int] | None = None
    user: int | None = None  # the pod's user namespace
    hooks_outside: Outside | None = None

    def run(self) -> bool:
        spec, context = self.spec, self.job.context
        kept_ = kept.compile_filter(spec, context.seccomp_cache)
        own_pids = namespaces.pid_mode(spec) is PidMode.NEW
        if kept_.notifies and not own_pids:
            listener.go_on_in_child(self.line)
        self.stdio = None if spec.process.terminal else open_stdio(self.job.bundle, self.job.stdin_once)
        self.making = cgroups.begin(context.layout, spec.linux.cgroups_path, spec.linux.resources)
        self.channel.note("cgroup", self.making.group.to_json())  # so that a failure names what there is to remove
        self.user = namespaces.user_namespace(spec, self.job.pod)
        if kept_.root is not None:
            inside.raise_hard_limits(spec.process)
            if self.stdio is not None:
                inside.give_stdio(self.stdio, kept_.root)
        self.kept_fd = kept.create(self.job.bundle)
        shm = self._pod_mounts()
        self.group = self.making.group
        paths = self.group.paths if self.group.version == 1 else {}
        self.operations = rootfs_plan.plan(spec, self.recipe, cgroup_version=self.group.version, cgroup_paths=paths)
        if paths:
            self.making.finish()  # the container's mounts may be of its directories
        files = podfiles.clones(
            (m.source for m in spec.mounts if m.source.startswith(podfiles.PREFIX)), self.job.pod.mount, context.host_mntns
        )
        self.prepared = rootfs.prepare(self.operations, self.recipe, shm_fd=shm, files=files, userns_fd=self.user)
        self.making.finish()
        self.oom_fds = oom.watch(self.group)
        if kept_.root is not None and any(m.type == "cgroup" and "ro" not in m.options for m in spec.mounts):
            cgroups.delegate(self.group, *kept_.root)
        if own_pids:
            return self._with_init(kept_)
        self._alone(kept_)

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

    def _enter_namespaces(self, root: tuple[int, int] | None) -> None:
        """All of the container's but PID and cgroup. From here on no host path can be reached."""
        spec, job = self.spec, self.job
        if root is not None and hooks.of_stage(spec, "createContainer"):
            shared = namespaces.shared(spec, job.pod)
            self.hooks_outside = Outside(Order(spec, job.id, job.bundle_path, root, job.context.host_mntns, shared))
        namespaces.join(spec, job.pod, job.target)
        namespaces.new_mount_namespace(job.pod.mount, self.user)
        if self.user is not None:
            launch.ids_changed()

    # ---- with a PID namespace of its own

    def _with_init(self, kept_: kept.Kept) -> bool:
        spec, slot = self.spec, self.job.slot
        held = bool(hooks.of_stage(spec, "startContainer"))
        again = spec.hooks is None and self.user is None and not namespaces.own_time(spec)
        birth, members = self._birth(kept_)
        init = Init(birth)
        try:
            pid = self.job.context.slots.pid(slot)

            def mounted() -> None:
                self.prepared.mounts.update(zip(members, init.mounts(), strict=True))
                self.making.release()  # it is in the cgroup

            rootfd, process_, home = self._root(kept_, pid, mounted)
            console = self._stdio_of(process_, rootfd)
            rootfs.seal(self.operations, self.prepared, rootfd)
            cwd = inside.enter_cwd(rootfd, process_.cwd)
            init.finish(process_, home, cwd, console.slave if console else None, kept_.bpf, kept_.flags, held=held)
            pinned = not held and self._pin(init.pidfd)
            self._announce(pid, process_.user, console.master if console else None, pinned=pinned, again=again)
            if held:
                self._hold(init)
        finally:
            init.close()
        return again

    def _birth(self, kept_: kept.Kept) -> tuple[Birth, list[int]]:
        """What the first process is born with, and the operations that only it can do. Enters the namespaces.

        It joins the cgroup itself, so that nothing of ours is charged to the container, and sets its OOM score. But the right to write to
        these is the host's, and gone in a user namespace: then we do it first, for both.
        """
        spec = self.spec
        tasks: list[int] = []
        group = None
        if self.user is None:
            tasks, group = cgroups.open_tasks(self.group), cgroups.open_dir(self.group)
        else:
            self._join_for_good()
        self._enter_namespaces(kept_.root)
        if spec.hooks is not None:
            libc.unshare(libc.CLONE_NEWPID)  # now, because hooks are forked into it, too
        own_cgroup = namespaces.own_cgroup(spec)
        kinds = ("proc", "cgroup2") if own_cgroup else ("proc",)
        members = [i for i, op in enumerate(self.operations) if isinstance(op, rootfs_plan.Filesystem) and op.fstype in kinds]
        filesystems = [op for op in self.operations if isinstance(op, rootfs_plan.Filesystem) and op.fstype in kinds]
        return Birth(
            self.job.context, spec.process, self.stdio, self.line.fileno(), self.job.slot, tasks, group,
            own_cgroup, self.user is not None, spec.hooks is None, filesystems
        ), members  # fmt: skip

    def _stdio_of(self, process_: Process, rootfd: int) -> inside.Console | None:
        """The FIFOs become the user's; or there is a terminal."""
        if self.stdio is not None:
            inside.own_stdio(self.stdio, process_.user)
            return None
        console = inside.open_console(rootfd, process_.console_size, process_.user)
        inside.bind_console(rootfd, console)
        return console

    def _pin(self, pidfd: int) -> bool:
        """Not where all privileges are gone, or hooks are still to run: then the supervisor has it pinned once it runs. Leaves the
        container's mount namespace."""
        if self.job.context.pins is None or self.user is not None:
            return False
        pins.pin(self.job.context.pins, self.job.id, pidfd)
        return True

    def _hold(self, init: Init) -> None:
        """Run the hooks of start while the first process waits for us, and not for the supervisor."""
        try:
            self._await_start()
            init.release()
        except BaseException as error:
            launch.report(self.line, error)

    # ---- in a PID namespace that others live in

    def _alone(self, kept_: kept.Kept) -> NoReturn:
        self._join_for_good()
        self._enter_namespaces(kept_.root)
        if namespaces.own_cgroup(self.spec):
            libc.unshare(libc.CLONE_NEWCGROUP)
        rootfd, process_, home = self._root(kept_, os.getpid(), lambda: None)
        final, master = Final.prepare(process_, home, rootfd, self.stdio, kept_.filter())
        if master is not None:
            inside.bind_console(rootfd, inside.Console(master, final.stdio[0]))
        rootfs.seal(self.operations, self.prepared, rootfd)
        os.close(inside.enter_cwd(rootfd, process_.cwd))
        lsm.apply(self.job.context.proc, lsm.on_exec(process_))
        report = None if final.listened else self.line.report()
        self._announce(0, process_.user, master, report=report, pinned=False, again=False)
        final.close_others(self.line)
        try:
            gc.disable()
            self._await_start()
            if report is not None:
                self.line.narrow()
            final.run_in_child(self.job.context.slots.address(self.job.slot))
        except BaseException as error:
            launch.report(self.line, error)
        finally:
            os._exit(0)  # with the line open: see ``listener``

    # ---- both

    def _join_for_good(self) -> None:
        """This process becomes the container's, or what is forked from it does."""
        lsm.apply(self.job.context.proc, lsm.before_keyring(self.spec.process))
        process.new_session_keyring()
        process.set_oom_score_adj(self.job.context.proc, self.spec.process.oom_score_adj or 0)
        cgroups.join(self.group)
        self.making.release()

    def _root(self, kept_: kept.Kept, pid: int, mounted: Callable[[], None]) -> tuple[int, Process, str]:
        """Put the root together and look the user up in it: its fd, the process as it will be, the home directory. ``mounted`` fetches what
        the first process mounts meanwhile."""
        spec, job = self.spec, self.job
        self._host_hooks(pid)
        if kept_.root is not None:
            mounted()  # in a user namespace the kernel allows procfs only where one can be seen, which ends with the old root
            rootfs.make_visible(self.operations, self.prepared, proc_fd=self.proc)
        rootfd = rootfs.attach_root(self.prepared)
        if kept_.root is None:
            mounted()
        rootfs.attach(self.operations, self.prepared, rootfd, proc_fd=self.proc)
        if self.hooks_outside is not None:
            self.hooks_outside.run(rootfd)
        else:
            hooks.create_container(spec, rootfd, job.context.host_mntns, job.id, job.bundle_path)
        namespaces.set_names(spec)
        if spec.linux.sysctl:
            sysctl.apply(job.context.proc, spec.linux.sysctl)
        resolved = inside.resolve_user(spec.process, rootfd)
        kept.store(self.kept_fd, replace(kept_, home=resolved.home))
        return rootfd, replace(spec.process, user=resolved.user), resolved.home

    def _host_hooks(self, pid: int) -> None:
        for stage in ("prestart", "createRuntime"):
            if not hooks.of_stage(self.spec, stage):
                continue
            self.channel.send({"hooks": stage, "pid": pid})
            answer = self.channel.receive()
            if answer is None:
                os._exit(1)
            if answer.get("hooks") != "ok":
                raise Failure.from_json(answer.get("error", {"phase": "hook", "operation": stage}))

    def _announce(
        self, pid: int, user: User, master: int | None, *, report: int | None = None, pinned: bool, again: bool
    ) -> None:
        fds = {f"oom{i}": fd for i, fd in enumerate(self.oom_fds)}
        if master is not None:
            fds["console"] = master
        if report is not None:
            fds["report"] = report
        later = [stage for stage in ("poststart", "poststop") if hooks.of_stage(self.spec, stage)]
        facts = {"pid": pid, "user": codec.to_json(user), "cgroup": self.group.to_json(), "hooks": later, "pinned": pinned, "again": again}
        self.channel.send({"ok": {**facts, "fds": list(fds)}}, tuple(fds.values()))

    def _await_start(self) -> None:
        """Block until start; a supervisor that is gone can not start us any more (its successor reports the container dead)."""
        answer = self.line.receive()
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

