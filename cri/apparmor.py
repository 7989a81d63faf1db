"""The AppArmor profile that containers get by default: its text, and loading it into the kernel at the start of the daemon.

It is written without includes, so that nothing but the parser has to be installed. What it forbids is what a container that is root in the
host's user namespace must not do through procfs and sysfs, and mounting; everything else is left to capabilities, seccomp and cgroups.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

from cri.spec.security import APPARMOR_DEFAULT

PROFILE: Final = APPARMOR_DEFAULT
_PARSER = "apparmor_parser"
_PATIENCE = 30.0  # s

# Containers signal and trace each other; unconfined processes of the host (ours, the kubelet's) signal them. /proc/<pid> and /proc/sys are
# ruled by their own permissions and by the read-only mounts, apart from what is dangerous in /proc/sys.
TEXT = f"""
profile {PROFILE} flags=(attach_disconnected,mediate_deleted) {{
  network,
  capability,
  file,
  umount,
  unix,
  dbus,
  signal (receive) peer=unconfined,
  signal (send, receive) peer={PROFILE},
  ptrace (read, trace, readby, tracedby) peer={PROFILE},

  deny mount,
  deny /proc/* w,
  deny /proc/{{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}}/** w,
  deny /proc/sys/[^kn]** w,
  deny /proc/sys/kernel/{{?,??,[^s][^h][^m]**}} w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"""


def parser() -> str | None:
    """The program that compiles profiles, None where it is not installed."""
    return shutil.which(_PARSER, path="/usr/sbin:/sbin:/usr/local/sbin:/usr/bin")


def load() -> str:
    """Put ``PROFILE`` into the kernel, replacing an older text of it. Returns why that cannot be done, empty when it is there."""
    program = parser()
    if program is None:
        return f"{_PARSER} is not installed"
    try:
        # -K: no cache, -r: replace
        done = subprocess.run([program, "-Kr"], input=TEXT.encode(), capture_output=True, timeout=_PATIENCE, env={}, cwd="/", check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}"
    if done.returncode != 0:
        return f"{program}: {done.stderr.decode(errors='replace').strip()[:400]}"
    return ""
