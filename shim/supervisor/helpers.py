"""Helpers that wait for orders, see ``shim.runtime.helper``: taken, given back, forked anew while nobody waits."""

from __future__ import annotations

from collections import deque

from shim.errors import Failure
from shim.runtime.context import Context
from shim.runtime.helper import Helper, Ordered
from shim.supervisor.children import Children, Job

_REST = 1  # wait while nothing happens: 3.7 MB of private memory each
_MOST = 4  # wait while pods come and go
_TITLE = "spare"
_PAUSE = 0.03  # s after which a helper that has been used up is replaced: not while the container that it became is being made
_QUIET = 3.0  # s without an order after which there are ``_REST``


class Helpers:
    """``take`` one that has got a job, and ``give_back`` what can be used again."""

    def __init__(self, children: Children, context: Context) -> None:
        self._children, self._context = children, context
        self._idle: deque[Job] = deque()
        self._busy: set[Job] = set()
        self._filling = self._resting = self._ordered = False
        self._later()

    def take(self, job: Ordered, title: str) -> Job:
        """A helper that has got the order: one that waits, or a new one. Raises Failure."""
        self._ordered = True
        while self._idle:
            helper = self._idle.popleft()
            helper.process.check()  # whether it has died is known before the loop comes round to telling
            if not helper.over and not helper.process.ended.done:
                break
            helper.close()
        else:
            helper = self._fork(warm=False)
        helper.title = title
        order, fds = job.order()
        helper.send({**order, "title": title}, fds)
        self._busy.add(helper)
        self._later()
        return helper

    def give_back(self, helper: Job) -> None:
        """After its answer. One too many goes."""
        self._busy.discard(helper)
        if helper.over or len(self._idle) >= _MOST:
            helper.close()
        else:
            self._idle.appendleft(helper)
            self._later()

    def _fork(self, *, warm: bool) -> Job:
        helper = self._children.fork(Helper(self._context, warm), _TITLE)
        helper.helps = True
        helper.process.ended.then(lambda: self._ended(helper))
        return helper

    def _later(self) -> None:
        if not self._filling:
            self._filling = True
            self._children.loop.call_later(_PAUSE, self._fill)

    def _fill(self) -> None:
        """Fork one unless there is one or will be."""
        self._filling = False
        if not self._idle and not self._busy:
            try:
                self._idle.append(self._fork(warm=True))
            except Failure:
                return  # whoever needs a child forks it, and reports why that fails
        if len(self._idle) > _REST and not self._resting:
            self._resting, self._ordered = True, False
            self._children.loop.call_later(_QUIET, self._rest)

    def _rest(self) -> None:
        """Let go of those that nobody has needed for a while."""
        self._resting = False
        if self._ordered:
            self._later()
            return
        while len(self._idle) > _REST:
            self._idle.pop().close()

    def _ended(self, helper: Job) -> None:
        self._busy.discard(helper)
        if helper in self._idle:
            self._idle.remove(helper)
            helper.close()
        self._later()
