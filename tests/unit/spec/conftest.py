"""A container request to vary, and the build of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cri.images.model import ImageConfig
from cri.spec import container
from cri.spec.inputs import ContainerInputs, HandlerConfig, HostFacts, SandboxFiles
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import validate
from shim.oci.spec import Spec

Build = Callable[..., Spec]


def _inputs(
    config: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
    pod: dict[str, Any] | None = None,
    pod_context: dict[str, Any] | None = None,
    **changes: Any,
) -> ContainerInputs:
    linux: dict[str, Any] = {"resources": (config or {}).pop("resources", None)}
    if context is not None:
        linux["security_context"] = v1.LinuxContainerSecurityContext(**context)
    pod_linux = {"cgroup_parent": "/kubepods/pod1", "security_context": v1.LinuxSandboxSecurityContext(**pod_context or {})}
    return ContainerInputs(
        **{
            "container_id": "c" * 64,
            "config": v1.ContainerConfig(
                **{
                    "metadata": v1.ContainerMetadata(name="ctr"),
                    "image": v1.ImageSpec(image="busybox"),
                    "command": ["sh"],
                    "linux": v1.LinuxContainerConfig(**linux),
                }
                | (config or {})
            ),
            "pod": v1.PodSandboxConfig(
                **{
                    "metadata": v1.PodSandboxMetadata(name="pod", namespace="ns", uid="uid"),
                    "hostname": "pod-host",
                    "linux": v1.LinuxPodSandboxConfig(**pod_linux),
                }
                | (pod or {})
            ),
            "pod_id": "p" * 64,
            "files": SandboxFiles("/run/hosts", "/run/hostname", "/run/resolv.conf"),
            "image": ImageConfig(),
            "host": HostFacts(),
            "handler": HandlerConfig(),
        }
        | changes
    )


@pytest.fixture
def build() -> Build:
    """Builds a spec from changes to a plain request, and holds what comes out against the core's own rules."""

    def call(*args: Any, **kwargs: Any) -> Spec:
        spec = container.build(_inputs(*args, **kwargs))
        validate.validate(spec)
        return spec

    return call
