"""The last steps before execve as a checked table: which restriction is put on when, and why in that order.

Without no_new_privs a filter needs CAP_SYS_ADMIN, so it goes on first and must let prctl, set*id and capset through. With it, the
filter goes on last and need allow execve only. Neither order opens, allocates or imports anything once the filter is on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from shim.errors import Failure
from shim.linux import caps, libc
from shim.oci.spec import Capabilities, Process
from shim.seccomp import Filter


class Step(Enum):
    NO_NEW_PRIVS = auto()
    BOUNDING = auto()
    IDS = auto()
    CAPABILITIES = auto()
    SECCOMP = auto()


WITHOUT_NO_NEW_PRIVS = (Step.SECCOMP, Step.BOUNDING, Step.IDS, Step.CAPABILITIES)
WITH_NO_NEW_PRIVS = (Step.NO_NEW_PRIVS, Step.BOUNDING, Step.IDS, Step.CAPABILITIES, Step.SECCOMP)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What makes a process the container's user, as numbers and bit masks.

    The inheritable set is empty whatever was asked (CVE-2022-24769, CVE-2022-29162) but for what an ambient capability needs,
    and the ambient set is exactly the one asked for (CVE-2018-1000400). The primary group is among the groups (CVE-2022-36109).
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    bounding: int
    permitted: int
    effective: int
    ambient: int
    inheritable: int
    no_new_privileges: bool

    @classmethod
    def of(cls, process: Process) -> Credentials:
        wanted = process.capabilities or Capabilities()
        # What this machine's root lacks itself (CAP_SYS_RESOURCE in some virtual machines) cannot be given; runc leaves it out too.
        available = libc.capget()[1]
        ambient = caps.mask(wanted.ambient) & available
        return cls(
            process.user.uid,
            process.user.gid,
            tuple(dict.fromkeys((process.user.gid, *process.user.additional_gids))),
            caps.mask(wanted.bounding) & available,
            caps.mask(wanted.permitted) & available,
            caps.mask(wanted.effective) & available,
            ambient,
            caps.mask(wanted.inheritable) & ambient,
            process.no_new_privileges,
        )

    @property
    def order(self) -> tuple[Step, ...]:
        return WITH_NO_NEW_PRIVS if self.no_new_privileges else WITHOUT_NO_NEW_PRIVS


class Restriction:
    """Puts ``Credentials`` and a filter on this process. Everything is computed before the filter is on; ``apply`` may be called once."""

    def __init__(self, process: Process, filter_: Filter | None) -> None:
        self._own = Credentials.of(process)
        self.filter = filter_
        self.no_new_privileges = process.no_new_privileges
        self._steps: dict[Step, Callable[[], None]] = {
            Step.NO_NEW_PRIVS: self._set_no_new_privs,
            Step.BOUNDING: self._drop_bounding,
            Step.IDS: self._become_user,
            Step.CAPABILITIES: self._set_capabilities,
            Step.SECCOMP: self._install_filter,
        }

    def set_groups(self) -> None:
        """Supplementary groups; apart from the table because setgroups(2) is not among the calls a filter has to allow."""
        os.setgroups(self._own.groups)

    def apply(self) -> None:
        """All steps but a filter that belongs last: the caller forks between, see ``install_last``."""
        for step in self._own.order:
            if step is Step.SECCOMP and self.no_new_privileges:
                return
            try:
                self._steps[step]()
            except OSError as error:
                raise Failure.wrap("restrict", step.name.lower(), error) from None

    def install_last(self) -> None:
        """The filter, where no_new_privs put it at the end; else nothing."""
        if self.no_new_privileges:
            self._install_filter()

    def _install_filter(self) -> None:
        if self.filter is not None:
            self.filter.install()

    def _set_no_new_privs(self) -> None:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)

    def _drop_bounding(self) -> None:
        caps.drop_bounding(self._own.bounding)

    def _become_user(self) -> None:
        caps.keepcaps(True)
        os.setresgid(*(self._own.gid,) * 3)
        os.setresuid(*(self._own.uid,) * 3)

    def _set_capabilities(self) -> None:
        caps.set_caps(self._own.effective, self._own.permitted, self._own.inheritable)
        caps.set_ambient(self._own.ambient)
        caps.keepcaps(False)
