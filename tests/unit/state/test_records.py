from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.state import records
from cri.state.records import ContainerFacts, PodFacts, Records, Resolved
from protos.runtime.v1 import api_pb2 as v1

ID = "ab" * 32


def pods(directory: Path) -> Records[PodFacts, v1.PodSandboxConfig]:
    return Records(directory, PodFacts, v1.PodSandboxConfig)


def config() -> v1.PodSandboxConfig:
    return v1.PodSandboxConfig(
        metadata=v1.PodSandboxMetadata(name="web", namespace="default", uid="u1", attempt=3),
        labels={"app": "ü", "b": '"'},
        linux=v1.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_forward": "1"}),
    )


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    table = pods(tmp_path)
    facts = PodFacts(id=ID, boot_id="b", created_at=17, ips=["10.0.0.2", "fd00::2"], network={"a": [1, {"b": None}]}, stages={"x": 3})
    table.write(facts, records.config_json(config()))
    [(read, read_config, raw)] = list(table.load())
    assert read == facts
    assert read_config == config()
    assert raw == records.config_json(config()) or json.loads(bytes(raw)) == json.loads(bytes(records.config_json(config())))


def test_a_record_is_for_people_too(tmp_path: Path) -> None:
    table = pods(tmp_path)
    table.write(PodFacts(id=ID, boot_id="b", created_at=17), records.config_json(config()))
    document = json.loads((tmp_path / f"{ID}.json").read_text())
    assert document["format"] == 1
    assert document["facts"]["created_at"] == 17
    assert document["config"]["metadata"] == {"name": "web", "namespace": "default", "uid": "u1", "attempt": 3}
    assert (tmp_path / f"{ID}.json").stat().st_mode & 0o777 == 0o600


def test_rewriting_leaves_one_file(tmp_path: Path) -> None:
    table = pods(tmp_path)
    facts = PodFacts(id=ID, boot_id="b")
    for stopped in range(3):
        facts.stopped_at = stopped
        table.write(facts, records.config_json(config()))
    assert os.listdir(tmp_path) == [f"{ID}.json"]
    assert next(iter(table.load()))[0].stopped_at == 2
    table.remove(ID)
    table.remove(ID)
    assert os.listdir(tmp_path) == []


def good() -> bytes:
    return records.encode(PodFacts(id=ID, boot_id="b", created_at=1), records.config_json(config()))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        good()[:-40],
        b"\0" * 4096,
        b"[]",
        b'{"format": 2, "facts": {}, "config": {}}',
        b'{"format": 1, "facts": {"id": 5}, "config": {}}',
        good().replace(b'"attempt": 3', b'"attempt": "x"'),
        good().replace(ID.encode(), b"cd" * 32),
    ],
    ids=["empty", "truncated", "zeros", "list", "newer", "wrong-type", "wrong-config", "other-id"],
)
def test_a_damaged_record_is_set_aside_and_named(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{ID}.json").write_bytes(damage)
    other = "cc" * 32
    table = pods(tmp_path)
    table.write(PodFacts(id=other, boot_id="b"), records.config_json(config()))
    with caplog.at_level(logging.ERROR):
        assert [facts.id for facts, _, _ in table.load()] == [other]
    assert sorted(os.listdir(tmp_path)) == sorted([f"{ID}.json.corrupt", f"{other}.json"])
    assert (tmp_path / f"{ID}.json.corrupt").read_bytes() == damage
    assert str(tmp_path / f"{ID}.json") in caplog.text


@given(cut=st.integers(min_value=0, max_value=len(good()) - 2))
def test_every_truncation_is_noticed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("r")
    (directory / f"{ID}.json").write_bytes(good()[:cut])
    table = pods(directory)
    assert list(table.load()) == []
    table.close()


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{ID}.json.new").write_bytes(b"half")
    assert list(pods(tmp_path).load()) == []
    assert os.listdir(tmp_path) == []


def test_a_record_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(good())
    directory = tmp_path / "pods"
    directory.mkdir()
    (directory / f"{ID}.json").symlink_to(tmp_path / "elsewhere")
    assert list(pods(directory).load()) == []


def test_container_facts(tmp_path: Path) -> None:
    table = Records(tmp_path, ContainerFacts, v1.ContainerConfig)
    facts = ContainerFacts(id=ID, pod_id="p", boot_id="b", user=Resolved(1, 2, [3]), exit_code=-1, finished_at=5, reason="Error")
    wanted = v1.ContainerConfig(envs=[v1.KeyValue(key="K", value=b"\xff\x00v")])
    table.write(facts, records.config_json(wanted))
    [(read, read_config, _)] = list(table.load())
    assert read == facts
    assert read_config == wanted
