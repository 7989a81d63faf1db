"""RuntimeDefault: what a container may ask of the kernel when its pod does not say otherwise.

An allow-list; everything else is EPERM, so a program learns that it may not instead of dying. A system call is on it unless it
reaches beyond the container's namespaces, is mostly attack surface (io_uring, userfaultfd, keyrings, bpf, perf), or changes the
machine. What a capability is for is allowed together with that capability. The set agrees with what the peers allow, so a workload
that runs there runs here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

from shim.oci.spec import Seccomp, SeccompArg, SeccompRule

_ALLOW, _ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
_ENOSYS, _EPERM = 38, 1

# By purpose. Names of every architecture together: one that an architecture lacks is passed over when the filter is compiled.
_FREE: dict[str, str] = {
    "data through descriptors": """
        read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek sendfile sendfile64 splice tee vmsplice
        copy_file_range readahead fadvise64 fadvise64_64 arm_fadvise64_64 cachestat fallocate ftruncate ftruncate64 truncate truncate64
        fsync fdatasync sync syncfs sync_file_range sync_file_range2 arm_sync_file_range flock io_setup io_submit io_getevents
        io_pgetevents io_pgetevents_time64 io_cancel io_destroy
    """,
    "descriptors": """
        open openat openat2 creat close close_range dup dup2 dup3 fcntl fcntl64 ioctl pipe pipe2 memfd_create memfd_secret eventfd eventfd2
        signalfd signalfd4 timerfd timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 pidfd_open
        pidfd_send_signal name_to_handle_at inotify_init inotify_init1 inotify_add_watch inotify_rm_watch fanotify_mark
    """,
    "waiting on descriptors": """
        select _newselect pselect6 pselect6_time64 poll ppoll ppoll_time64 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait
        epoll_wait_old epoll_pwait epoll_pwait2
    """,
    "names": """
        mkdir mkdirat mknod mknodat rmdir link linkat symlink symlinkat unlink unlinkat rename renameat renameat2 readlink readlinkat
        getcwd chdir fchdir getdents getdents64 umask
    """,
    "attributes of files": """
        access faccessat faccessat2 stat stat64 lstat lstat64 fstat fstat64 fstatat64 newfstatat statx statfs statfs64 fstatfs
        fstatfs64 listmount statmount chmod fchmod fchmodat fchmodat2 chown chown32 lchown lchown32 fchown fchown32 fchownat utime utimes
        futimesat utimensat utimensat_time64 getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat listxattr
        llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat file_getattr file_setattr
    """,
    "memory": """
        brk mmap mmap2 munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall munlock munlockall remap_file_pages membarrier
        pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack process_mrelease
    """,
    "programs and processes": """
        fork vfork execve execveat exit exit_group wait4 waitid waitpid getpid getppid gettid getpgid getpgrp setpgid getsid setsid
        set_tid_address set_robust_list get_robust_list set_thread_area get_thread_area rseq prctl seccomp restart_syscall
        landlock_create_ruleset landlock_add_rule landlock_restrict_self ptrace process_vm_readv process_vm_writev
    """,
    "scheduling and limits": """
        sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam sched_getscheduler
        sched_setscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_rr_get_interval_time64 getpriority
        setpriority nice ioprio_get ioprio_set getrlimit ugetrlimit setrlimit prlimit64 getrusage times getcpu
    """,
    "signals": """
        kill tkill tgkill pause alarm sigaltstack signal sigaction sigpending sigprocmask sigreturn sigsuspend rt_sigaction rt_sigpending
        rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    """,
    "identity": """
        getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32 getresgid getresgid32 getgroups
        getgroups32
        setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32 setresuid setresuid32 setresgid setresgid32 setfsuid
        setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capget capset
    """,
    "clocks and timers": """
        time gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 nanosleep clock_nanosleep clock_nanosleep_time64
        adjtimex clock_adjtime clock_adjtime64 getitimer setitimer timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64
        timer_settime timer_settime64
    """,  # the adjtime calls only read without CAP_SYS_TIME
    "locks": "futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue",
    "System V and POSIX messages": """
        ipc msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget mq_open mq_unlink
        mq_notify mq_getsetattr mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64
    """,
    # socketcall hides its arguments behind a pointer, so it could make what the rules for socket() refuse. Older 32-bit programs know no
    # other way to the network, and only an LSM can tell: allowed, as in the peers.
    "sockets": """
        socketpair socketcall bind connect listen accept accept4 getsockname getpeername getsockopt setsockopt shutdown send sendto sendmsg
        sendmmsg recv recvfrom recvmsg recvmmsg recvmmsg_time64
    """,
    "the machine, read only": "uname sysinfo getrandom",
}

_ARCHITECTURE: dict[str, str] = {
    "x86_64": "arch_prctl modify_ldt uretprobe",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
}

# What each capability is for. The kernel asks for the capability too; without it the system call is only attack surface.
_WITH_CAPABILITY: dict[str, str] = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": """
        bpf fanotify_init fsconfig fsmount fsopen fspick listns lookup_dcookie lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount
        mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount
        umount2 clone clone3 unshare
    """,
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}

# 32-bit programs run; x32 does not: hardly a kernel has it switched on, and where it is nobody uses it.
_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}

# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET; a time namespace cannot be asked for through clone(2).
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

# personality(2): Linux, BSD-style "uname 2.6", and asking without changing. Others turn off address randomisation or mmap limits.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

# Socket families that are refused: AF_ALG (38: "copy fail", CVE-2026-31431), AF_VSOCK (40, reaches the hypervisor), and those whose
# protocols the kernel has dropped or nothing in a container speaks: DECnet, ECONET, ATMSVC, IrDA, WANPIPE, ISDN, CAIF.
_NO_FAMILY = frozenset((12, 19, 20, 23, 25, 34, 37, 38, 40))
_FAMILIES = frozenset(range(46)) - _NO_FAMILY  # 46 is AF_MAX of today; what comes later is judged when it does


def _blocks(values: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(mask, value) pairs that together match exactly ``values`` among all 32-bit numbers.

    Masks and not comparisons, because libseccomp compares 64 bits where the kernel takes an int: "greater than 40" is true for 38 with
    a bit set in the half that is then ignored.
    """
    left = set(values)
    while left:
        first, size = min(left), 1
        while first % (size * 2) == 0 and left >= set(range(first, first + size * 2)):
            size *= 2
        left -= set(range(first, first + size))
        yield 0xFFFFFFFF & ~(size - 1), first


# All that the profile depends on beside its arguments, for the key of compiled filters.
DIGEST = hashlib.sha256(
    repr((_FREE, _ARCHITECTURE, _WITH_CAPABILITY, _ARCHITECTURES, _NAMESPACES, _PERSONALITIES, sorted(_FAMILIES))).encode()
).hexdigest()


def relevant(caps: Collection[str]) -> tuple[str, ...]:
    """Those of ``caps`` that change the profile: containers that differ in others share one filter."""
    return tuple(sorted(_WITH_CAPABILITY.keys() & set(caps)))


def default(caps: Collection[str], arch: str) -> Seccomp:
    """The profile for a container that starts with the capabilities ``caps``; ``arch`` as uname -m has it."""
    return Seccomp(
        default_action=_ERRNO,
        default_errno_ret=_EPERM,
        architectures=_ARCHITECTURES[arch],
        syscalls=tuple(_rules(relevant(caps), arch)),
    )


def _rules(caps: tuple[str, ...], arch: str) -> Iterator[SeccompRule]:
    names = dict.fromkeys(name for group in _FREE.values() for name in group.split())
    names.update(dict.fromkeys(_ARCHITECTURE[arch].split()))
    for capability in caps:
        names.update(dict.fromkeys(_WITH_CAPABILITY[capability].split()))
    yield SeccompRule(tuple(names), _ALLOW)
    if "clone" not in names:
        yield SeccompRule(("clone",), _ALLOW, args=(SeccompArg(0, _NAMESPACES, "SCMP_CMP_MASKED_EQ", 0),))
        # Its flags are behind a pointer. ENOSYS makes the C libraries fall back to clone(2), whose flags can be judged.
        yield SeccompRule(("clone3",), _ERRNO, errno_ret=_ENOSYS)
    for persona in _PERSONALITIES:
        yield SeccompRule(("personality",), _ALLOW, args=(SeccompArg(0, persona, "SCMP_CMP_EQ"),))
    for mask, value in _blocks(_FAMILIES):
        yield SeccompRule(("socket",), _ALLOW, args=(SeccompArg(0, mask, "SCMP_CMP_MASKED_EQ", value),))
