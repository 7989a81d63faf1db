"""A SPDY/3.1 connection as a machine: bytes in, events out, bytes out (``take``). It does no I/O and knows no clock.

What the only peers there are do, moby/spdystream below kubectl, crictl, kubelet and API server, decides where the draft leaves room
or is not followed by them:
- They neither grant nor heed windows. So windows count from the moment a peer shows that it uses them (SETTINGS or WINDOW_UPDATE), and
  until then what slows a sender down is TCP.
- Data for a stream that is over is dropped without an answer: it was on its way when the stream was reset.
- A ping is answered if its number is the peer's kind, odd from clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, TypeAlias

from cri.streaming import spdy_frames as frames
from cri.streaming.spdy_frames import Control, Data, GoAway, Headers, ProtocolError, Status, Type

MAX_STREAMS: Final = 2000  # open at once: port-forward takes two for each of its connections
MAX_COMPLAINTS: Final = 1000  # resets in answer to what makes no sense, before the connection is given up
WINDOW: Final = 64 * 1024  # bytes, the draft's initial window of a stream and of the session
MAX_WINDOW: Final = 0x7FFFFFFF
INITIAL_WINDOW_SIZE: Final = 7  # number of a setting


class Role(Enum):
    """Which side opens odd streams."""

    CLIENT = 1
    SERVER = 2


class State(Enum):
    REQUESTED = auto()  # theirs, not answered yet
    REQUESTED_ENDED = auto()  # and they have ended already
    WAITING = auto()  # ours, not answered yet
    WAITING_ENDED = auto()
    OPEN = auto()
    LOCAL_ENDED = auto()
    REMOTE_ENDED = auto()
    CLOSED = auto()


class Step(Enum):
    SEND_REPLY = auto()
    SEND_DATA = auto()
    SEND_FIN = auto()
    RECEIVE_REPLY = auto()
    RECEIVE_DATA = auto()
    RECEIVE_FIN = auto()


#: A reset, sent or received, closes from everywhere. Steps that are missing are errors: ours raise, theirs reset the stream.
TRANSITIONS: Final[dict[State, dict[Step, State]]] = {
    State.REQUESTED: {
        Step.SEND_REPLY: State.OPEN,
        Step.RECEIVE_DATA: State.REQUESTED,
        Step.RECEIVE_FIN: State.REQUESTED_ENDED,
    },
    State.REQUESTED_ENDED: {Step.SEND_REPLY: State.REMOTE_ENDED},
    State.WAITING: {Step.RECEIVE_REPLY: State.OPEN, Step.SEND_DATA: State.WAITING, Step.SEND_FIN: State.WAITING_ENDED},
    State.WAITING_ENDED: {Step.RECEIVE_REPLY: State.LOCAL_ENDED},
    State.OPEN: {
        Step.SEND_DATA: State.OPEN,
        Step.SEND_FIN: State.LOCAL_ENDED,
        Step.RECEIVE_DATA: State.OPEN,
        Step.RECEIVE_FIN: State.REMOTE_ENDED,
    },
    State.LOCAL_ENDED: {Step.RECEIVE_DATA: State.LOCAL_ENDED, Step.RECEIVE_FIN: State.CLOSED},
    State.REMOTE_ENDED: {Step.SEND_DATA: State.REMOTE_ENDED, Step.SEND_FIN: State.CLOSED},
    State.CLOSED: {},
}


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer asks for a stream: ``reply`` or ``reset`` it."""

    stream_id: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Replied:
    stream_id: int
    headers: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Received:
    """Bytes; tell ``consumed`` when they have left our buffers."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer will send no more on this stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The stream is over; ``status`` is the peer's, or ours for a peer that broke the rules."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Writable:
    """What was held back for want of a window has been sent."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no more streams and accepts none after ``last_stream_id``."""

    last_stream_id: int
    status: int


Event: TypeAlias = Opened | Replied | Received | Ended | Reset | Writable | Pong | GoneAway


@dataclass(slots=True)
class _Stream:
    id: int
    state: State
    window: int  # bytes that may still be sent, once windows count
    consumed: int = 0  # bytes since the last grant
    held: bytearray = field(default_factory=bytearray)
    held_fin: bool = False


class Connection:
    """One end. After a ProtocolError, send what ``take`` gives and close."""

    def __init__(self, role: Role, *, max_streams: int = MAX_STREAMS) -> None:
        self._role, self._max_streams = role, max_streams
        self._reader, self._writer = frames.Reader(), frames.Writer()
        self._out: list[bytes] = []
        self._streams: dict[int, _Stream] = {}
        self._next = 1 if role is Role.CLIENT else 2
        self._next_ping = self._next
        self._last = 0  # highest id that the peer opened
        self._complaints = 0
        self._closing = self.gone_away = False  # GOAWAY sent, received
        self._windows = False
        self._initial_window = self._session_window = WINDOW
        self._session_consumed = 0

    # ---- what we do

    def take(self) -> bytes:
        """What is to be sent now."""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def open(self, headers: Headers, *, fin: bool = False) -> int:
        """Ask for a stream."""
        if self.gone_away or self._closing or self._next > frames.MAX_STREAM_ID:
            raise ValueError("the connection takes no more streams")
        stream_id, self._next = self._next, self._next + 2
        self._streams[stream_id] = _Stream(stream_id, State.WAITING_ENDED if fin else State.WAITING, self._initial_window)
        self._out.append(self._writer.syn_stream(stream_id, headers, frames.FIN if fin else 0))
        return stream_id

    def reply(self, stream_id: int, headers: Headers = ()) -> None:
        """Accept a stream."""
        self._step(self._streams[stream_id], Step.SEND_REPLY)
        self._out.append(self._writer.syn_reply(stream_id, headers))

    def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Send bytes, ``fin`` to end our direction. Raises ValueError for a stream that is not open for it."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.held_fin:
            raise ValueError(f"stream {stream_id} is over")
        if self._windows and (stream.held or len(data) > min(stream.window, self._session_window)):
            if Step.SEND_FIN not in TRANSITIONS[stream.state]:
                raise ValueError(f"stream {stream_id} is over")
            stream.held += data
            stream.held_fin = fin
            self._release(stream)
            return
        self._send(stream, data, fin)

    def _send(self, stream: _Stream, data: bytes, fin: bool) -> None:
        self._step(stream, Step.SEND_FIN if fin else Step.SEND_DATA)
        stream.window -= len(data)
        self._session_window -= len(data)
        while len(data) > frames.MAX_DATA:
            self._out += (frames.data_header(stream.id, frames.MAX_DATA), data[: frames.MAX_DATA])
            data = data[frames.MAX_DATA :]
        self._out += (frames.data_header(stream.id, len(data), fin=fin), data)

    def head(self, stream_id: int, length: int) -> bytes | None:
        """The header of a data frame whose ``length`` bytes the caller sends right behind it, without a copy through here.

        None where that is not possible: something else is to be sent first, or windows want to have a say.
        """
        stream = self._streams.get(stream_id)
        if stream is None or self._out or self._windows or stream.held_fin or length > frames.MAX_DATA:
            return None
        self._step(stream, Step.SEND_DATA)
        stream.window -= length
        self._session_window -= length
        return frames.data_header(stream_id, length)

    def held(self, stream_id: int) -> int:
        """Bytes that wait for a window: send no more before ``Writable``."""
        stream = self._streams.get(stream_id)
        return len(stream.held) if stream is not None else 0

    def reset(self, stream_id: int, status: Status = Status.CANCEL) -> None:
        """End a stream at once, in both directions; one that is over is fine."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.state = State.CLOSED
            self._out.append(frames.rst_stream(stream_id, status))

    def ping(self) -> int:
        number, self._next_ping = self._next_ping, (self._next_ping + 2) & frames.MAX_STREAM_ID
        self._out.append(frames.ping(number))
        return number

    def close(self, status: GoAway = GoAway.OK) -> None:
        """Say that no more streams are taken; those that are open go on."""
        if not self._closing:
            self._closing = True
            self._out.append(frames.go_away(self._last, status))

    def consumed(self, stream_id: int, count: int) -> None:
        """Bytes of a stream have been passed on: to a peer that uses windows they are granted again."""
        self._session_consumed += count
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.consumed += count
        if not self._windows:
            return
        if self._session_consumed >= WINDOW // 2:
            self._out.append(frames.window_update(0, self._session_consumed))
            self._session_consumed = 0
        if stream is not None and stream.consumed >= WINDOW // 2:
            self._out.append(frames.window_update(stream_id, stream.consumed))
            stream.consumed = 0

    def state(self, stream_id: int) -> State:
        stream = self._streams.get(stream_id)
        return State.CLOSED if stream is None else stream.state

    @property
    def streams(self) -> tuple[int, ...]:
        """Ids of those that are not closed."""
        return tuple(self._streams)

    def _step(self, stream: _Stream, step: Step) -> None:
        following = TRANSITIONS[stream.state].get(step)
        if following is None:
            raise ValueError(f"{step.name} in state {stream.state.name}")
        self._become(stream, following)

    def _become(self, stream: _Stream, state: State) -> None:
        stream.state = state
        if state is State.CLOSED:
            self._streams.pop(stream.id, None)

    def _release(self, stream: _Stream) -> bool:
        """Send what the windows allow of what is held; True when nothing is held any more."""
        room = max(0, min(stream.window, self._session_window))
        piece = bytes(stream.held[:room])
        del stream.held[:room]
        if stream.held:
            if piece:
                self._send(stream, piece, False)
            return False
        fin, stream.held_fin = stream.held_fin, False
        self._send(stream, piece, fin)
        return True

    # ---- what they do

    def receive(self, data: bytes) -> list[Event]:
        """Raises ProtocolError; a GOAWAY that says so is then in ``take``."""
        events: list[Event] = []
        try:
            for frame in self._reader.feed(data):
                if isinstance(frame, Data):
                    self._data(frame, events)
                else:
                    self._control(frame, events)
        except ProtocolError:
            self.close(GoAway.PROTOCOL_ERROR)
            raise
        return events

    def _control(self, frame: Control, events: list[Event]) -> None:
        match frame.type:
            case Type.SYN_STREAM:
                self._syn_stream(frame, events)
            case Type.SYN_REPLY:
                stream = self._known(frame.id())
                if stream is not None and self._accept(stream, Step.RECEIVE_REPLY, Status.STREAM_IN_USE, events):
                    events.append(Replied(stream.id, frame.headers))
                    self._fin(stream, frame.flags, events)
            case Type.HEADERS:  # nobody says anything in them
                stream = self._known(frame.id())
                if stream is not None and self._accept(stream, Step.RECEIVE_DATA, Status.STREAM_ALREADY_CLOSED, events):
                    self._fin(stream, frame.flags, events)
            case Type.RST_STREAM:
                stream = self._streams.pop(frame.id(), None)
                if stream is not None:
                    stream.state = State.CLOSED
                    events.append(Reset(stream.id, frame.word(1)))
            case Type.PING:
                number = frame.word(0)
                if number % 2 == self._next % 2:
                    events.append(Pong(number))
                else:
                    self._out.append(frames.ping(number))
            case Type.GOAWAY:
                self.gone_away = True
                events.append(GoneAway(frame.id(), frame.word(1)))
            case Type.SETTINGS:
                self._settings(frame, events)
            case Type.WINDOW_UPDATE:
                self._window_update(frame.id(), frame.id(1), events)

    def _syn_stream(self, frame: Control, events: list[Event]) -> None:
        stream_id = frame.id()
        if stream_id % 2 == self._next % 2 or stream_id <= self._last:
            raise ProtocolError(f"stream id {stream_id} after {self._last}")  # 2.3.2: a session error
        self._last = stream_id
        if self._closing:  # it crossed our GOAWAY, which tells the peer
            return
        if len(self._streams) >= self._max_streams or frame.flags & frames.UNIDIRECTIONAL:
            self._complain(stream_id, Status.REFUSED_STREAM)
            return
        stream = self._streams[stream_id] = _Stream(stream_id, State.REQUESTED, self._initial_window)
        events.append(Opened(stream_id, frame.headers))
        self._fin(stream, frame.flags, events)

    def _data(self, frame: Data, events: list[Event]) -> None:
        stream = self._known(frame.stream_id)
        if stream is None or not self._accept(stream, Step.RECEIVE_DATA, Status.STREAM_ALREADY_CLOSED, events):
            self.consumed(frame.stream_id, len(frame.data))
            return
        if frame.data:
            events.append(Received(stream.id, frame.data))
        if frame.fin:
            self._fin(stream, frames.FIN, events)

    def _known(self, stream_id: int) -> _Stream | None:
        """An open stream. One that never was is complained about; one that was is not."""
        stream = self._streams.get(stream_id)
        if stream is None:
            ours = stream_id % 2 == self._next % 2
            if stream_id == 0 or (stream_id >= self._next if ours else stream_id > self._last):
                self._complain(stream_id, Status.INVALID_STREAM)
        return stream

    def _accept(self, stream: _Stream, step: Step, status: Status, events: list[Event]) -> bool:
        following = TRANSITIONS[stream.state].get(step)
        if following is None:
            self._break_off(stream, status, events)
            return False
        self._become(stream, following)
        return True

    def _fin(self, stream: _Stream, flags: int, events: list[Event]) -> None:
        if flags & frames.FIN and self._accept(stream, Step.RECEIVE_FIN, Status.STREAM_ALREADY_CLOSED, events):
            events.append(Ended(stream.id))

    def _break_off(self, stream: _Stream, status: Status, events: list[Event]) -> None:
        self._become(stream, State.CLOSED)
        events.append(Reset(stream.id, status))
        self._complain(stream.id, status)

    def _complain(self, stream_id: int, status: Status) -> None:
        self._complaints += 1
        if self._complaints > MAX_COMPLAINTS:
            raise ProtocolError("too many frames that make no sense")
        self._out.append(frames.rst_stream(stream_id, status))

    # ---- windows

    def _settings(self, frame: Control, events: list[Event]) -> None:
        for index in range(frame.word(0)):
            number, value = frame.word(1 + 2 * index) & 0xFFFFFF, frame.word(2 + 2 * index)
            if number == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ProtocolError(f"initial window of {value} bytes")
                self._windows = True
                change, self._initial_window = value - self._initial_window, value
                for stream in list(self._streams.values()):
                    stream.window += change
                self._released(list(self._streams.values()), events)

    def _window_update(self, stream_id: int, delta: int, events: list[Event]) -> None:
        self._windows = True
        if delta == 0:
            raise ProtocolError("window update of 0 bytes")
        if stream_id == 0:
            self._session_window += delta
            if self._session_window > MAX_WINDOW:
                raise ProtocolError("session window overflows")
            self._released(list(self._streams.values()), events)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.window += delta
        if stream.window > MAX_WINDOW:
            self._break_off(stream, Status.FLOW_CONTROL_ERROR, events)
        else:
            self._released([stream], events)

    def _released(self, streams: list[_Stream], events: list[Event]) -> None:
        for stream in streams:
            if (stream.held or stream.held_fin) and self._release(stream):
                events.append(Writable(stream.id))
