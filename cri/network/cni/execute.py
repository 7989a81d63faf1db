"""One plugin, one execution (SPEC.md section 2): parameters in the environment, configuration on stdin, result on stdout.

A plugin runs in the daemon's network namespace, in a session of its own, with nothing of the daemon's environment. It is ended with its
process group when its time is up, because a plugin that hangs mostly hangs in one that it has started itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from cri.errors import DeadlineExceeded, Unknown
from cri.network.cni import result
from cri.network.cni.result import Refusal

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # plugins run iptables, ipset, tc…
_OUTPUT_MAX = 1 << 20
_QUOTED = 400
_DRAIN = 2.0  # seconds for output after the end: something that the plugin left in the background may hold the pipe for ever
_BUSY_TRIES, _BUSY_PAUSE = 10, 0.2


class PluginFailed(Unknown):
    """A plugin refused or broke. ``refusal`` is its error object, if it printed one."""

    def __init__(self, message: str, refusal: Refusal | None = None, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.refusal = refusal


class PluginTimeout(DeadlineExceeded):
    """A plugin did not end in its time and was killed."""


@dataclass(frozen=True, slots=True)
class Call:
    """The parameters of an execution. Empty ones stay out of the environment, but for the namespace of DEL, which may be gone."""

    command: str
    container_id: str = ""
    netns: str = ""
    interface: str = ""
    args: tuple[tuple[str, str], ...] = ()

    def environment(self, path: str) -> dict[str, str]:
        variables = {
            "CNI_CONTAINERID": self.container_id,
            "CNI_IFNAME": self.interface,
            "CNI_ARGS": ";".join(f"{k}={v}" for k, v in self.args),
        }
        if self.netns or self.container_id:
            variables["CNI_NETNS"] = self.netns
        kept = {k: v for k, v in variables.items() if v or k == "CNI_NETNS"}
        return {"PATH": _PATH, "CNI_COMMAND": self.command, "CNI_PATH": path, **kept}


class Plugins:
    """The plugins of this node: where they are, and how long one may take."""

    def __init__(self, directories: Iterable[str], timeout: float) -> None:
        self._directories = tuple(directories)
        self._timeout = timeout

    def find(self, kind: str) -> str:
        """Path of the executable: the first of the directories that has it. ``kind`` was checked to be a plain name."""
        for directory in self._directories:
            path = f"{directory}/{kind}"
            try:
                mode = os.stat(path).st_mode
            except OSError:
                continue
            if stat.S_ISREG(mode) and mode & 0o111:
                return path
        raise PluginFailed(
            f'failed to find plugin "{kind}" in path [{" ".join(self._directories)}]', hint="install it, or correct bin_dirs"
        )

    def has(self, kind: str) -> bool:
        try:
            self.find(kind)
        except PluginFailed:
            return False
        return True

    async def run(self, kind: str, call: Call, configuration: bytes, *, timeout: float | None = None) -> bytes:
        """What the plugin printed. Raises PluginFailed and PluginTimeout; their text begins with the plugin's type."""
        limit = min(timeout or self._timeout, self._timeout)
        path = self.find(kind)
        transport, execution = await _start(path, call.environment(":".join(self._directories)))
        what = f'plugin type="{kind}"'
        verb = "delete" if call.command == "DEL" else call.command.lower()
        try:
            _feed(transport, configuration)
            async with asyncio.timeout(limit):
                await asyncio.shield(execution.exited)
            await asyncio.wait([execution.closed], timeout=_DRAIN)
        except TimeoutError:
            raise PluginTimeout(f"{what} failed ({verb}): killed, it had not ended after {limit:g} s") from None
        finally:
            await _end(transport, execution)
        code, output = transport.get_returncode() or 0, bytes(execution.output)
        if code == 0 and len(output) <= _OUTPUT_MAX:
            return output
        refusal = result.refusal(output)
        why = str(refusal) if refusal is not None else _describe(code, output, bytes(execution.errors))
        raise PluginFailed(f"{what} failed ({verb}): {why}", refusal)


class _Execution(asyncio.SubprocessProtocol):
    """What comes out of a process. ``exited`` does not wait for the pipes, which asyncio's own ``Process.wait`` does in some versions."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.output, self.errors = bytearray(), bytearray()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Keep the beginning, read all."""
        into, limit = (self.output, _OUTPUT_MAX + 1) if fd == 1 else (self.errors, _QUOTED * 4)
        into += data[: limit - len(into)]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open and not self.closed.done():
            self.closed.set_result(None)

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)


async def _start(path: str, environment: dict[str, str]) -> tuple[asyncio.SubprocessTransport, _Execution]:
    loop, pipe = asyncio.get_running_loop(), asyncio.subprocess.PIPE
    for attempt in range(_BUSY_TRIES):
        try:
            return await loop.subprocess_exec(
                _Execution, path, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/", start_new_session=True
            )
        except OSError as error:
            # ETXTBSY: an installer is writing it, or a process forked meanwhile still holds the descriptor of one that was
            if error.errno != errno.ETXTBSY or attempt == _BUSY_TRIES - 1:
                name = errno.errorcode.get(error.errno or 0, str(error.errno))
                raise PluginFailed(f"plugin {path} cannot be executed: {name} ({error.strerror})") from None
        await asyncio.sleep(_BUSY_PAUSE)
    raise AssertionError("unreachable")


def _feed(transport: asyncio.SubprocessTransport, configuration: bytes) -> None:
    """Hand over stdin. A plugin need not read it; whether it did its work, its exit code says."""
    stdin = transport.get_pipe_transport(0)
    assert isinstance(stdin, asyncio.WriteTransport)
    stdin.write(configuration)
    stdin.close()


async def _end(transport: asyncio.SubprocessTransport, execution: _Execution) -> None:
    """Kill what is left of a plugin that did not end by itself, reap it, close the pipes."""
    if not execution.exited.done():
        try:
            os.killpg(transport.get_pid(), signal.SIGKILL)  # its leader is not reaped, so the number is still its
        except ProcessLookupError:
            pass
        while not execution.exited.done():
            try:
                await asyncio.shield(execution.exited)
            except asyncio.CancelledError:
                continue  # SIGKILL was sent: this ends soon
    transport.close()


def _describe(code: int, output: bytes, errors: bytes) -> str:
    """The end of a plugin that said nothing that CNI knows."""
    if code == 0:
        return f"it printed more than {_OUTPUT_MAX} bytes"
    how = f"exit status {code}" if code > 0 else f"killed by signal {-code} ({signal.Signals(-code).name})"
    said = [f"{name}: {text}" for name, data in (("stderr", errors), ("stdout", output)) if (text := _quote(data))]
    return "; ".join([f"{how} without an error message", *said])


def _quote(data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
