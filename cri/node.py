"""What this node and its configuration offer, and the RPCs that say so: Version, Status, RuntimeConfig, UpdateRuntimeConfig."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from cri import __version__
from cri.cdi.registry import Registry as CdiRegistry
from cri.config import Config, Handler
from cri.containers.blockio import ClassFile
from cri.errors import FailedPrecondition, InvalidArgument, StartError
from cri.network.base import Network
from cri.spec import base
from cri.spec.inputs import HandlerConfig, HostFacts
from cri.supervisor import Supervisor
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci.spec import Rlimit

NAME: Final = "cri-shim"
PATIENCE: Final = 2.0  # seconds that Status waits for what is about to be known
_KUBE_VERSION: Final = "0.1.0"  # of the kubelet's own version negotiation; every runtime answers so


@dataclass(frozen=True, slots=True)
class Node:
    """The machine and the configuration, as far as pods and containers depend on them."""

    config: Config
    host: HostFacts
    handlers: Mapping[str, HandlerConfig]  # by name; "" is the default and always there
    cdi: CdiRegistry | None  # None: switched off
    blockio: ClassFile

    @classmethod
    def of(cls, config: Config, host: HostFacts) -> Node:
        """Raises StartError for what the configuration names and cannot be used."""
        runtime = config.runtime
        handlers = {name: _handler(name, handler, host) for name, handler in runtime.handlers.items()}
        cdi = CdiRegistry(runtime.cdi_spec_dirs) if runtime.enable_cdi else None
        classes = ClassFile(runtime.blockio_config_file, ignore_missing=runtime.ignore_blockio_not_enabled_errors)
        try:
            classes.load()
        except FailedPrecondition as error:
            raise StartError(f"runtime.blockio_config_file: {error}") from None
        return cls(config, host, handlers, cdi, classes)


def _handler(name: str, handler: Handler, host: HostFacts) -> HandlerConfig:
    settings = msgspec.structs.asdict(handler)
    path = settings.pop("base_runtime_spec")
    settings["rlimits"] = tuple(Rlimit(kind, soft, hard) for kind, (soft, hard) in handler.rlimits.items())
    where = 'runtime.handlers.""' if not name else f"runtime.handlers.{name}"
    if path:
        try:
            settings["base"] = base.parse(host.read(path))
        except OSError as error:
            raise StartError(f"{where}.base_runtime_spec: {path}: {error.strerror}") from None
        except Failure as failure:
            raise StartError(f"{where}.base_runtime_spec: {path}: {failure}") from None
    made = HandlerConfig(**settings)
    most = int(host.read("/proc/sys/fs/nr_open")) if made.rlimits or made.base else 0
    for limit in (*made.rlimits, *(made.base.process.rlimits if made.base else ())):
        if limit.type == "RLIMIT_NOFILE" and limit.hard > most:
            raise StartError(f"{where}: RLIMIT_NOFILE {limit.hard} is above this kernel's fs.nr_open, {most}")
    return made


def version() -> v1.VersionResponse:
    """Who answers, and in which version of CRI."""
    return v1.VersionResponse(version=_KUBE_VERSION, runtime_name=NAME, runtime_version=__version__, runtime_api_version="v1")


async def status(node: Node, *, verbose: bool, supervisor: Supervisor, network: Network) -> v1.StatusResponse:
    """RuntimeReady and NetworkReady, what each handler can do, and with ``verbose`` the effective configuration."""
    # A kubelet that hears "not ready" starts no pods until it asks again, five seconds later: right after a start of ours, or while a
    # supervisor is being replaced, the answer is worth waiting for.
    deadline = time.monotonic() + PATIENCE
    while (not (alive := supervisor.pid > 0) or network.status().pending) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    connected = network.status()
    users = not node.host.no_user_namespaces
    response = v1.StatusResponse(
        status=v1.RuntimeStatus(
            conditions=[
                v1.RuntimeCondition(
                    type="RuntimeReady",
                    status=alive,
                    reason="" if alive else "SupervisorNotReady",
                    message="" if alive else "the supervisor is being replaced",
                ),
                v1.RuntimeCondition(type="NetworkReady", status=connected.ready, reason=connected.reason, message=connected.message),
            ]
        ),
        runtime_handlers=[
            v1.RuntimeHandler(
                name=name,
                features=v1.RuntimeHandlerFeatures(recursive_read_only_mounts=node.host.recursive_read_only, user_namespaces=users),
            )
            for name in sorted(node.handlers)
        ],
        features=v1.RuntimeFeatures(supplemental_groups_policy=True, user_namespaces_host_network=users, mount_options=True),
    )
    if verbose:
        response.info["config"] = json.dumps(msgspec.to_builtins(node.config, enc_hook=str))
        host = node.host
        response.info["host"] = json.dumps(
            {
                "cgroupVersion": host.cgroup_version,
                "cgroupDriver": host.cgroup_driver,
                "kernel": ".".join(map(str, host.kernel)),
                "seccomp": host.seccomp,
                "apparmor": host.apparmor,
                "selinux": host.selinux,
                "userNamespaces": host.no_user_namespaces or "available",
            }
        )
    return response


def runtime_config(node: Node) -> v1.RuntimeConfigResponse:
    """The cgroup driver; a kubelet that asks takes it over."""
    driver = v1.SYSTEMD if node.host.cgroup_driver == "systemd" else v1.CGROUPFS
    return v1.RuntimeConfigResponse(linux=v1.LinuxRuntimeConfiguration(cgroup_driver=driver))


def update_runtime_config(request: v1.UpdateRuntimeConfigRequest, *, network: Network) -> v1.UpdateRuntimeConfigResponse:
    """The pod CIDR that the cluster gave to this node; an empty one says nothing."""
    cidr = request.runtime_config.network_config.pod_cidr
    if cidr:
        for part in cidr.split(","):
            try:
                ipaddress.ip_network(part.strip())
            except ValueError as e:
                raise InvalidArgument(str(e), field="runtime_config.network_config.pod_cidr") from None
        network.update_pod_cidr(cidr)
    return v1.UpdateRuntimeConfigResponse()
