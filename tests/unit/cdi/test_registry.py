"""Directories of CDI files: precedence, conflicts, changes, and what is said of a device that nobody describes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cri.cdi import registry
from cri.cdi.registry import Registry
from cri.errors import FailedPrecondition, InvalidArgument


def write(path: Path, kind: str = "v/c", every: str = "", **devices: str) -> Path:
    """A file whose devices set the variable WHO."""
    path.parent.mkdir(exist_ok=True)
    tree: dict[str, Any] = {
        "cdiVersion": "0.6.0",
        "kind": kind,
        "devices": [{"name": n, "containerEdits": {"env": [f"WHO={v}"]}} for n, v in devices.items()],
    }
    if every:
        tree["containerEdits"] = {"env": [f"EVERY={every}"]}
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def both(tmp_path: Path) -> Registry:
    return Registry((str(tmp_path / "etc"), str(tmp_path / "run")))


def env(found: Registry, *names: str) -> list[str]:
    return [variable for edits in found.resolve(names) for variable in edits.env or ()]


def test_later_directories_win_device_by_device(both: Registry, tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", every="etc", one="etc", two="etc")
    write(tmp_path / "run/z.json", every="run", one="run")
    assert env(both, "v/c=one") == ["EVERY=run", "WHO=run"]
    assert env(both, "v/c=two") == ["EVERY=etc", "WHO=etc"]


def test_edits_of_a_file_once_and_before_its_first_device(both: Registry, tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", every="a", one="1", two="2")
    write(tmp_path / "etc/b.yaml", kind="w/c", three="3")
    assert env(both, "v/c=two", "w/c=three", "v/c=one") == ["EVERY=a", "WHO=2", "WHO=3", "WHO=1"]


def test_two_files_of_one_directory_that_describe_a_device(both: Registry, tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", one="a", two="a")
    write(tmp_path / "etc/b.json", one="b")
    with pytest.raises(FailedPrecondition, match=r"v/c=one \(described by both .*b\.json and .*a\.json\)"):
        env(both, "v/c=one")
    assert env(both, "v/c=two") == ["WHO=a"]
    write(tmp_path / "run/c.json", one="run")
    assert env(both, "v/c=one") == ["WHO=run"]


def test_what_is_missing_is_named(both: Registry, tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", one="a")
    (tmp_path / "etc/broken.json").write_text("{")
    (tmp_path / "etc/odd.yaml").write_text("cdiVersion: 0.6.0\nkind: v/c\ndevices: []\n")
    os.mkfifo(tmp_path / "etc/fifo.json")
    (tmp_path / "etc/link.json").symlink_to("nowhere")
    (tmp_path / "etc/notes.txt").write_text("not read")
    with pytest.raises(FailedPrecondition) as raised:
        env(both, "v/c=one", "v/c=absent", "w/c=none")
    text = str(raised.value)
    assert text.startswith("unresolvable CDI devices v/c=absent, w/c=none; looked in ")
    unusable = ("broken.json: not JSON", "odd.yaml: devices: empty", "fifo.json: not a regular")
    for part in (str(tmp_path / "etc"), str(tmp_path / "run"), *unusable):
        assert part in text
    assert "notes" not in text


def test_changes_are_seen(both: Registry, tmp_path: Path) -> None:
    path = write(tmp_path / "etc/a.json", one="a")
    assert env(both, "v/c=one") == ["WHO=a"]
    write(path, one="b")
    assert env(both, "v/c=one") == ["WHO=b"]
    path.unlink()
    with pytest.raises(FailedPrecondition):
        env(both, "v/c=one")
    write(tmp_path / "run/a.json", one="c")
    assert env(both, "v/c=one") == ["WHO=c"]


def test_unchanged_files_are_not_parsed_again(both: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "etc/a.json", one="a")
    env(both, "v/c=one")
    monkeypatch.setattr(registry, "parse", lambda *_: pytest.fail("parsed again"))
    assert env(both, "v/c=one") == ["WHO=a"]


def test_requested() -> None:
    annotations = {"cdi.k8s.io/b": "v/c=2,v/c=3", "cdi.k8s.io/a": "v/c=1", "other": "x"}
    assert registry.requested(["v/c=3", "v/c=0", "v/c=3"], annotations) == ["v/c=3", "v/c=0", "v/c=1", "v/c=2"]
    with pytest.raises(InvalidArgument, match=r"^config\.CDI_devices\[1\]\.name: 'x' is not"):
        registry.requested(["v/c=3", "x"], {})
    with pytest.raises(InvalidArgument, match=r"^config\.annotations\['cdi\.k8s\.io/a'\]: "):
        registry.requested([], {"cdi.k8s.io/a": "v/c=1, v/c=2"})


def test_survey(both: Registry, tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", one="a", two="a")
    write(tmp_path / "etc/b.json", one="b")
    (tmp_path / "etc/c.json").write_text("{")
    devices, problems = both.survey()
    assert devices == ["v/c=two"]
    assert [problem.rpartition("/")[2] for problem in problems] == ["c.json: not JSON: " + problems[0].partition("JSON: ")[2], "a.json"]
