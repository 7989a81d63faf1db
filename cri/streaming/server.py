"""The streaming server: URLs that are good for one request within a minute, upgraded to SPDY or WebSocket, handed to exec, attach or
port-forward. Sessions belong to a container or a pod and end with it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final, TypeAlias

from cri.config import Streaming
from cri.errors import CriError, ResourceExhausted, StartError
from cri.streaming import portforward, remotecommand, websocket
from cri.streaming.channel_session import ChannelSession
from cri.streaming.http1 import BadRequest, Exchange, Request
from cri.streaming.portforward import Forward, Forwarder
from cri.streaming.remotecommand import CHANNELS, Command, Expected
from cri.streaming.session import Session
from cri.streaming.spdy_session import SpdySession
from cri.streaming.tokens import Tokens

SPDY: Final = "SPDY/3.1"
HANDSHAKE: Final = 30.0  # s until the request must be there
MAX_CONNECTIONS: Final = 4096
MAX_SESSIONS: Final = 256  # of one container or pod
MAX_PORTS: Final = 100  # of a port-forward over WebSocket, named in advance
_KEEPALIVE: Final = 120  # s until TCP asks whether a silent client still lives

Subject: TypeAlias = Command | Forward
log = logging.getLogger("cri.streaming")


def describe(error: Exception) -> str:
    """What a client is told. Failures of the core and errors of ours are written for users; anything else is logged, too."""
    if not isinstance(error, CriError) and not hasattr(error, "phase") and not isinstance(error, OSError):
        log.error("streaming session failed", exc_info=error)
    return str(error) or type(error).__name__


class Server:
    def __init__(self, config: Streaming) -> None:
        self._config = config
        self._tokens: Tokens[Subject] = Tokens()
        self._connections: set[Connection] = set()
        self._sessions: dict[str, set[asyncio.Task[None]]] = {}
        self._server: asyncio.Server | None = None
        self._base = ""
        self.idle_timeout = float(config.idle_timeout)
        self.session_timeout = float(config.session_timeout)

    async def start(self) -> None:
        """Listen. Raises StartError."""
        config = self._config
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Connection(self), config.address, config.port, ssl=_tls(config), reuse_address=True
            )
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"streaming: cannot listen on {config.address} port {config.port}: {error}") from error
        host = ipaddress.ip_address(config.address)
        if host.is_unspecified:  # the kubelet, who gets the URL, is on this node
            host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
        port = self._server.sockets[0].getsockname()[1]
        self._base = f"{'https' if config.tls_cert else 'http'}://{host if host.version == 4 else f'[{host}]'}:{port}"

    async def close(self) -> None:
        """End every session."""
        if self._server is not None:
            self._server.close()
        tasks = [task for tasks in self._sessions.values() for task in tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        for connection in list(self._connections):
            connection.abort()

    def url(self, subject: Subject) -> str:
        """Where a client gets what was asked for, once."""
        if len(self._sessions.get(subject.owner, ())) >= MAX_SESSIONS:
            raise ResourceExhausted(f"{subject.owner} has {MAX_SESSIONS} streaming sessions")
        return f"{self._base}/{subject.path}/{self._tokens.issue(subject)}"

    def end(self, owner: str) -> None:
        """End what a container or pod has."""
        for task in list(self._sessions.get(owner, ())):
            task.cancel()

    # ---- for connections

    def redeem(self, request: Request) -> Subject:
        """What a request's URL stands for. Raises BadRequest."""
        if request.method not in ("GET", "POST"):
            raise BadRequest(405, "GET or POST only", [("Allow", "GET, POST")])
        kind, _, token = request.path.lstrip("/").partition("/")
        subject = self._tokens.redeem(token) if kind in ("exec", "attach", "portforward") and token else None
        if subject is None or subject.path != kind:
            raise BadRequest(404, "unknown, used or expired")
        return subject

    def run(self, owner: str, serving: Coroutine[Any, Any, None]) -> None:
        """Serve a session in a task that belongs to ``owner``."""
        task = asyncio.get_running_loop().create_task(serving, name=f"streaming {owner[:12]}")
        tasks = self._sessions.setdefault(owner, set())
        tasks.add(task)
        task.add_done_callback(partial(self._ended, owner))

    def _ended(self, owner: str, task: asyncio.Task[None]) -> None:
        tasks = self._sessions[owner]
        tasks.discard(task)
        if not tasks:
            del self._sessions[owner]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("streaming session failed", exc_info=error)

    def joined(self, connection: Connection) -> bool:
        if len(self._connections) >= MAX_CONNECTIONS:
            return False
        self._connections.add(connection)
        return True

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)


def _tls(config: Streaming) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls_cert, config.tls_key)
    context.set_alpn_protocols(["http/1.1"])
    if config.client_ca:
        context.load_verify_locations(config.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Connection(asyncio.Protocol):
    """One TCP connection: its request, then its session."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = Exchange()
        self._session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._limit: asyncio.TimerHandle | None = None

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._server.joined(self):
            transport.abort()
            return
        keep_alive(transport)
        self._timer = self._loop.call_later(HANDSHAKE, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._session is not None:
            self._session.received(data)
            return
        exchange, transport = self._exchange, self._transport
        if exchange is None or transport is None:  # refused, and being closed
            return
        try:
            request = exchange.receive(data)
            if request is None:
                return
            self._upgrade(exchange, request, transport)
        except BadRequest as error:
            self._exchange = None
            transport.write(exchange.refuse(error))
            transport.close()
            return
        self._exchange = None
        if exchange.rest:
            self.data_received(exchange.rest)

    def eof_received(self) -> None:
        return  # close: nobody half-closes the connection itself

    def connection_lost(self, error: Exception | None) -> None:
        self._server.left(self)
        for timer in (self._timer, self._limit):
            if timer is not None:
                timer.cancel()
        if self._session is not None:
            self._session.connection_lost()

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.pause_writing()

    def resume_writing(self) -> None:
        if self._session is not None:
            self._session.resume_writing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _expire(self) -> None:
        """Abort a session that has had all the time there is."""
        if self._session is not None:
            log.info("streaming session ended after %g s", self._server.session_timeout)
            self._session.abort()

    def _watch_idle(self) -> None:
        """Abort a session on which nothing has moved for too long."""
        if self._session is None:
            return
        left = self._session.active + self._server.idle_timeout - self._loop.time()
        if left <= 0:
            log.info("streaming session was idle for %g s", self._server.idle_timeout)
            self._session.abort()
        else:
            self._timer = self._loop.call_later(left, self._watch_idle)

    # ---- upgrades

    def _upgrade(self, exchange: Exchange, request: Request, transport: asyncio.Transport) -> None:
        over_websocket = request.upgrades_to("websocket")
        if not over_websocket and not request.upgrades_to(SPDY):
            raise BadRequest(400, "unable to upgrade: neither SPDY/3.1 nor WebSocket is asked for")
        subject = self._server.redeem(request)
        begin = self._websocket if over_websocket else self._spdy
        self._session = begin(exchange, request, transport, subject)
        if self._timer is not None:
            self._timer.cancel()
        if self._server.idle_timeout:
            self._watch_idle()
        if self._server.session_timeout:
            self._limit = self._loop.call_later(self._server.session_timeout, self._expire)

    def _spdy(self, exchange: Exchange, request: Request, transport: asyncio.Transport, subject: Subject) -> Session:
        offered = request.all("x-stream-protocol-version")
        supported = remotecommand.SPDY_PROTOCOLS if isinstance(subject, Command) else (portforward.PROTOCOL,)
        protocol = remotecommand.spdy_protocol(offered, supported)
        headers = [("X-Stream-Protocol-Version", protocol)] if protocol else []
        transport.write(exchange.switch(SPDY, headers))
        if isinstance(subject, Forward):
            return self._forward(transport, subject, None)
        expected = Expected.of(subject.wanted, protocol)
        session = SpdySession(transport, expected.opened)
        self._server.run(subject.owner, _when_ready(session, expected, subject, as_json=protocol == "v4.channel.k8s.io"))
        return session

    def _websocket(self, exchange: Exchange, request: Request, transport: asyncio.Transport, subject: Subject) -> Session:
        offered = request.all("sec-websocket-protocol")
        tunnel = websocket.TUNNEL_PREFIX + portforward.PROTOCOL
        dialects = [name for name in websocket.DIALECTS if name]
        if isinstance(subject, Forward):
            dialects = [tunnel, *(name for name in dialects if not websocket.DIALECTS[name].ends)]
        protocol = remotecommand.choose(offered, dialects)
        if protocol is None:
            raise BadRequest(400, f"none of the subprotocols is known; there are {', '.join(dialects)}")
        headers = websocket.accept_headers(request, protocol)
        if isinstance(subject, Forward):
            if protocol == tunnel:
                transport.write(exchange.switch("websocket", headers))
                return self._forward(transport, subject, websocket.Tunnel())
            return self._forward_channels(exchange, request, transport, subject, protocol, headers)
        transport.write(exchange.switch("websocket", headers))
        dialect, names = websocket.DIALECTS[protocol], _names(subject)
        session = ChannelSession(transport, dialect, [CHANNELS[name] for name in names])
        streams = {name: session.streams[CHANNELS[name]] for name in names}
        self._server.run(subject.owner, remotecommand.serve(session, streams, subject, as_json=dialect.status, describe=describe))
        return session

    def _forward(self, transport: asyncio.Transport, subject: Forward, tunnel: websocket.Tunnel | None) -> Session:
        forwarder = Forwarder(subject.connector(), describe)
        session = SpdySession(transport, forwarder.opened, tunnel)
        self._server.run(subject.owner, portforward.serve(session, forwarder))
        return session

    def _forward_channels(
        self, exchange: Exchange, request: Request, transport: asyncio.Transport, subject: Forward, protocol: str,
        headers: list[tuple[str, str]],
    ) -> Session:  # fmt: skip
        """The older way; ports that the CRI request does not name are in the URL."""
        named = (
            value.split(",") for key, _, value in (part.partition("=") for part in request.query.split("&")) if key in ("port", "ports")
        )
        ports = subject.ports or tuple(portforward.parse_port(text) or 0 for texts in named for text in texts)
        if not 0 < len(ports) <= MAX_PORTS or 0 in ports:
            raise BadRequest(400, "a port-forward over WebSocket names its ports")
        transport.write(exchange.switch("websocket", headers))
        forwarder = Forwarder(subject.connector(), describe)
        session = ChannelSession(transport, websocket.DIALECTS[protocol], list(range(2 * len(ports))))
        portforward.serve_channels(session, ports, forwarder)
        self._server.run(subject.owner, portforward.serve(session, forwarder))
        return session


def _names(command: Command) -> list[str]:
    """Channels that a command uses."""
    wanted = command.wanted
    return ["error", "resize", *(name for name in ("stdin", "stdout", "stderr") if getattr(wanted, name))]


async def _when_ready(session: SpdySession, expected: Expected, command: Command, *, as_json: bool) -> None:
    """Wait for the client's streams, then serve."""
    ready = asyncio.ensure_future(expected.ready.wait())
    try:
        await asyncio.wait((ready, session.lost), timeout=remotecommand.CREATION_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()
    if not expected.ready.is_set():
        session.abort()
        return
    await remotecommand.serve(session, expected.streams, command, as_json=as_json, describe=describe)


def keep_alive(transport: asyncio.Transport) -> None:
    """Have the kernel find out about clients that vanished without a word, and send small pieces (keystrokes) at once."""

    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE // 4)
