"""What runs: arguments, environment, working directory, user. The rules are Docker's, as the kubelet expects them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cri.errors import InvalidArgument
from cri.images.model import ImageConfig
from cri.spec import strings
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "xterm"
MAX_ID = 2**31 - 1  # CVE-2024-40635: beyond int32 an id wrapped around to root

_CONTEXT = "config.linux.security_context"
_INTEGER = re.compile(r"[+-]?[0-9]+")


def args(config: v1.ContainerConfig, image: ImageConfig) -> tuple[str, ...]:
    """A command replaces the image's ENTRYPOINT and CMD, arguments alone replace CMD."""
    command: Sequence[str] = strings.texts(config.command, "config.command")
    arguments: Sequence[str] = strings.texts(config.args, "config.args")
    if not command:
        command = strings.texts(image.entrypoint, "image config.Entrypoint")
        if command == ("",):  # how a builder says "no entrypoint"
            command = ()
        if not arguments:
            arguments = strings.texts(image.cmd, "image config.Cmd")
    result = (*command, *arguments)
    if not result or not result[0]:
        raise InvalidArgument("no command specified, and the image has none", field="config.command")
    return result


def env(config: v1.ContainerConfig, image: ImageConfig, hostname: str) -> tuple[str, ...]:
    """PATH, TERM with a tty, HOSTNAME; then the image's and at last the request's variables, each in the place of its first mention."""
    merged = {"PATH": PATH}
    if config.tty:
        merged["TERM"] = TERM
    merged["HOSTNAME"] = hostname
    for i, entry in enumerate(image.env):
        name, separator, value = strings.text(entry, f"image config.Env[{i}]").partition("=")
        # An entry without "=" names a variable of the builder's environment; there is none here (CVE-2020-14370 took the host's).
        if name and separator:
            merged[name] = value
    for i, pair in enumerate(config.envs):
        field = f"config.envs[{i}]"
        if not pair.key or "=" in pair.key:
            raise InvalidArgument(f"{pair.key!r:.80} is not the name of a variable", field=f"{field}.key")
        # Bytes in CRI: what is not UTF-8 travels as os.fsdecode's surrogates up to the execve.
        merged[strings.text(pair.key, f"{field}.key")] = _value(pair.value, f"{field}.value").decode("utf-8", "surrogateescape")
    if any(c in merged.get("HOME", "") for c in "\n\r"):  # CVE-2022-4318
        raise InvalidArgument("HOME contains a newline", field="config.envs")
    return tuple(f"{name}={value}" for name, value in merged.items())


def _value(value: bytes, field: str) -> bytes:
    if b"\0" in value:
        raise InvalidArgument("contains a NUL", field=field)
    return value


def cwd(config: v1.ContainerConfig, image: ImageConfig) -> str:
    """The working directory. An image's is relative to the root; a request's must be absolute."""
    if config.working_dir:
        return strings.absolute(config.working_dir, "config.working_dir")
    return strings.clean(strings.line(image.working_dir, "image config.WorkingDir"))


def user(context: v1.LinuxContainerSecurityContext, image: ImageConfig) -> oci.User:
    """The user to resolve inside the root: the request's name or number (with its group), else the image's, else root."""
    name, source = context.run_as_username, f"{_CONTEXT}.run_as_username"
    if not name and context.HasField("run_as_user"):
        name, source = str(_id(context.run_as_user.value, f"{_CONTEXT}.run_as_user")), f"{_CONTEXT}.run_as_user"
    if context.HasField("run_as_group"):
        group = _id(context.run_as_group.value, f"{_CONTEXT}.run_as_group")
        if not name:
            raise InvalidArgument(f"group {group} is specified without a user", field=f"{_CONTEXT}.run_as_group")
        name = f"{name}:{group}"
    if not name:
        name, source = image.user, "image config.User"
    groups = dict.fromkeys(_id(g, f"{_CONTEXT}.supplemental_groups[{i}]") for i, g in enumerate(context.supplemental_groups))
    uid, gid = parse_user(name, source)
    return oci.User(uid=uid, gid=gid, additional_gids=tuple(groups), username=name, groups_policy=_policy(context))


def parse_user(name: str, field: str) -> tuple[int, int]:
    """Check ``user[:group]`` and return what it says in numbers, 0 for a name that only the root knows.

    A number is never a name (CVE-2016-3697: a passwd entry called "1000" with uid 0), and one that does not fit is an error.
    """
    if not name:
        return 0, 0
    strings.word(name, field)
    parts = name.split(":")
    if len(parts) > 2 or not all(parts):
        raise InvalidArgument(f"{name!r:.80} is not of the form user[:group]", field=field)
    numbers = [_number(part, field) for part in parts]
    return numbers[0] or 0, (numbers[1] or 0) if len(numbers) == 2 else 0


def _number(part: str, field: str) -> int | None:
    if not _INTEGER.fullmatch(part):
        if "/" in part:
            raise InvalidArgument(f"{part!r:.80} is no name", field=field)
        return None
    if part[0] in "+-" or len(part) > 10:  # also keeps int() from converting megabytes of digits
        raise InvalidArgument(f"id {part:.40} is outside 0..{MAX_ID}", field=field)
    return _id(int(part), field)


def _id(number: int, field: str) -> int:
    if not 0 <= number <= MAX_ID:
        raise InvalidArgument(f"id {number} is outside 0..{MAX_ID}", field=field)
    return number


def _policy(context: v1.LinuxContainerSecurityContext) -> oci.GroupsPolicy:
    if context.supplemental_groups_policy == v1.Merge:
        return oci.GroupsPolicy.MERGE
    if context.supplemental_groups_policy == v1.Strict:
        return oci.GroupsPolicy.STRICT
    raise InvalidArgument("unknown policy", field=f"{_CONTEXT}.supplemental_groups_policy")


def exec_process(base: oci.Process, command: Iterable[str], *, tty: bool, user: oci.User | None = None) -> oci.Process:
    """The process of an exec session in a container whose own is ``base``; ``user`` is the container's, resolved."""
    arguments = strings.texts(command, "cmd")
    if not arguments or not arguments[0]:
        raise InvalidArgument("nothing to run", field="cmd")
    variables = base.env
    if tty and not any(v.startswith("TERM=") for v in variables):
        variables = (*variables, f"TERM={TERM}")
    return replace(base, args=arguments, env=variables, terminal=tty, console_size=None, user=user or base.user)
