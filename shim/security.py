"""The last steps before execve as a checked table: which restriction is put on when, and why in that order.

Without no_new_privs a filter needs CAP_SYS_ADMIN, so it goes on first and must let prctl, set*id and capset through. With it, the
filter goes on last and need allow execve only. Neither order opens, allocates or imports anything once the filter is on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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


class Restriction:
    """Everything that makes the child the container's user, computed before the filter is on. ``apply`` may be called once.

    The inheritable set is empty whatever was asked (CVE-2022-24769, CVE-2022-29162) but for what an ambient capability needs,
    and the ambient set is exactly the one asked for (CVE-2018-1000400).
    """

    def __init__(self, process: Process, filter_: Filter | None) -> None:
        wanted = process.capabilities or Capabilities()
        self._uid, self._gid = process.user.uid, process.user.gid
        self._groups = list(dict.fromkeys((process.user.gid, *process.user.additional_gids)))
        # What this machine's root lacks itself (CAP_SYS_RESOURCE in some virtual machines) cannot be given; runc leaves it out too.
        available = libc.capget()[1]
        self._bounding = caps.mask(wanted.bounding) & available
        self._ambient = caps.mask(wanted.ambient) & available
        self._permitted = caps.mask(wanted.permitted) & available
        self._effective = caps.mask(wanted.effective) & available
        self._inheritable = caps.mask(wanted.inheritable) & self._ambient
        self.filter = filter_
        self.no_new_privileges = process.no_new_privileges
        self._steps: dict[Step, Callable[[], None]] = {
            Step.NO_NEW_PRIVS: self._set_no_new_privs,
            Step.BOUNDING: self._drop_bounding,
            Step.IDS: self._become_user,
            Step.CAPABILITIES: self._set_capabilities,
            Step.SECCOMP: self._install_filter,
        }

    @property
    def order(self) -> tuple[Step, ...]:
        return WITH_NO_NEW_PRIVS if self.no_new_privileges else WITHOUT_NO_NEW_PRIVS

    def set_groups(self) -> None:
        """Supplementary groups; apart from the table because setgroups(2) is not among the calls a filter has to allow."""
        os.setgroups(self._groups)

    def apply(self) -> None:
        """All steps but a filter that belongs last: the caller forks between, see ``install_last``."""
        for step in self.order:
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
        caps.drop_bounding(self._bounding)

    def _become_user(self) -> None:
        caps.keepcaps(True)
        os.setresgid(self._gid, self._gid, self._gid)
        os.setresuid(self._uid, self._uid, self._uid)

    def _set_capabilities(self) -> None:
        caps.set_caps(self._effective, self._permitted, self._inheritable)
        caps.set_ambient(self._ambient)
        caps.keepcaps(False)
