from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cri.containers.list import list_containers
from cri.containers.model import Container, Containers, container_name, exit_reason
from cri.containers.status import container_status, status
from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.pods.model import Pod, Pods
from cri.pods.status import status as pod_status
from cri.state import records
from cri.state.layout import Layout
from cri.state.records import ContainerFacts, PodFacts, Resolved
from protos.runtime.v1 import api_pb2 as v1
from shim.oci.bundle import ExitRecord


class Table:
    def __init__(self, directory: Path) -> None:
        layout = Layout(directory / "root", directory / "state")
        layout.prepare()
        self.pods = Pods(layout)
        self.containers = Containers(layout, self.pods)
        self.pod = self.add_pod(1)

    def add_pod(self, number: int) -> Pod:
        config = v1.PodSandboxConfig(metadata=v1.PodSandboxMetadata(name=f"p{number}", namespace="ns", uid="u"))
        pod = Pod(PodFacts(id=f"{number:064x}", boot_id="b", created_at=1), config, records.config_json(config))
        self.pods.commit(pod)
        return pod

    def add(self, number: int, pod: Pod | None = None, labels: dict[str, str] | None = None, **facts: object) -> Container:
        pod = pod or self.pod
        config = v1.ContainerConfig(metadata=v1.ContainerMetadata(name=f"c{number}"), labels=labels or {})
        config.image.image = "busybox"
        made = Container(
            ContainerFacts(id=f"{number:064x}", pod_id=pod.id, boot_id="b", **facts),  # type: ignore[arg-type]
            config,
            records.config_json(config),
            pod,
        )
        self.containers.commit(made)
        return made


@pytest.fixture
async def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


async def test_state_is_derived_from_facts(table: Table) -> None:
    one = table.add(1)
    facts = one.facts
    assert one.state == v1.CONTAINER_UNKNOWN
    facts.created_at = 5
    assert one.state == v1.CONTAINER_CREATED
    with pytest.raises(FailedPrecondition, match="CONTAINER_CREATED"):
        one.require_running("exec")
    facts.started_at = 6
    assert (one.state, one.running) == (v1.CONTAINER_RUNNING, True)
    one.require_running("exec")
    facts.finished_at = 7
    assert (one.state, one.running) == (v1.CONTAINER_EXITED, False)
    with pytest.raises(FailedPrecondition, match="CONTAINER_EXITED"):
        one.require_running("exec")


@pytest.mark.parametrize(
    "record, reason",
    [
        (ExitRecord(0, 1), "Completed"),
        (ExitRecord(3, 1), "Error"),
        (ExitRecord(137, 1, oom_killed=True), "OOMKilled"),
        (ExitRecord(255, 1, reason="Unknown"), "Unknown"),
        (ExitRecord(0, 1, oom_killed=True), "OOMKilled"),
    ],
)
def test_reasons(record: ExitRecord, reason: str) -> None:
    assert exit_reason(record) == reason


async def test_an_exit_is_folded_once(table: Table) -> None:
    one = table.add(1, created_at=5, started_at=10, pid=4)
    table.containers.exit_reported(one.id, ExitRecord(7, 20, message="m"))
    table.containers.exit_reported(one.id, ExitRecord(0, 30))
    facts = one.facts
    assert (facts.exit_code, facts.finished_at, facts.reason, facts.message, facts.pid) == (7, 20, "Error", "m", 0)
    assert one.ended.is_set()
    await asyncio.sleep(0.1)
    [(saved, _, _)] = list(table.containers.records.load())
    assert saved.finished_at == 20


async def test_no_container_ends_before_it_began(table: Table) -> None:
    one = table.add(1, created_at=5, started_at=10)
    table.containers.exit_reported(one.id, ExitRecord(0, 3))
    assert one.facts.finished_at == 10


async def test_an_exit_before_the_commit_is_kept_for_it(table: Table) -> None:
    assert table.containers.exit_reported(f"{9:064x}", ExitRecord(5, 20)) is None
    assert table.add(9, created_at=2).state == v1.CONTAINER_EXITED
    for number in range(5000):
        table.containers.exit_reported(f"{number:x}", ExitRecord(5, 20))
    assert len(table.containers._early) == 1024


async def test_filters(table: Table) -> None:
    other = table.add_pod(2)
    table.add(1, created_at=1, labels={"app": "a", "x": "1"})
    table.add(2, created_at=1, started_at=2, labels={"app": "a"})
    table.add(3, other, created_at=1, started_at=2, finished_at=3)

    def found(**fields: object) -> list[str]:
        question = v1.ContainerFilter(**fields)  # type: ignore[arg-type]
        return [c.metadata.name for c in list_containers(question, containers=table.containers, pods=table.pods).containers]

    assert found() == ["c1", "c2", "c3"]
    assert found(pod_sandbox_id=table.pod.id) == ["c1", "c2"]
    assert found(pod_sandbox_id="f" * 64) == []
    assert found(label_selector={"app": "a"}) == ["c1", "c2"]
    assert found(label_selector={"app": "a", "x": "1"}) == ["c1"]
    assert found(state=v1.ContainerStateValue(state=v1.CONTAINER_CREATED)) == ["c1"]
    assert found(state=v1.ContainerStateValue(state=v1.CONTAINER_RUNNING)) == ["c2"]
    assert found(state=v1.ContainerStateValue(state=v1.CONTAINER_EXITED), pod_sandbox_id=other.id) == ["c3"]
    assert found(id=f"{2:064x}", pod_sandbox_id=other.id) == []
    assert found(id=f"{2:064x}") == ["c2"]


async def test_every_change_reaches_every_answer(table: Table) -> None:
    one = table.add(1, created_at=5, started_at=6)

    def seen() -> tuple[int, int, int]:
        lists = list_containers(v1.ContainerFilter(), containers=table.containers, pods=table.pods)
        pod = pod_status(table.pod.id, verbose=False, pods=table.pods)
        return lists.containers[0].state, container_status(one).state, pod.containers_statuses[0].state

    assert seen() == (v1.CONTAINER_RUNNING,) * 3
    table.containers.exit_reported(one.id, ExitRecord(0, 9))
    assert seen() == (v1.CONTAINER_EXITED,) * 3
    table.containers.forget(one)
    assert not list_containers(v1.ContainerFilter(), containers=table.containers, pods=table.pods).containers
    assert not pod_status(table.pod.id, verbose=False, pods=table.pods).containers_statuses
    assert list(table.containers.records.load()) == []


async def test_status(table: Table) -> None:
    one = table.add(
        1,
        created_at=5,
        image_ref="r@sha256:1",
        image_id="sha256:2",
        image_name="docker.io/library/busybox:latest",
        log_path="/l",
        stop_signal=10,
        user=Resolved(5, 6, [7, 8]),
    )
    reply = status(one.id, verbose=False, containers=table.containers).status
    assert (reply.image_ref, reply.image_id) == ("r@sha256:1", "sha256:2")
    assert reply.image.image == "docker.io/library/busybox:latest"
    assert (reply.log_path, reply.stop_signal) == ("/l", v1.SIGNAL_SIGUSR1)
    assert (reply.user.linux.uid, reply.user.linux.gid, list(reply.user.linux.supplemental_groups)) == (5, 6, [7, 8])
    verbose = status(one.id, verbose=True, containers=table.containers)
    assert f'"sandboxID": "{table.pod.id}"' in verbose.info["info"]
    with pytest.raises(NotFound):
        status("f" * 64, verbose=False, containers=table.containers)


def test_names() -> None:
    assert container_name("p", v1.ContainerMetadata(name="a", attempt=1)) != container_name("p", v1.ContainerMetadata(name="a", attempt=2))
    assert container_name("p", v1.ContainerMetadata(name="a")) != container_name("q", v1.ContainerMetadata(name="a"))
    for bad in ("", "a\nb", "a\0"):
        with pytest.raises(InvalidArgument):
            container_name("p", v1.ContainerMetadata(name=bad))
