"""Pod and container records: one JSON file each, written atomically, readable with ``cat``.

A record holds the CRI configuration (as protobuf JSON, field names as in the proto) and facts; states are derived from the facts
(``Pod.state``, ``Container.state``), never stored. Times are nanoseconds since the epoch, 0 meaning "has not happened".

Durability. A record is written to a temporary name and renamed, so a reader and a SIGKILL at any instruction see the old or the new
one. Nothing is fsynced: everything a record speaks of (processes, namespaces, mounts) dies with the power anyway, and two fsyncs
would cost more than the whole start of a container. What a power cut may leave is a truncated file; it is quarantined below, and the
resources it named are swept as leftovers. The first version of a record is a new name, which ext4 commits without the flush that it
forces on replacing a file (34 against 101 µs), which is why the intent of a pod lives in ``state`` and not here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from google.protobuf import json_format
from google.protobuf.message import Message

FORMAT = 1
SUFFIX = ".json"
_TEMPORARY = ".new"
_QUARANTINE = ".corrupt"
_LIMIT = 64 << 20  # two configurations of the largest gRPC message, in JSON

#: What a file that is no record raises, beside OSError.
UNREADABLE = (ValueError, msgspec.MsgspecError, json_format.ParseError)

log = logging.getLogger("cri.state")


class PodFacts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What has happened to a pod."""

    id: str
    boot_id: str
    runtime_handler: str = ""
    created_at: int = 0  # RunPodSandbox was about to answer; 0 in an intent
    stopped_at: int = 0  # NOTREADY since
    released_at: int = 0  # network and namespaces are gone
    pid: int = 0  # PID 1 of a pod that shares its PID namespace
    netns_path: str = ""  # empty: the host's network
    selinux_level: str = ""  # of its containers' labels, where the host has SELinux
    ips: list[str] = []
    network: dict[str, object] = {}  # detail from the network, for verbose status
    stages: dict[str, int] = {}  # microseconds each stage of RunPodSandbox took


class Resolved(msgspec.Struct, omit_defaults=True):
    """The user a container's process runs as, as resolved inside its root."""

    uid: int = 0
    gid: int = 0
    groups: list[int] = []


class ContainerFacts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What has happened to a container."""

    id: str
    pod_id: str
    boot_id: str
    image_id: str = ""
    image_ref: str = ""
    image_name: str = ""  # a tag for people; what the request called the image if it has none
    image_volumes: dict[str, str] = {}  # destination → image id
    log_path: str = ""
    stop_signal: int = 15  # number
    cgroups_path: str = ""
    user: Resolved | None = None
    pid: int = 0
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    released_at: int = 0  # the runtime core has forgotten it: cgroup and processes are gone
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    stages: dict[str, int] = {}  # microseconds each stage of CreateContainer took


Facts = TypeVar("Facts", PodFacts, ContainerFacts)
Config = TypeVar("Config", bound=Message)


class _Document(msgspec.Struct, Generic[Facts], kw_only=True):
    format: int
    facts: Facts
    config: msgspec.Raw


class _Versioned(msgspec.Struct):
    format: int


def config_json(config: Message) -> msgspec.Raw:
    """A CRI message as the JSON that records embed. Encoded once per object: configurations hardly change, facts do."""
    return msgspec.Raw(json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None).encode())


def encode(facts: PodFacts | ContainerFacts, config: msgspec.Raw) -> bytes:
    """The bytes of a record file."""
    return msgspec.json.format(msgspec.json.encode(_Document(format=FORMAT, facts=facts, config=config)), indent=1) + b"\n"


class Records(Generic[Facts, Config]):
    """The record files of one kind of object, in one directory."""

    def __init__(self, directory: Path, facts: type[Facts], config: type[Config]) -> None:
        self._directory = directory
        self._config = config
        self._decoder: msgspec.json.Decoder[_Document[Facts]] = decoder_for(facts)
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def path(self, object_id: str) -> Path:
        return self._directory / (object_id + SUFFIX)

    def write(self, facts: Facts, config: msgspec.Raw) -> None:
        """Write or replace the record of ``facts.id``."""
        write_file(self._fd, facts.id + SUFFIX, encode(facts, config))

    def remove(self, object_id: str) -> None:
        """Forget the record; forgetting nothing is fine."""
        try:
            os.unlink(object_id + SUFFIX, dir_fd=self._fd)
        except FileNotFoundError:
            return

    def load(self) -> Iterator[tuple[Facts, Config, msgspec.Raw]]:
        """Every readable record. One that is not is renamed aside, with a line in the log that says where and why."""
        for name in sorted(os.listdir(self._fd)):
            if name.endswith(_TEMPORARY):
                os.unlink(name, dir_fd=self._fd)  # a writer died before its rename: the old record counts
                continue
            if not name.endswith(SUFFIX):
                continue
            try:
                yield self._read(name)
            except (OSError, *UNREADABLE) as e:
                self._quarantine(name, e)

    def _read(self, name: str) -> tuple[Facts, Config, msgspec.Raw]:
        facts, config, raw = parse(self._decoder, read_file(self._fd, name), self._config())
        if facts.id + SUFFIX != name:
            raise ValueError(f"record says it belongs to {facts.id}")
        return facts, config, raw

    def _quarantine(self, name: str, error: Exception) -> None:
        os.rename(name, name + _QUARANTINE, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        log.error(
            "record %s cannot be used (%s): moved to %s; what it named is released as a leftover",
            self._directory / name,
            error,
            name + _QUARANTINE,
        )


def decoder_for(facts: type[Facts]) -> msgspec.json.Decoder[_Document[Facts]]:
    """A decoder of record files, for records outside a ``Records`` directory (a pod's intent)."""
    return msgspec.json.Decoder(_Document[facts])  # type: ignore[valid-type]


def parse(decoder: msgspec.json.Decoder[_Document[Facts]], data: bytes, config: Config) -> tuple[Facts, Config, msgspec.Raw]:
    """Facts, configuration and its JSON from the bytes of a record file. Raises ValueError or its kin with what is wrong."""
    if not data.strip():
        raise ValueError("empty file")
    version = msgspec.json.decode(data, type=_Versioned).format
    if version > FORMAT:
        raise ValueError(f"format {version} is newer than this program's {FORMAT}")
    document = decoder.decode(data)
    raw = msgspec.Raw(bytes(document.config))  # a copy: the decoded one is a view that keeps the whole file alive
    json_format.Parse(bytes(raw), config, ignore_unknown_fields=True)
    return document.facts, config, raw


def read_file(dirfd: int, name: str) -> bytes:
    """The content of a record file, refused when it is too large to be one."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dirfd)
    with open(fd, "rb") as f:
        data = f.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise ValueError(f"larger than {_LIMIT} bytes")
    return data


def write_file(dirfd: int, name: str, data: bytes) -> None:
    """Write ``name`` atomically. One writer per record, so the temporary name is fixed and a torn leftover is overwritten."""
    temporary = name + _TEMPORARY
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dirfd)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
