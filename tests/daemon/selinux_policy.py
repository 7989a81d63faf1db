"""A policy that is just large enough for labels: two kinds of processes, files of containers, levels. Everything is allowed; what the
kernel refuses of itself are labels that the policy does not know."""

from __future__ import annotations

_FILES = (
    "ioctl read write create getattr setattr lock relabelfrom relabelto append map unlink link rename execute quotaon mounton audit_access "
    "open execmod watch watch_mount watch_sb watch_with_perm watch_reads"
)
_PROCESS = (
    "fork transition sigchld sigkill sigstop signull signal ptrace getsched setsched getsession getpgid setpgid getcap setcap share "
    "getattr setexec setfscreate noatsecure siginh setrlimit rlimitinh dyntransition setcurrent execmem execstack execheap setkeycreate "
    "setsockcreate getrlimit"
)
_OF_FILES = ("lnk_file", "chr_file", "blk_file", "sock_file", "fifo_file")
_VECTORS = {
    "filesystem": "mount remount unmount getattr relabelfrom relabelto associate quotamod quotaget watch",
    "fd": "use",
    "security": "load_policy setenforce",
    "key": "view read write search link setattr create",
}
_CLASSES = ("security", "process", "filesystem", "file", "dir", "fd", *_OF_FILES, "key")
# In the kernel's order; it has more, which take the label of "unlabeled".
_SIDS = (
    "kernel security unlabeled fs file file_labels init any_socket port netif netmsg node igmp_packet icmp_socket tcp_socket "
    "sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net sysctl_net_unix sysctl_vm sysctl_dev kmod policy scmp_packet devnull"
).split()
_PROCESSES, _TYPES = ("kernel_t", "container_t", "spc_t"), ("kernel_t", "container_t", "spc_t", "container_file_t", "fs_t")


def source() -> str:
    """For ``checkpolicy -M -U allow``."""
    lines = [f"class {name}" for name in _CLASSES] + [f"sid {name}" for name in _SIDS]
    lines += [f"common file {{ {_FILES} }}", f"class process {{ {_PROCESS} }}"]
    lines += ["class file inherits file { execute_no_trans entrypoint }"]
    lines += ["class dir inherits file { add_name remove_name reparent search rmdir }"]
    lines += [f"class {name} inherits file" for name in _OF_FILES]
    lines += [f"class {name} {{ {vector} }}" for name, vector in _VECTORS.items()]
    lines += ["sensitivity s0;", "dominance { s0 }", *(f"category c{i};" for i in range(1024)), "level s0:c0.c1023;"]
    # The capability: a change of label is possible in spite of no_new_privs, as it is with real policies for containers.
    lines += ["mlsconstrain process { ptrace } ( h1 dom h2 );", "policycap nnp_nosuid_transition;", *(f"type {name};" for name in _TYPES)]
    lines += [f"allow {a} {b}:{kind} *;" for a in _PROCESSES for b in _TYPES for kind in _CLASSES]
    lines += [f"allow {a} {b}:filesystem associate;" for a in ("container_file_t", "fs_t") for b in ("container_file_t", "fs_t")]
    lines += ["role system_r;", f"role system_r types {{ {' '.join(_PROCESSES)} }};"]
    lines += ["user system_u roles { system_r } level s0 range s0 - s0:c0.c1023;"]
    lines += [f"sid {s} system_u:{'system_r:kernel_t' if s in ('kernel', 'init') else 'object_r:fs_t'}:s0" for s in _SIDS]
    lines += [f"fs_use_xattr {name} system_u:object_r:fs_t:s0;" for name in ("ext4", "xfs", "overlay")]
    lines += [f"fs_use_trans {name} system_u:object_r:fs_t:s0;" for name in ("tmpfs", "devpts", "devtmpfs", "mqueue", "shm")]
    lines += [f"fs_use_task {name} system_u:object_r:fs_t:s0;" for name in ("pipefs", "sockfs")]
    kernel = ("proc", "sysfs", "selinuxfs", "cgroup2", "cgroup", "9p", "rootfs", "nsfs", "securityfs")
    return "\n".join([*lines, *(f"genfscon {name} / system_u:object_r:fs_t:s0" for name in kernel)]) + "\n"
