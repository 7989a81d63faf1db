"""Helpers that wait for orders, see ``shim.runtime.helper``: taken, given back, forked anew while nobody waits."""

from __future__ import annotations

from collections import deque

from shim.errors import Failure
from shim.runtime.context import Context
from shim.runtime.helper import Helper, Ordered
from shim.supervisor.children import Children, Job

_MOST = 1  # 3.7 MB of private memory; a second one at the same time is forked, as without helpers
_TITLE = "spare"
_PAUSE = 0.03  # s after which a helper is replaced: not while the container that it became is being made


class Helpers:
    """``take`` one, ``send`` it a job, and ``give_back`` what can be used again."""

    def __init__(self, children: Children, context: Context) -> None:
        self._children, self._context = children, context
        self._idle: deque[Job] = deque()
        self._forking = False
        self._later()

    def take(self, job: Ordered, title: str) -> Job | None:
        """A helper that has got the order, if one is there."""
        while self._idle:
            helper = self._idle.popleft()
            helper.process.check()  # whether it has died is known before the loop comes round to telling
            if helper.over or helper.process.ended.done:
                helper.close()
                continue
            helper.title = title
            order, fds = job.order()
            helper.send({**order, "title": title}, fds)
            self._later()
            return helper
        self._later()
        return None

    def give_back(self, helper: Job) -> None:
        """After its answer. One too many goes."""
        if helper.over or len(self._idle) >= _MOST:
            helper.close()
        else:
            self._idle.appendleft(helper)

    def _later(self) -> None:
        if not self._forking:
            self._forking = True
            self._children.loop.call_later(_PAUSE, self._fill)

    def _fill(self) -> None:
        self._forking = False
        if len(self._idle) >= _MOST:
            return
        try:
            helper = self._children.fork(Helper(self._context), _TITLE)
        except Failure:
            return  # whoever needs a child forks it, and reports why that fails
        helper.helps = True
        helper.process.ended.then(lambda: self._ended(helper))
        self._idle.append(helper)
        if len(self._idle) < _MOST:
            self._later()

    def _ended(self, helper: Job) -> None:
        if helper in self._idle:
            self._idle.remove(helper)
            helper.close()
