from __future__ import annotations

from pathlib import Path

import pytest

from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.pods.list import list_pods
from cri.pods.model import Pod, Pods, pod_name
from cri.pods.status import status
from cri.state import records
from cri.state.layout import Layout
from cri.state.records import PodFacts
from protos.runtime.v1 import api_pb2 as v1


def pod(number: int, *, labels: dict[str, str] | None = None, host_network: bool = False, **facts: object) -> Pod:
    config = v1.PodSandboxConfig(
        metadata=v1.PodSandboxMetadata(name=f"p{number}", namespace="ns", uid=f"u{number}"),
        labels=labels or {},
        annotations={"a": "b"},
        linux=v1.LinuxPodSandboxConfig(
            security_context=v1.LinuxSandboxSecurityContext(
                namespace_options=v1.NamespaceOption(network=v1.NODE if host_network else v1.POD, pid=v1.CONTAINER)
            )
        ),
    )
    return Pod(PodFacts(id=f"{number:064x}", boot_id="b", **facts), config, records.config_json(config))  # type: ignore[arg-type]


@pytest.fixture
def pods(tmp_path: Path) -> Pods:
    layout = Layout(tmp_path / "root", tmp_path / "state")
    layout.prepare()
    return Pods(layout)


def test_state_is_derived_from_facts() -> None:
    assert pod(1).state == v1.SANDBOX_NOTREADY
    ready = pod(1, created_at=5)
    assert (ready.state, ready.ready) == (v1.SANDBOX_READY, True)
    ready.stopping = True
    assert (ready.state, ready.ready) == (v1.SANDBOX_READY, False)
    with pytest.raises(FailedPrecondition, match="being stopped"):
        ready.require_ready()
    stopped = pod(1, created_at=5, stopped_at=6)
    assert (stopped.state, stopped.ready) == (v1.SANDBOX_NOTREADY, False)
    with pytest.raises(FailedPrecondition, match="is stopped"):
        stopped.require_ready()


@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
def test_control_characters_in_metadata_are_refused(field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        pod_name(v1.PodSandboxMetadata(**{"name": "n", field: "a\nb"}))


def test_a_name_is_required() -> None:
    with pytest.raises(InvalidArgument, match="metadata"):
        pod_name(v1.PodSandboxMetadata())


def test_names_tell_attempts_apart() -> None:
    names = {pod_name(v1.PodSandboxMetadata(name="a", namespace="b", uid="c", attempt=n)) for n in range(3)}
    assert len(names) == 3


def test_addresses_primary_first_and_gone_when_stopped(pods: Pods) -> None:
    one = pod(1, created_at=5, ips=["10.0.0.2", "fd00::2", "fd00::3"])
    pods.commit(one)
    network = status(one.id, verbose=False, pods=pods).status.network
    assert network.ip == "10.0.0.2"
    assert [ip.ip for ip in network.additional_ips] == ["fd00::2", "fd00::3"]
    one.facts.stopped_at = 9
    pods.save(one)
    stopped = status(one.id, verbose=False, pods=pods).status
    assert (stopped.network.ip, stopped.state) == ("", v1.SANDBOX_NOTREADY)


def test_status_names_what_was_asked_for(pods: Pods) -> None:
    one = pod(1, created_at=5, runtime_handler="x", netns_path="/run/ns", pid=77)
    pods.commit(one)
    reply = status(one.id[:63] + "1", verbose=True, pods=pods)
    assert reply.status.metadata.name == "p1"
    assert reply.status.annotations == {"a": "b"}
    assert reply.status.runtime_handler == "x"
    assert reply.status.linux.namespaces.options.pid == v1.CONTAINER
    assert '"pid": 77' in reply.info["info"]
    assert '{"type": "network", "path": "/run/ns"}' in reply.info["info"]
    assert reply.timestamp > 0
    assert not status(one.id, verbose=False, pods=pods).info
    with pytest.raises(NotFound):
        status("f" * 64, verbose=False, pods=pods)


def test_filters(pods: Pods) -> None:
    pods.commit(pod(1, created_at=1, labels={"app": "a", "x": "1"}))
    pods.commit(pod(2, created_at=1, stopped_at=2, labels={"app": "a"}))
    pods.commit(pod(3, created_at=1))

    def found(**fields: object) -> list[str]:
        reply = list_pods(v1.PodSandboxFilter(**fields), pods=pods)  # type: ignore[arg-type]
        return [item.metadata.name for item in reply.items]

    assert found() == ["p1", "p2", "p3"]
    assert found(label_selector={"app": "a"}) == ["p1", "p2"]
    assert found(label_selector={"app": "a", "x": "1"}) == ["p1"]
    assert found(state=v1.PodSandboxStateValue(state=v1.SANDBOX_READY)) == ["p1", "p3"]
    assert found(state=v1.PodSandboxStateValue(state=v1.SANDBOX_NOTREADY), label_selector={"app": "a"}) == ["p2"]
    assert found(id=f"{2:064x}") == ["p2"]
    assert found(id="9") == []
    assert found(id=f"{2:064x}", state=v1.PodSandboxStateValue(state=v1.SANDBOX_READY)) == []


def test_cached_lists_follow_changes(pods: Pods) -> None:
    one = pod(1, created_at=1)
    pods.commit(one)
    first = list_pods(v1.PodSandboxFilter(), pods=pods)
    assert list_pods(v1.PodSandboxFilter(), pods=pods) is first
    one.facts.stopped_at = 3
    pods.save(one)
    assert list_pods(v1.PodSandboxFilter(), pods=pods).items[0].state == v1.SANDBOX_NOTREADY
    pods.forget(one)
    assert not list_pods(v1.PodSandboxFilter(), pods=pods).items
