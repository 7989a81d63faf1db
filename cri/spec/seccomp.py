"""Localhost seccomp profiles: the JSON that Docker and containerd read, to the OCI form.

Beyond the OCI schema it has ``archMap`` (sub-architectures per native one) and, per rule, ``name``, ``comment``, and conditions:
``includes``/``excludes`` with ``caps``, ``arches`` and ``minKernel``. Rules whose conditions do not hold are left out here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from cri.errors import InvalidArgument
from shim.errors import Failure
from shim.oci import codec, validate
from shim.oci import spec as oci

# uname's machine to Docker's names in "arches" and to libseccomp's in "architectures".
_ARCHES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
_KERNEL = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_CONDITIONS = ("caps", "arches", "minKernel")


# On the pod, if the handler allows it by ``pod_annotations``: CRI-O's two names, and ours.
NOTIFIER_ANNOTATIONS = (
    "io.kubernetes.cri-o.seccompNotifierAction", "seccomp-notifier-action.crio.io", "seccomp.cri-shim.io/notifier-action",
)  # fmt: skip
_NOTIFIER_ACTIONS = {"": "log", "log": "log", "stop": "stop"}


def with_notifier(
    profile: oci.Seccomp | None, annotations: Mapping[str, str], allowed: Collection[str], *, field: str = "sandbox_config.annotations"
) -> oci.Seccomp | None:
    """The profile with what the pod's annotation asks for: refused calls counted, and perhaps the container stopped for them."""
    names = [name for name in NOTIFIER_ANNOTATIONS if name in annotations and name in allowed]
    actions = set()
    for name in names:
        if annotations[name] not in _NOTIFIER_ACTIONS:
            raise InvalidArgument(f"{annotations[name]!r:.40} is neither 'log' nor 'stop'", field=f"{field}[{name!r}]")
        actions.add(_NOTIFIER_ACTIONS[annotations[name]])
    if len(actions) > 1:
        raise InvalidArgument(f"{' and '.join(names)} say different things", field=field)
    if profile is None or not actions:
        return profile
    if profile.listener_path:
        raise InvalidArgument("the seccomp profile has a listener of its own", field=f"{field}[{names[0]!r}]")
    return replace(profile, notifier=actions.pop())


def parse(text: bytes, *, field: str, caps: Collection[str], arch: str, kernel: tuple[int, int]) -> oci.Seccomp:
    """The profile for a container with these capabilities on this machine; InvalidArgument says what is wrong with it.

    An empty file is an error: read as an empty profile it would confine nothing (CVE-2023-2431).
    """
    if not text.strip():
        raise InvalidArgument("the profile is empty", field=field)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidArgument(f"the profile is not JSON: {e}", field=field) from None
    if not isinstance(document, dict):
        raise InvalidArgument("the profile is not a JSON object", field=field)
    if not document.get("defaultAction"):
        raise InvalidArgument("the profile has no defaultAction", field=field)
    if document["defaultAction"] == validate.RUNTIME_DEFAULT:  # our own marker, not a word of the format
        raise InvalidArgument("the profile's defaultAction is not an action", field=field)
    rules = _list(document, "syscalls", field)
    kept = [
        _rule(rule, f"{field}: syscalls[{i}]")
        for i, rule in enumerate(rules)
        if _applies(rule, f"{field}: syscalls[{i}]", caps, arch, kernel)
    ]
    if "notifier" in document:
        raise InvalidArgument("the profile's notifier is not a word of the format", field=field)
    plain = {k: v for k, v in document.items() if k not in ("archMap", "syscalls")}
    plain["architectures"] = _architectures(document, field, arch)
    try:
        profile = codec.from_json(oci.Seccomp, {**plain, "syscalls": kept})
        validate.validate_seccomp(profile, "seccomp")
    except Failure as e:
        raise InvalidArgument(f"the profile's {e.path}: {e.message}", field=field) from None
    return profile


def _rule(rule: dict[str, Any], field: str) -> dict[str, Any]:
    """A rule in OCI's form: ``name`` of old profiles is one of ``names``."""
    names = _list(rule, "names", field)
    name = rule.get("name")
    if name:
        if names:
            raise InvalidArgument("has both name and names", field=field)
        names = [name]
    if not names:
        raise InvalidArgument("names no system call", field=field)
    kept = {k: v for k, v in rule.items() if k in ("action", "errnoRet", "args")}
    return {**kept, "names": names}


def _applies(rule: object, field: str, caps: Collection[str], arch: str, kernel: tuple[int, int]) -> bool:
    if not isinstance(rule, dict):
        raise InvalidArgument("is not an object", field=field)
    includes, excludes = _conditions(rule, "includes", field), _conditions(rule, "excludes", field)
    native = _ARCHES.get(arch, (arch, ""))[0]
    arches = _list(includes, "arches", field)
    if arches and native not in arches:
        return False
    if not all(cap in caps for cap in _list(includes, "caps", field)):
        return False
    least = includes.get("minKernel")
    if least and kernel < _version(least, f"{field}.includes.minKernel"):
        return False
    if native in _list(excludes, "arches", field) or any(cap in caps for cap in _list(excludes, "caps", field)):
        return False
    least = excludes.get("minKernel")
    return not (least and kernel >= _version(least, f"{field}.excludes.minKernel"))


def _conditions(rule: dict[str, Any], name: str, field: str) -> dict[str, Any]:
    found = rule.get(name)
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise InvalidArgument("is not an object", field=f"{field}.{name}")
    unknown = found.keys() - set(_CONDITIONS)
    if unknown:
        # A condition that is not understood cannot be taken as met: the rule may be the one that allows.
        raise InvalidArgument(f"unknown condition {min(unknown)!r:.40}", field=f"{field}.{name}")
    return found


def _list(document: dict[str, Any], name: str, field: str) -> list[Any]:
    found = document.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise InvalidArgument("is not a list", field=f"{field}.{name}" if ":" in field else f"{field}: {name}")
    return found


def _version(text: object, field: str) -> tuple[int, int]:
    match = _KERNEL.match(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidArgument("is not a kernel version", field=field)
    return int(match[1]), int(match[2])


def _architectures(document: dict[str, Any], field: str, arch: str) -> list[Any]:
    """``architectures`` as they are, or the native one with its sub-architectures out of ``archMap``."""
    given = _list(document, "architectures", field)
    table = _list(document, "archMap", field)
    if given and table:
        raise InvalidArgument("the profile has both architectures and archMap", field=field)
    native = _ARCHES.get(arch, ("", ""))[1]
    for entry in table:
        if not isinstance(entry, dict):
            raise InvalidArgument("the profile's archMap is not a list of objects", field=field)
        if entry.get("architecture") == native:
            return [native, *_list(entry, "subArchitectures", f"{field}: archMap")]
    return given
