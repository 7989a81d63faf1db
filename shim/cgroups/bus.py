"""systemd's manager on the system bus, for short-lived children: every call blocks, and ends by its deadline.

jeepney knows the protocol and does no input or output: it is the only thing outside the standard library that ``shim`` imports, and
only where the systemd driver is in use.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from typing import Any

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageFlag, MessageType, Parser, message_bus, new_method_call
from jeepney.auth import AuthenticationError, Authenticator
from jeepney.bus import get_connectable_addresses

from shim.errors import Failure

ADDRESS = "unix:path=/run/dbus/system_bus_socket"
TIMEOUT = 30.0  # s: a systemd that reloads many units answers nobody meanwhile
_MANAGER = DBusAddress("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
_PROPERTIES = _MANAGER.with_interface("org.freedesktop.DBus.Properties")
_SYSTEMD1 = "org.freedesktop.systemd1."
NO_SUCH_UNIT, UNIT_EXISTS = f"{_SYSTEMD1}NoSuchUnit", f"{_SYSTEMD1}UnitExists"
_HINT = "the systemd cgroup driver needs systemd as PID 1 and dbus (apt install dbus); else use the cgroupfs driver, in the kubelet too"


class Refused(Failure):
    """An error that systemd or the bus answered; ``name`` is D-Bus's."""

    def __init__(self, phase: str, operation: str, unit: str, name: str, text: str) -> None:
        super().__init__(phase, operation, path=unit, message=f"systemd: {text} ({name})")
        self.name = name


class Bus:
    """One connection. ``phase`` names what is being attempted, for errors."""

    def __init__(self, phase: str, timeout: float = TIMEOUT) -> None:
        """Connect and say hello. Raises Failure."""
        self._parser, self._serial = Parser(), 0
        self._replies: dict[int, Message] = {}
        self._jobs: deque[tuple[str, str]] = deque(maxlen=64)  # that have ended: object path and result
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._deadline, self._phase = time.monotonic() + timeout, phase
        where = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or ADDRESS
        try:
            self._settle()
            self._socket.connect(next(get_connectable_addresses(where)))
            self._authenticate()
            self._reply(self._send(message_bus.Hello()), "Hello", "")
        except (OSError, AuthenticationError, RuntimeError, ValueError) as error:
            self.close()
            number = error.errno if isinstance(error, OSError) else None
            why = "no answer" if isinstance(error, TimeoutError) else "" if number else str(error)
            raise Failure(phase, "connect to the system bus", errno=number, path=where, message=why, hint=_HINT) from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def alive(self) -> bool:
        """Whether the other end is still there, as far as can be seen without asking."""
        self._socket.settimeout(0)  # not MSG_DONTWAIT alone: with a timeout, Python waits for data before it calls recv
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def begin(self, phase: str, timeout: float = TIMEOUT) -> None:
        """What follows is for ``phase`` and has this much time."""
        self._phase, self._deadline = phase, time.monotonic() + timeout

    # ---- calls

    def call(self, member: str, signature: str, *body: Any, unit: str) -> tuple[Any, ...]:
        """A method of the manager. Raises Refused, or Failure if there is no answer."""
        return self.answer(self.ask(member, signature, *body), member, unit)

    def ask(self, member: str, signature: str, *body: Any) -> int:
        """Send a call, and go on; ``answer`` takes the number that is returned. Raises OSError if the connection is gone."""
        return self._send(new_method_call(_MANAGER, member, signature, body))

    def answer(self, serial: int, member: str, unit: str) -> tuple[Any, ...]:
        try:
            return self._reply(serial, member, unit)
        except OSError as error:
            raise self._lost(error, member, unit) from None

    def property(self, name: str) -> Any:
        """Of the manager itself."""
        serial = self._send(new_method_call(_PROPERTIES, "Get", "ss", (_MANAGER.interface, name)))
        return self.answer(serial, f"Get {name}", "")[0][1]

    def follow(self, unit: str) -> None:
        """From now on hear of the unit's jobs. The bus handles this before what is sent next, so no answer has to be waited for."""
        self._send(message_bus.AddMatch(_rule(unit)), no_reply=True)

    def unfollow(self, unit: str) -> None:
        self._jobs.clear()
        self._send(message_bus.RemoveMatch(_rule(unit)), no_reply=True)

    def job(self, path: str, member: str, unit: str) -> str:
        """Wait for a job that ``follow`` lets us hear of; its result, "done" for success."""
        try:
            while True:
                for ended, result in self._jobs:
                    if ended == path:
                        return result
                self._receive()
        except OSError as error:
            raise self._lost(error, member, unit) from None

    def _lost(self, error: OSError, member: str, unit: str) -> Failure:
        if isinstance(error, TimeoutError):
            said = "systemd does not answer"
            return Failure(self._phase, member, errno=errno.ETIMEDOUT, path=unit, message=said, hint="see systemctl list-jobs")
        return Failure(self._phase, member, errno=error.errno, path=unit, message="the connection to the system bus broke", hint=_HINT)

    # ---- messages

    def _send(self, message: Message, *, no_reply: bool = False) -> int:
        self._serial += 1
        if no_reply:
            message.header.flags |= MessageFlag.no_reply_expected
        self._settle()
        self._socket.sendall(message.serialise(serial=self._serial))
        return self._serial

    def _reply(self, serial: int, member: str, unit: str) -> tuple[Any, ...]:
        while serial not in self._replies:
            self._receive()
        message = self._replies.pop(serial)
        if message.header.message_type is MessageType.error:
            name = message.header.fields.get(HeaderFields.error_name, "error")
            text = message.body[0] if message.body and isinstance(message.body[0], str) else "refused"
            raise Refused(self._phase, member, unit, name, text)
        return tuple(message.body)

    def _receive(self) -> None:
        """Read once and sort what came."""
        self._settle()
        for message in self._parser.feed(self._read()):
            fields = message.header.fields
            if message.header.message_type is MessageType.signal:
                if fields.get(HeaderFields.member) == "JobRemoved" and fields.get(HeaderFields.interface) == _MANAGER.interface:
                    self._jobs.append((message.body[1], message.body[3]))
            elif HeaderFields.reply_serial in fields:
                self._replies[fields[HeaderFields.reply_serial]] = message

    def _read(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return data

    def _settle(self) -> None:
        """The socket waits until the deadline, and no longer."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _authenticate(self) -> None:
        """SASL EXTERNAL: the bus takes our user from the socket."""
        talk = Authenticator()
        for line in talk:
            if line:
                self._socket.sendall(line)
            if not talk.authenticated:
                self._settle()
                talk.feed(self._read())
        self._socket.sendall(b"BEGIN\r\n")


def _rule(unit: str) -> MatchRule:
    rule = MatchRule(
        type="signal", sender=_MANAGER.bus_name, interface=_MANAGER.interface, member="JobRemoved", path=_MANAGER.object_path
    )
    rule.add_arg_condition(2, unit)
    return rule
