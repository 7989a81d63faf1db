"""GetContainerEvents over the socket."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, wait_for

Event = v1.ContainerEventResponse
CREATED, STARTED = v1.CONTAINER_CREATED_EVENT, v1.CONTAINER_STARTED_EVENT
STOPPED, DELETED = v1.CONTAINER_STOPPED_EVENT, v1.CONTAINER_DELETED_EVENT


class Watch:
    """A subscriber that reads into a queue; ``error`` is what its stream ended with."""

    def __init__(self, daemon: Daemon) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.error: grpc.RpcError | None = None
        self._call = daemon.runtime.GetContainerEvents(v1.GetEventsRequest())
        self._call.initial_metadata()  # it comes once nothing is missed any more
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for event in self._call:
                self.events.put(event)
        except grpc.RpcError as error:
            self.error = error

    def next(self, seconds: float = 10) -> Event:
        return self.events.get(timeout=seconds)

    def of(self, object_id: str, kind: int) -> Event:
        """The next event, which must be this one."""
        event = self.next()
        assert (event.container_id, event.container_event_type) == (object_id, kind)
        return event

    def ended(self, seconds: float = 10) -> grpc.RpcError:
        self._reader.join(seconds)
        assert self.error is not None
        return self.error

    def close(self) -> None:
        self._call.cancel()
        self._reader.join(10)


@pytest.fixture
def watch(daemon: Daemon) -> Iterator[Watch]:
    watch = Watch(daemon)
    yield watch
    watch.close()


def test_the_life_of_a_pod(daemon: Daemon, busybox: str, watch: Watch) -> None:
    pod, config = daemon.run_pod()
    event = watch.of(pod, CREATED)
    assert event.pod_sandbox_status.metadata == config.metadata
    assert event.pod_sandbox_status.state == v1.SANDBOX_READY
    assert event.pod_sandbox_status.network.ip
    watch.of(pod, STARTED)

    container = daemon.create((pod, config), busybox, "sh", "-c", "sleep 0.3; exit 3")
    event = watch.of(container, CREATED)
    assert [(c.id, c.state) for c in event.containers_statuses] == [(container, v1.CONTAINER_CREATED)]
    assert event.pod_sandbox_status.id == pod

    daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
    [status] = watch.of(container, STARTED).containers_statuses
    assert (status.state, status.started_at > 0) == (v1.CONTAINER_RUNNING, True)
    [status] = watch.of(container, STOPPED).containers_statuses
    assert (status.state, status.exit_code, status.reason) == (v1.CONTAINER_EXITED, 3, "Error")

    daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
    assert list(watch.of(container, DELETED).containers_statuses) == []
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=20)
    assert watch.of(pod, STOPPED).pod_sandbox_status.state == v1.SANDBOX_NOTREADY
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=20)
    event = watch.of(pod, DELETED)
    assert event.pod_sandbox_status.metadata.uid == config.metadata.uid
    assert watch.events.empty()


def test_short_containers_start_before_they_stop(daemon: Daemon, busybox: str, watch: Watch) -> None:
    """The exit of a short process may overtake the answer to its start; times of events still grow."""
    pod = daemon.run_pod()
    watch.of(pod[0], CREATED)
    last = watch.of(pod[0], STARTED).created_at
    for _ in range(10):
        container = daemon.run(pod, busybox, "true")
        for kind in (CREATED, STARTED, STOPPED):
            event = watch.of(container, kind)
            assert event.created_at > last
            last = event.created_at


def test_a_start_that_fails_is_an_end(daemon: Daemon, busybox: str, watch: Watch) -> None:
    pod = daemon.run_pod()
    watch.of(pod[0], CREATED)
    watch.of(pod[0], STARTED)
    container = daemon.create(pod, busybox, "/does/not/exist")
    watch.of(container, CREATED)
    with pytest.raises(grpc.RpcError):
        daemon.runtime.StartContainer(v1.StartContainerRequest(container_id=container), timeout=10)
    [status] = watch.of(container, STOPPED).containers_statuses
    assert status.state == v1.CONTAINER_EXITED
    assert watch.events.empty()


def test_removing_a_pod_tells_all_of_it(daemon: Daemon, busybox: str, watch: Watch) -> None:
    pod = daemon.run_pod()
    container = daemon.run(pod, busybox, "sleep", "1000")
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod[0]), timeout=20)
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod[0]), timeout=20)
    seen = [(e.container_id, e.container_event_type) for e in (watch.next() for _ in range(8))]
    assert seen == [
        (pod[0], CREATED),
        (pod[0], STARTED),
        (container, CREATED),
        (container, STARTED),
        (container, STOPPED),
        (pod[0], STOPPED),
        (container, DELETED),
        (pod[0], DELETED),
    ]


def test_every_subscriber_gets_everything(daemon: Daemon, watch: Watch) -> None:
    second = Watch(daemon)
    pod, _ = daemon.run_pod()
    for each in (watch, second):
        each.of(pod, CREATED)
        each.of(pod, STARTED)
    second.close()
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=20)
    watch.of(pod, STOPPED)


def test_a_subscriber_that_does_not_read_is_dropped(daemon: Daemon, busybox: str, watch: Watch) -> None:
    """It is told so; the daemon keeps at most so many events for it, and others are not held up."""
    pod = daemon.run_pod(annotations={"large": "x" * 200_000})
    idle = daemon.runtime.GetContainerEvents(v1.GetEventsRequest())
    idle.initial_metadata()
    container = daemon.create(pod, busybox, "true")
    deadline = time.monotonic() + 60
    while "a subscriber is dropped" not in daemon.tail(400):
        assert time.monotonic() < deadline, "it was not dropped"
        daemon.runtime.RemoveContainer(v1.RemoveContainerRequest(container_id=container), timeout=10)
        container = daemon.create(pod, busybox, "true")
    with pytest.raises(grpc.RpcError) as failed:
        for _ in idle:
            pass
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert watch.error is None


def test_a_client_that_goes_away_leaves_nothing(daemon: Daemon) -> None:
    for _ in range(20):
        Watch(daemon).close()
    assert daemon.run_pod()


def test_the_end_of_the_daemon_ends_the_stream(daemon: Daemon, busybox: str) -> None:
    """Well within the grace that the server has."""
    watch = Watch(daemon)
    process = daemon.process
    assert process is not None
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    error = watch.ended()
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in error.details()
    wait_for("the end of the daemon", lambda: process.poll() is not None)
    assert time.monotonic() - began < 2.5
    daemon.process = None
    daemon.disconnect()
    daemon.start()
    again = Watch(daemon)
    pod, _ = daemon.run_pod()
    again.of(pod, CREATED)
    again.close()
