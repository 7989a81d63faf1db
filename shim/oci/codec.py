"""Frozen dataclasses to JSON and back: the OCI configuration, recipes, sandbox and exit records, wire payloads.

One decoder per class, built from its annotations at first use and kept; a supervisor that has decoded one spec before it forks pays
nothing in its children. Decoding is strict about types and silent about unknown keys (a newer peer may send more). JSON ``null``
reads as absent, as Go's encoder writes it for empty slices. Errors are ``Failure("decode", path="linux.resources.memory.limit")``.

A NUL or a lone surrogate can only enter through a ``\\u`` escape (the bytes are decoded as strict UTF-8 and JSON forbids raw control
characters), so the walk that refuses them runs only where the document has one. One kind of string may carry bytes that are not UTF-8,
because CRI says so: an environment entry, where they stand as surrogates U+DC80 to U+DCFF as in ``os.fsdecode``.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, cast

from shim.errors import Failure

T = TypeVar("T")
_Convert = Callable[[Any], Any]

# Words that the OCI schema writes in capitals when they are not the first of a name: containerID, disableOOMKiller, kernelTCP.
_ACRONYMS = {"id": "ID", "oom": "OOM", "tcp": "TCP", "cpu": "CPU", "io": "IO", "iops": "IOPS"}
_MISSING = dataclasses.MISSING


class _Mismatch(Exception):
    """A value of the wrong type; the path grows outwards while it unwinds."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.path: list[str | int] = []

    def at(self, step: str | int) -> _Mismatch:
        self.path.append(step)
        return self


def encode(obj: object) -> bytes:
    """Compact UTF-8 JSON of a dataclass. Fields equal to their default are left out."""
    tree = to_json(obj)
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if "\\u0000" in text:
        _refuse_bad_strings(tree, "encode")
    try:
        return text.encode()
    except UnicodeEncodeError:  # only for lone surrogates
        _refuse_bad_strings(tree, "encode")
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()


def decode(cls: type[T], data: bytes | bytearray | memoryview) -> T:
    """The object whose JSON ``data`` is; Failure names the field that is wrong."""
    raw = bytes(data)
    try:
        tree = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Failure("decode", cls.__name__, message=f"not JSON: {e}") from None
    if b"\\u" in raw:
        _refuse_bad_strings(tree, "decode")
    return _decode_tree(cls, tree)


def to_json(obj: object) -> dict[str, Any]:
    """The JSON object of a dataclass as Python dicts and lists."""
    return cast("dict[str, Any]", _encoder(type(obj))(obj))


def from_json(cls: type[T], tree: object) -> T:
    """The inverse of ``to_json``, for trees that another codec has parsed."""
    _refuse_bad_strings(tree, "decode")
    return _decode_tree(cls, tree)


def json_name(field: dataclasses.Field[Any]) -> str:
    """Name of a field in JSON: ``metadata["json"]``, else its name in camel case with the schema's acronyms."""
    given = field.metadata.get("json")
    if given is not None:
        return str(given)
    first, *rest = field.name.split("_")
    return first + "".join(_ACRONYMS.get(word) or word.capitalize() for word in rest)


def warm(*classes: type) -> None:
    """Build the codecs of these classes now, so that forked children find them."""
    for cls in classes:
        _decoder(cls)
        _encoder(cls)
    while _unfilled:
        _unfilled.pop()()


def _decode_tree(cls: type[T], tree: object) -> T:
    try:
        return cast("T", _decoder(cls)(tree))
    except _Mismatch as e:
        raise Failure("decode", cls.__name__, path=_dotted(reversed(e.path)), message=e.message) from None


def _dotted(steps: typing.Iterable[str | int]) -> str:
    out = ""
    for step in steps:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
    return out


def _refuse_bad_strings(tree: object, phase: str) -> None:
    """Failure for a NUL or a lone surrogate in any string or key; neither can be passed to the kernel or written to a log."""
    stack: list[tuple[tuple[str | int, ...], object]] = [((), tree)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            _refuse_bad_string(value, path, phase)
        elif isinstance(value, dict):
            for key, item in value.items():
                _refuse_bad_string(key, path, phase)
                stack.append(((*path, key), item))
        elif isinstance(value, list):
            stack.extend(((*path, i), item) for i, item in enumerate(value))


def _refuse_bad_string(value: str, path: tuple[str | int, ...], phase: str) -> None:
    raw = len(path) > 1 and path[-2] == "env"  # an item of Process.env or Hook.env
    if "\0" in value:
        raise Failure(phase, path=_dotted(path), message="string has a NUL")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" and not (raw and "\udc80" <= c <= "\udcff") for c in value):
        raise Failure(phase, path=_dotted(path), message="string has a lone surrogate")


# Decoding


_decoders: dict[Any, _Convert] = {}
_unfilled: list[Callable[[], None]] = []  # tables of decoders that have not been used yet


def _decoder(kind: Any) -> _Convert:
    found = _decoders.get(kind)
    if found is None:
        found = _decoders[kind] = _make_decoder(kind)
    return found


def _make_decoder(kind: Any) -> _Convert:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (str, int, bool):
        return _scalar(kind)
    if kind is Any:
        return lambda value: value
    if origin is types.UnionType and len(args) == 2 and args[1] is type(None):
        return _decoder(args[0])  # null never reaches a converter
    if origin is tuple and len(args) == 2 and args[1] is ...:
        return _scalars(args[0]) if args[0] in (str, int, bool) else _sequence(_decoder(args[0]))
    if origin is dict and args[0] is str:
        return _map(_decoder(args[1]))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object(kind)
    raise TypeError(f"shim.oci.codec has no rule for {kind!r}")


def _named(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _scalar(kind: type) -> _Convert:
    wanted = {str: "string", int: "integer", bool: "boolean"}[kind]

    def convert(value: Any) -> Any:
        if type(value) is not kind:  # exact: a bool is no integer
            raise _Mismatch(f"want {wanted}, got {_named(value)}")
        return value

    return convert


def _scalars(kind: type) -> _Convert:
    one = _scalar(kind)
    fine: tuple[set[type], ...] = ({kind}, set())

    def convert(value: Any) -> Any:
        if type(value) is not list:
            raise _Mismatch(f"want array, got {_named(value)}")
        if set(map(type, value)) not in fine:
            for i, item in enumerate(value):
                try:
                    one(item)
                except _Mismatch as e:
                    raise e.at(i) from None
        return tuple(value)

    return convert


def _sequence(one: _Convert) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not list:
            raise _Mismatch(f"want array, got {_named(value)}")
        try:
            return tuple([one(item) for item in value])  # a list comprehension is measurably faster than a generator here
        except _Mismatch as e:
            # Find the index only now: the loop above stays free of it.
            raise e.at(_first_failing(one, value)) from None

    return convert


def _first_failing(one: _Convert, items: list[Any]) -> int:
    for i, item in enumerate(items):
        try:
            one(item)
        except _Mismatch:
            return i
    raise AssertionError("no item fails")


def _map(one: _Convert) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"want object, got {_named(value)}")
        out = {}
        for key, item in value.items():
            try:
                out[key] = one(item)
            except _Mismatch as e:
                raise e.at(key) from None
        return out

    return convert


def _enum(kind: type[Enum]) -> _Convert:
    members = {member.value: member for member in kind}

    def convert(value: Any) -> Any:
        if type(value) not in (str, int) or value not in members:
            raise _Mismatch(f"want one of {', '.join(map(str, members))}, got {value!r:.60}")
        return members[value]

    return convert


def _object(kind: type) -> _Convert:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = {json_name(f): f.name for f in fields if f.default is _MISSING and f.default_factory is _MISSING}
    # Built on first use, not here: a type may contain itself.
    table: dict[str, tuple[str, _Convert]] = {}

    def fill() -> None:
        if table:
            return
        table.update({json_name(f): (f.name, _decoder(hints[f.name])) for f in fields})

    _unfilled.append(fill)

    def convert(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"want object, got {_named(value)}")
        if not table:
            fill()
        known = {}
        find = table.get
        key = ""
        try:
            for key, item in value.items():
                if item is not None and (entry := find(key)):
                    known[entry[0]] = entry[1](item)
        except _Mismatch as e:
            raise e.at(key) from None
        try:
            return kind(**known)
        except TypeError:
            for name, attribute in required.items():
                if attribute not in known:
                    raise _Mismatch("required and absent").at(name) from None
            raise

    return convert


# Encoding


_encoders: dict[Any, _Convert] = {}


def _encoder(kind: type) -> _Convert:
    found = _encoders.get(kind)
    if found is None:
        if not dataclasses.is_dataclass(kind):
            raise TypeError(f"shim.oci.codec encodes dataclasses, not {kind!r}")
        found = _encoders[kind] = _encode_object(kind)
    return found


def _make_encoder(kind: Any) -> _Convert | None:
    """Converter for a field's type; None where the value already is JSON."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (str, int, bool, Any):
        return None
    if origin is types.UnionType:
        inner = _make_encoder(args[0])
        return inner and (lambda value: None if value is None else inner(value))
    if origin is tuple:
        one = _make_encoder(args[0])
        return list if one is None else lambda value: [one(item) for item in value]
    if origin is dict:
        one_value = _make_encoder(args[1])
        return None if one_value is None else lambda value: {k: one_value(v) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda value: value.value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return lambda value: _encoder(kind)(value)  # late: a type may contain itself
    raise TypeError(f"shim.oci.codec has no rule for {kind!r}")


def _encode_object(kind: type) -> _Convert:
    hints = typing.get_type_hints(kind)
    rows: list[tuple[str, str, Any, _Convert | None]] = []
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not _MISSING else f.default
        if f.metadata.get("required"):  # by the specification, whatever our default is
            default = _MISSING
        rows.append((f.name, json_name(f), default, _make_encoder(hints[f.name])))

    def convert(value: Any) -> dict[str, Any]:
        out = {}
        for attribute, name, default, one in rows:
            item = getattr(value, attribute)
            if item is default or item == default:
                continue
            out[name] = item if one is None else one(item)
        return out

    return convert
