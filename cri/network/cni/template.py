"""A network configuration from a template and the node's pod CIDRs: containerd's ``conf_template``, for clusters without a CNI daemon.

Of Go's text/template what such files use: ``{{.PodCIDR}}``, ``{{range $i, $x := .PodCIDRRanges}}…{{end}}``, ``{{.Routes}}`` likewise,
``{{if $i}}…{{else}}…{{end}}`` and the trim markers ``{{-`` and ``-}}``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path

from cri.errors import FailedPrecondition
from cri.network.cni import conf
from cri.network.cni.conf import ConfError
from shim.linux import path as paths

FILE = "10-cri-shim.conflist"
Value = str | int | Sequence[str]

_ACTION = re.compile(r"(\s*)\{\{(- )?\s*(.*?)\s*( -)?\}\}(\s*)", re.DOTALL)
_RANGE = re.compile(r"range\s+(?:(?:(\$\w+)\s*,\s*)?(\$\w+)\s*:=\s*)?(\S+)")
_DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}

log = logging.getLogger("cri.network")


def install(source: Path, directory: Path, cidrs: tuple[str, ...]) -> None:
    """Write the configuration, unless somebody else's is there already. Raises FailedPrecondition."""
    target = directory / FILE
    try:
        there, _ = conf.load(directory)
        if there is not None and there.source != str(target):
            log.info("network configuration %s is there: no other is made from %s", there.source, source)
            return
        data = render(source.read_text(), cidrs).encode()
        conf.parse(data)
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            paths.write_atomic(fd, FILE, data, 0o644)
        finally:
            os.close(fd)
    except (OSError, ConfError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"network configuration from {source}: {error}") from None


def render(text: str, cidrs: tuple[str, ...]) -> str:
    """The template with these CIDRs in it, primary first. Raises ConfError for what is not understood."""
    routes = tuple(_DEFAULT_ROUTES[version] for version in dict.fromkeys(ip_network(c).version for c in cidrs))
    data: Mapping[str, Value] = {".PodCIDR": cidrs[0] if cidrs else "", ".PodCIDRRanges": cidrs, ".Routes": routes}
    parts = _split(text)
    output, rest = _block(parts, 0, data)
    if rest != len(parts):
        raise ConfError(f"template: unexpected {{{{{parts[rest][1]}}}}}")
    return output


def _split(text: str) -> list[tuple[bool, str]]:
    """``(is an action, its text)`` alternating, white space trimmed where the markers say so."""
    parts: list[tuple[bool, str]] = []
    position = 0
    for match in _ACTION.finditer(text):
        before, trim_left, action, trim_right, after = match.groups()
        parts.append((False, text[position : match.start()] + ("" if trim_left else before)))
        parts.append((True, action))
        position = match.end() if trim_right else match.end() - len(after)
    parts.append((False, text[position:]))
    return parts


def _block(parts: list[tuple[bool, str]], at: int, scope: Mapping[str, Value]) -> tuple[str, int]:
    """What the parts from ``at`` on say, up to the ``end`` or ``else`` that belongs to somebody else, and where that is."""
    output = []
    while at < len(parts):
        is_action, text = parts[at]
        if not is_action:
            output.append(text)
        elif text in ("end", "else"):
            break
        elif text.startswith(("range ", "if ")):
            said, at = _branch(parts, at, scope)
            output.append(said)
        elif not text.startswith("/*"):
            value = _value(text, scope)
            if not isinstance(value, (str, int)):
                raise ConfError(f"template: {text} is a list")
            output.append(str(value))
        at += 1
    return "".join(output), at


def _branch(parts: list[tuple[bool, str]], at: int, scope: Mapping[str, Value]) -> tuple[str, int]:
    action = parts[at][1]
    scopes = _iterations(action, scope) if action.startswith("range ") else [scope] * bool(_value(action[3:].strip(), scope))
    said, after = _block(parts, at + 1, scopes[0] if scopes else scope)
    said = said if scopes else ""
    said += "".join(_block(parts, at + 1, s)[0] for s in scopes[1:])
    if after < len(parts) and parts[after][1] == "else":
        other, after = _block(parts, after + 1, scope)
        said = said if scopes else other
    if after >= len(parts) or parts[after][1] != "end":
        raise ConfError(f"template: {{{{{action}}}}} has no end")
    return said, after


def _iterations(action: str, scope: Mapping[str, Value]) -> list[Mapping[str, Value]]:
    match = _RANGE.fullmatch(action)
    if match is None:
        raise ConfError(f"template: {{{{{action}}}}} is not understood")
    index, name, source = match.groups()
    values = _value(source, scope)
    if isinstance(values, (str, int)):
        raise ConfError(f"template: {source} is not a list")
    return [{**scope, ".": v, **({index: i} if index else {}), **({name: v} if name else {})} for i, v in enumerate(values)]


def _value(name: str, scope: Mapping[str, Value]) -> Value:
    if name not in scope:
        raise ConfError(f"template: {name!r} is not understood")
    return scope[name]
