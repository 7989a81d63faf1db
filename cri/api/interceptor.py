"""What surrounds every RPC: decoding, request id, one log line, metrics, and the only place where errors become gRPC statuses.

Wrapped around the handlers when they are registered. A ``grpc.aio.ServerInterceptor`` would cost a coroutine, a handler object and
a look-up more per call: 40 µs of the 450 that a unary call takes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cri import log
from cri.errors import InvalidArgument, Unimplemented, status_of

#: Called after each RPC with method, code name and seconds.
Observer = Callable[[str, str, float], None]
#: Writes the line of one RPC: level name, message, fields.
LineWriter = Callable[[str, str, Mapping[str, object]], None]
Context = grpc.aio.ServicerContext[Any, Any]

#: A status text is a header: clients in C and Python refuse headers above 8 KiB, and percent-encoding can triple it.
STATUS_TEXT_MAX = 2048

_logger = logging.getLogger("cri.api")
_counter = itertools.count(1)
_prefix = f"{os.getpid():x}"


class Edge:
    """Turns a servicer into method handlers. ``polls`` False: reads that succeed are not logged."""

    def __init__(self, form: str, level: str, *, polls: bool = True, observe: Observer | None = None) -> None:
        self._render = log.RENDER[form]
        self._threshold = logging.getLevelName(level.upper())
        self._polls, self._observe = polls, observe
        self.running = 0

    async def quiet(self, seconds: float) -> None:
        """Waits until no handler runs, for so long at most: gRPC's stop cancels them, and they may still have to give things back."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def handlers(self, servicer: object, service: ServiceDescriptor) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Full method name to handler, for every RPC of the service; what the servicer does not override is UNIMPLEMENTED."""
        return {f"/{service.full_name}/{method.name}": self._handler(servicer, method) for method in service.methods}

    def _handler(self, servicer: object, method: MethodDescriptor) -> grpc.RpcMethodHandler[bytes, bytes]:
        verb = getattr(servicer, method.name)
        # The generated base class answers UNIMPLEMENTED through a synchronous method, which aio would run in a thread.
        if verb.__func__ in (getattr(base, method.name, None) for base in type(servicer).__mro__[1:] if base.__name__.endswith("Servicer")):
            verb = _unimplemented(method.name)
        decode = GetMessageClass(method.input_type).FromString
        call = _Call(self, method, decode)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(call.streaming(verb))
        return grpc.unary_unary_rpc_method_handler(call.unary(verb))

    def done(
        self, call: _Call, started: float, request: Message | None, response: Message | None, code: str, error: BaseException | None
    ) -> None:
        """One line, one observation."""
        duration = time.perf_counter() - started
        if self._observe:
            self._observe(call.name, code, duration)
        level = "INFO" if code in ("OK", "CANCELLED") else "WARNING"
        if code == "OK" and call.poll and not self._polls:
            return
        if logging.getLevelName(level) < self._threshold:
            return
        fields: dict[str, object] = {"request": log.request_id.get(), "code": code, "ms": round(duration * 1000, 3)}
        for name, read in call.interesting:
            fields[name] = read(request) if request is not None else ""
        for name in call.results:
            fields[name] = getattr(response, name) if response is not None else ""
        if error is not None:
            fields["error"] = _status(error)[1]
            if notes := getattr(error, "__notes__", None):
                fields["undo"] = "; ".join(notes)
        self.write(level, call.name, fields)

    def write(self, level: str, message: str, fields: Mapping[str, object]) -> None:
        """Past the logging module, which would take twice as long."""
        try:
            sys.stderr.write(self._render(time.time(), level, message, fields) + "\n")
            sys.stderr.flush()
        except OSError:
            # The log's reader is gone. The RPC has been done; failing it now would be a lie.
            return


class _Call:
    """What is known about a method before any call of it."""

    def __init__(self, edge: Edge, method: MethodDescriptor, decode: Callable[[bytes], Message]) -> None:
        self.edge, self.name, self.decode = edge, method.name, decode
        self.poll = method.name.startswith(("List", "Stream")) or method.name.endswith(("Status", "Stats", "FsInfo", "Version"))
        self.interesting = _interesting(method.input_type)
        self.results = [n for n in ("pod_sandbox_id", "container_id", "image_ref", "exit_code") if n in method.output_type.fields_by_name]

    def unary(self, verb: Callable[[Any, Context], Awaitable[Message]]) -> Callable[[bytes, Context], Awaitable[bytes]]:
        edge, done = self.edge, self.edge.done

        async def handle(raw: bytes, context: Context) -> bytes:
            started = time.perf_counter()
            edge.running += 1
            log.request_id.set(f"{_prefix}-{next(_counter):x}")
            request: Message | None = None
            try:
                request = self._decode(raw)
                response = await verb(request, context)
                answer = response.SerializeToString()
            except BaseException as error:
                code, text = self._failed(started, request, error)
                await _abort(context, code, text, error)
            finally:
                edge.running -= 1
            done(self, started, request, response, "OK", None)
            return answer

        return handle

    def streaming(self, verb: Callable[[Any, Context], AsyncIterator[Message]]) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
        edge, done = self.edge, self.edge.done

        async def handle(raw: bytes, context: Context) -> AsyncIterator[bytes]:
            started = time.perf_counter()
            edge.running += 1
            log.request_id.set(f"{_prefix}-{next(_counter):x}")
            request: Message | None = None
            try:
                request = self._decode(raw)
                async for response in verb(request, context):
                    yield response.SerializeToString()
            except BaseException as error:
                code, text = self._failed(started, request, error)
                await _abort(context, code, text, error)
            finally:
                edge.running -= 1
            done(self, started, request, None, "OK", None)

        return handle

    def _decode(self, raw: bytes) -> Message:
        try:
            request = self.decode(raw)
        except DecodeError as error:
            raise InvalidArgument(f"request is not a valid message (wrong encoding or invalid UTF-8): {error}") from error
        # A zero byte is rare but legal on the wire (an empty submessage): only then the strings are looked at.
        if b"\0" in raw and (field := nul_field(request)):
            raise InvalidArgument("contains a NUL character", field=field)
        return request

    def _failed(self, started: float, request: Message | None, error: BaseException) -> tuple[str, str]:
        code, text = _status(error)
        self.edge.done(self, started, request, None, code, error)
        if code == "INTERNAL" and isinstance(error, Exception):
            _logger.error("unexpected error in %s", self.name, exc_info=error)
        return code, text


def _status(error: BaseException) -> tuple[str, str]:
    # GeneratorExit: a stream whose client has gone while a message was on its way to it.
    return ("CANCELLED", "cancelled") if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else status_of(error)


async def _abort(context: Context, code: str, text: str, error: BaseException) -> NoReturn:
    if isinstance(error, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)):
        raise error
    clean = text.encode("utf-8", "backslashreplace")
    if len(clean) > STATUS_TEXT_MAX:
        clean = clean[: STATUS_TEXT_MAX - 4] + b" ..."
    await context.abort(grpc.StatusCode[code], clean.decode("utf-8", "ignore"))


def nul_field(message: Message, path: str = "") -> str:
    """Path of the first string or bytes field with a NUL character in it; empty for none. No kernel interface can carry one."""
    for field, value in message.ListFields():
        here = f"{path}.{field.name}" if path else field.name
        if field.message_type and field.message_type.GetOptions().map_entry:
            if any(_nul(item) for pair in value.items() for item in pair):
                return here
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if field.is_repeated else (value,):
                if found := nul_field(item, here):
                    return found
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES) and (
            any(map(_nul, value)) if field.is_repeated else _nul(value)
        ):
            return here
    return ""


def _nul(value: object) -> bool:
    return (isinstance(value, str) and "\0" in value) or (isinstance(value, bytes) and b"\0" in value)


def _unimplemented(name: str) -> Callable[[Any, Context], Any]:
    class Refuse:
        """Awaitable and async iterable, so that it fits unary and streaming methods."""

        def __await__(self) -> Any:
            raise Unimplemented(f"{name} is not built in this version of cri-shim")

        def __aiter__(self) -> Any:
            raise Unimplemented(f"{name} is not built in this version of cri-shim")

    return lambda request, context: Refuse()


def _interesting(request: Descriptor) -> list[tuple[str, Callable[[Any], object]]]:
    """What a log line says of a request: ids, names, image, command; never environment, credentials or annotations."""
    fields = request.fields_by_name
    found: list[tuple[str, Callable[[Any], object]]] = []
    if "pod_sandbox_id" in fields:
        found.append(("pod", lambda r: r.pod_sandbox_id))
    if "container_id" in fields:
        found.append(("container", lambda r: r.container_id))
    if request.name == "RunPodSandboxRequest":
        found.append(("name", lambda r: f"{r.config.metadata.namespace}/{r.config.metadata.name}/{r.config.metadata.attempt}"))
    if request.name == "CreateContainerRequest":
        found.append(("name", lambda r: f"{r.config.metadata.name}/{r.config.metadata.attempt}"))
        found.append(("image", lambda r: r.config.image.image))
    if "image" in fields:
        found.append(("image", lambda r: r.image.image))
    if "cmd" in fields:
        found.append(("program", lambda r: r.cmd[0] if r.cmd else ""))
    if "timeout" in fields:
        found.append(("timeout", lambda r: r.timeout or ""))
    return found
