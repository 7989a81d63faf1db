"""CreateContainer: root, volumes, mount sources, bundle, process waiting for its start, record."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from cri import relabel
from cri.cdi.model import Edits
from cri.containers import cdi, hostpaths, image_volumes, logs
from cri.containers.model import Container, Containers, container_name
from cri.errors import AlreadyExists, FailedPrecondition, ImageNotFound, InvalidArgument
from cri.images.model import Image
from cri.images.store import Images
from cri.node import Node
from cri.pods.model import Pod, Pods, now
from cri.pods.run import new_id, remove_directory, remove_tree
from cri.spec import container as spec_container
from cri.spec.inputs import ContainerInputs, SandboxFiles
from cri.spec.stop_signal import stop_signal
from cri.state import records
from cri.state.operations import Operation
from cri.state.records import ContainerFacts, Resolved
from cri.supervisor import Supervisor
from cri.undo import Undo
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci import bundle
from shim.oci.spec import Spec

MAX_VOLUMES: Final = 256  # of an image


async def create(
    request: v1.CreateContainerRequest,
    *,
    pods: Pods,
    containers: Containers,
    supervisor: Supervisor,
    images: Images,
    node: Node,
    timeout: float | None = None,
) -> str:
    """The id of a container that waits for its start; a retry gets the id of the first call, in flight or done."""
    pod = pods.get(request.pod_sandbox_id)
    pod.require_ready()
    name = container_name(pod.id, request.config.metadata)
    existing = containers.store.named(name)
    if existing is not None:
        if existing.state == v1.CONTAINER_CREATED and existing.config == request.config:
            return existing.id
        state = v1.ContainerState.Name(existing.state)
        raise AlreadyExists(f"container name {name!r} belongs to {existing.id} in {state} state", hint="remove that container first")
    maker = _Maker(pod, request, containers, supervisor, images, node)
    return await containers.operations.run(name, new_id, request, maker.make, timeout=timeout)


class _Maker:
    """One CreateContainer call at work."""

    def __init__(
        self,
        pod: Pod,
        request: v1.CreateContainerRequest,
        containers: Containers,
        supervisor: Supervisor,
        images: Images,
        node: Node,
    ) -> None:
        self.pod, self.containers, self.supervisor, self.images = pod, containers, supervisor, images
        self.node = node
        self.config = v1.ContainerConfig()
        self.config.CopyFrom(request.config)

    async def make(self, operation: Operation) -> str:
        self.pod.creating.add(operation.id)
        try:
            async with Undo(f"create container {self.config.metadata.name}") as undo:
                await self._make(operation, undo)
        finally:
            self.pod.creating.discard(operation.id)
        operation.enter("answer")
        return operation.id

    async def _make(self, operation: Operation, undo: Undo) -> None:
        container_id, config, pod = operation.id, self.config, self.pod
        image = self._image()
        facts = ContainerFacts(
            id=container_id,
            pod_id=pod.id,
            boot_id=pod.facts.boot_id,
            image_id=image.id,
            image_ref=image.ref,
            image_name=image.repo_tags[0] if image.repo_tags else config.image.user_specified_image or config.image.image,
            log_path=logs.container_log_path(pod.config, config),
        )
        target = self._target()
        edits = await cdi.edits(config, self.node)
        shown = image_volumes.find(config, self.images)
        facts.image_volumes = {one.destination: one.image.id for one in shown}

        operation.enter("mount sources")
        await hostpaths.ensure(config.mounts)
        log_path = logs.core_path(facts.log_path, pod.config)
        logs.make_directory(log_path)

        operation.enter("root file system")
        undo.push("release snapshot", partial(self.images.release, container_id))
        recipe = await self.images.prepare(image, container_id, [one.image for one in shown])
        volumes = self._volumes(container_id, image, undo)

        operation.enter("bundle")
        directory = self.containers.layout.bundle(container_id)
        spec = self._spec(container_id, image, volumes, facts.image_volumes, edits)
        facts.stop_signal = stop_signal(config, image.config)
        facts.cgroups_path = spec.linux.cgroups_path
        await cdi.move_interfaces(edits, pod, self.supervisor)
        undo.push("remove bundle", partial(remove_directory, directory))
        if shown:
            recipe = replace(recipe, volumes=image_volumes.recipes(shown, self.images, labelled=bool(spec.linux.mount_label)))
        if label := spec.linux.mount_label:
            await relabel.volumes(config.mounts, label)
            for volume in volumes.values():
                await relabel.directory(volume, label)
            recipe = replace(recipe, options=(*recipe.options, f"context={label}"))
        bundle.write(directory, spec, recipe, stdin=config.stdin, tty=config.tty)

        operation.enter("process")
        undo.push("delete container", partial(self.supervisor.delete_container, container_id))
        try:
            created = await self.supervisor.create_container(
                container_id,
                pod.id,
                bundle=directory,
                log_path=log_path,
                tty=config.tty,
                stdin=config.stdin,
                stdin_once=config.stdin_once,
                target=target,
            )
        except Failure as failure:
            raise image_volumes.explain(failure, shown) or failure from None
        facts.pid = created.pid
        facts.user = Resolved(created.user.uid, created.user.gid, list(created.user.additional_gids))

        operation.enter("record")
        pod.require_ready()  # StopPodSandbox may have begun meanwhile; it waits for this very call to be undone
        facts.created_at = now()
        facts.stages = operation.took
        undo.push("remove record", partial(self.containers.records.remove, container_id))
        container = Container(facts, config, records.config_json(config), pod)
        container.process = spec.process
        self.containers.commit(container)

    def _image(self) -> Image:
        reference = self.config.image.image
        if not reference:
            raise InvalidArgument("must not be empty", field="config.image.image")
        image = self.images.get(reference)
        if image is None:
            raise ImageNotFound(f"image {reference!r} is not on this node", hint="pull it first")
        if image.artifact_type:
            raise InvalidArgument(
                f"{reference!r:.200} is an artifact ({image.artifact_type!r:.100}), no container image",
                field="config.image.image",
                hint="mount it as an image volume",
            )
        self.images.require_trusted(image, self.config.image.user_specified_image or reference)
        return image

    def _target(self) -> str | None:
        """The container whose PID namespace this one joins, if any: of the same pod, and alive."""
        options = self.config.linux.security_context.namespace_options
        if options.pid != v1.TARGET:
            return None
        target = self.containers.get(options.target_id)
        if target.pod is not self.pod:
            raise InvalidArgument(
                f"container {target.id} is in another sandbox", field="config.linux.security_context.namespace_options.target_id"
            )
        if not target.running:
            raise FailedPrecondition(f"target container {target.id} is not running")
        return target.id

    def _volumes(self, container_id: str, image: Image, undo: Undo) -> dict[str, str]:
        """A host directory for each VOLUME of the image that the pod does not mount over."""
        mounted = {os.path.normpath(m.container_path) for m in self.config.mounts}
        wanted = [v for v in image.config.volumes if os.path.normpath(v) not in mounted]
        if not wanted:
            return {}
        if len(wanted) > MAX_VOLUMES:  # an image could name a million, each a directory and a mount made while others wait
            raise InvalidArgument(f"{len(wanted)} volumes, more than {MAX_VOLUMES}", field="image config.Volumes")
        base = self.containers.layout.container_volumes(container_id)
        undo.push("remove volumes", partial(remove_tree, base))
        os.mkdir(base, 0o700)
        made: dict[str, str] = {}
        for number, path in enumerate(wanted):
            directory: Path = base / str(number)
            os.mkdir(directory, 0o755)
            made[path] = str(directory)
        return made

    def _spec(
        self, container_id: str, image: Image, volumes: dict[str, str], image_mounts: dict[str, str], edits: tuple[Edits, ...]
    ) -> Spec:
        directory = self.containers.layout.pod(self.pod.id)
        return spec_container.build(
            ContainerInputs(
                container_id=container_id,
                config=self.config,
                pod=self.pod.config,
                pod_id=self.pod.id,
                files=SandboxFiles(
                    hosts=str(directory / "hosts"), hostname=str(directory / "hostname"), resolv_conf=str(directory / "resolv.conf")
                ),
                image=image.config,
                volumes=volumes,
                selinux_level=self.pod.facts.selinux_level,
                image_mounts=image_mounts,
                cdi=edits,
                block_io=self.node.blockio.of(self.config, self.pod.config),
                host=self.node.host,
                # A handler that has left the configuration since the pod began: its containers get the defaults.
                handler=self.node.handlers.get(self.pod.facts.runtime_handler, self.node.handlers[""]),
            )
        )
