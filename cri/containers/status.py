"""ContainerStatus, and what lists show."""

from __future__ import annotations

import json
from typing import Any

from cri.containers import refusals
from cri.containers.model import STATE_NAMES, Container, Containers
from cri.errors import FailedPrecondition
from cri.spec import strings
from cri.spec.stop_signal import to_cri as cri_signal
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import bundle


def status(container_id: str, *, verbose: bool, containers: Containers) -> v1.ContainerStatusResponse:
    """The container as the kubelet sees it. Raises NotFound."""
    container = containers.get(container_id)
    response = v1.ContainerStatusResponse(status=container_status(container))
    if verbose:
        response.info["info"] = json.dumps(_info(container, containers))
    return response


def container_status(container: Container) -> v1.ContainerStatus:
    """Built once per change. The message is shared: nobody may change it."""
    if container.status is None:
        container.status = _build(container)
    return container.status


def _build(container: Container) -> v1.ContainerStatus:
    facts, config = container.facts, container.config
    built = v1.ContainerStatus(
        id=container.id,
        metadata=config.metadata,
        state=container.state,
        created_at=facts.created_at,
        started_at=facts.started_at,
        finished_at=facts.finished_at,
        exit_code=facts.exit_code,
        reason=facts.reason,
        message=facts.message,
        image=config.image,
        image_ref=facts.image_ref,
        image_id=facts.image_id,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=facts.log_path,
        stop_signal=cri_signal(facts.stop_signal),
    )
    built.image.image = facts.image_name or config.image.image
    for mount in built.mounts:
        if mount.HasField("image"):
            mount.image.image_ref = facts.image_volumes.get(strings.clean(mount.container_path), "")
    if config.linux.HasField("resources"):
        built.resources.linux.CopyFrom(config.linux.resources)
    user = facts.user
    if user is not None:
        built.user.linux.uid, built.user.linux.gid = user.uid, user.gid
        built.user.linux.supplemental_groups.extend(user.groups)
    return built


def listed(container: Container) -> v1.Container:
    """The container as ListContainers shows it. Shared like ``container_status``."""
    if container.listed is None:
        facts, config = container.facts, container.config
        container.listed = v1.Container(
            id=container.id,
            pod_sandbox_id=container.pod.id,
            metadata=config.metadata,
            image=config.image,
            image_ref=facts.image_ref,
            image_id=facts.image_id,
            state=container.state,
            created_at=facts.created_at,
            labels=config.labels,
            annotations=config.annotations,
        )
    return container.listed


def _info(container: Container, containers: Containers) -> dict[str, Any]:
    """What crictl inspect and scripts written for containerd look for."""
    facts = container.facts
    directory = containers.layout.bundle(container.id)
    counted = refusals.read(containers.layout, container.id)
    return {
        "sandboxID": container.pod.id,
        "pid": facts.pid if not facts.finished_at else 0,
        "state": STATE_NAMES.get(container.state, "unknown"),
        "removing": container.removing,
        "runtimeHandler": container.pod.facts.runtime_handler,
        "bundle": str(directory),
        "record": str(containers.records.path(container.id)),
        "logPath": facts.log_path,
        "cgroupsPath": facts.cgroups_path,
        "stagesMicroseconds": facts.stages,
        "config": json.loads(bytes(container.config_json)),
        "seccompRefused": counted.calls if counted is not None else {},
        "runtimeSpec": _spec(directory / bundle.CONFIG),
    }


def _spec(path: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None  # after a reboot: the bundle was in ``state``
    except (OSError, ValueError) as e:
        raise FailedPrecondition(f"spec {path} cannot be read: {e}") from None
