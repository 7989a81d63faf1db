"""A container's OCI specification: the one place where all rules meet."""

from __future__ import annotations

from cri.errors import InvalidArgument
from cri.spec import base, cdi, cgroups, devices, files, mounts, namespaces, process, resources, seccomp, security, selinux, strings
from cri.spec.inputs import ContainerInputs
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

OCI_VERSION = "1.2.0"
_PREFIX = "io.kubernetes.cri."


def build(inputs: ContainerInputs) -> oci.Spec:
    """What containerd's CRI plugin would hand to runc for the same request. Pure but for the functions of ``HostFacts``."""
    config, context = inputs.config, inputs.config.linux.security_context
    pod_options = inputs.pod.linux.security_context.namespace_options
    _check(config, inputs.pod)
    capabilities = security.capabilities(context, inputs.host)
    nodes, rules = devices.build(config, inputs.host, inputs.handler)
    mounted = mounts.build(inputs)
    users = namespaces.user_mappings(pod_options)
    labels = _labels(inputs)
    spec = oci.Spec(
        oci_version=OCI_VERSION,
        root=oci.Root("rootfs", readonly=context.readonly_rootfs),
        process=_process(inputs, capabilities, labels.process),
        mounts=mounted.mounts,
        hooks=inputs.handler.hooks,
        annotations=cri_annotations(inputs),
        linux=oci.Linux(
            namespaces=namespaces.of_container(
                context.namespace_options,
                pod_options,
                # Where v1 hierarchies are mounted the container sees its own groups bound in; a privileged one manages the host's, which
                # cannot be mounted from within a user namespace.
                own_cgroup=inputs.host.cgroup_version == 2 and (not context.privileged or users is not None),
            ),
            uid_mappings=users[:1] if users is not None else (),
            gid_mappings=users[1:] if users is not None else (),
            devices=nodes,
            cgroups_path=cgroups.path(inputs.pod.linux.cgroup_parent, inputs.container_id, inputs.host.cgroup_driver),
            resources=resources.build(config.linux.resources, inputs.host, devices=rules, block_io=inputs.block_io),
            rootfs_propagation=mounted.rootfs_propagation,
            seccomp=seccomp.with_notifier(
                security.seccomp(context, capabilities, inputs.host, inputs.handler), inputs.pod.annotations, inputs.handler.pod_annotations
            ),
            masked_paths=security.masked_paths(config.linux),
            readonly_paths=security.readonly_paths(config.linux),
            mount_label=labels.mount,
        ),
    )
    if inputs.handler.base is not None:
        spec = base.under(inputs.handler.base, spec)
    return cdi.apply(spec, inputs.cdi, inputs.host)


def _check(config: v1.ContainerConfig, pod: v1.PodSandboxConfig) -> None:
    """What concerns the whole request."""
    if config.linux.security_context.privileged and not pod.linux.security_context.privileged:
        raise InvalidArgument("set, but the sandbox is not privileged", field="config.linux.security_context.privileged")


def _labels(inputs: ContainerInputs) -> selinux.Labels:
    """What the container's options leave open is the pod's."""
    context, field = inputs.config.linux.security_context, "config.linux.security_context.selinux_options"
    selinux.check(context.selinux_options, field)
    if not inputs.host.selinux:
        return selinux.Labels("", "")
    options = v1.SELinuxOption()
    options.CopyFrom(inputs.pod.linux.security_context.selinux_options)
    options.MergeFrom(context.selinux_options)
    return selinux.labels(options, inputs.selinux_level, inputs.host.selinux_contexts, privileged=context.privileged, field=field)


def _process(inputs: ContainerInputs, capabilities: oci.Capabilities, label: str) -> oci.Process:
    config, context = inputs.config, inputs.config.linux.security_context
    adjust = resources.oom_score_adj(config.linux.resources) if config.linux.HasField("resources") else None
    return oci.Process(
        args=process.args(config, inputs.image),
        cwd=process.cwd(config, inputs.image),
        env=process.env(config, inputs.image, files.pod_hostname(inputs.pod, inputs.host)),
        terminal=config.tty,
        user=process.user(context, inputs.image),
        capabilities=capabilities,
        rlimits=inputs.handler.rlimits,
        no_new_privileges=context.no_new_privs,
        oom_score_adj=adjust,
        exec_cpu_affinity=resources.exec_affinity(config.linux.resources, inputs.handler.exec_cpu_affinity),
        apparmor_profile=security.apparmor(context, inputs.host),
        selinux_label=label,
    )


def cri_annotations(inputs: ContainerInputs) -> dict[str, str]:
    """containerd's names, for hooks and people; and what the handler passes through, by exact name.

    Labels and annotations of an image are not among them: they must never steer a runtime (CVE-2026-53488).
    """
    pod, config = inputs.pod, inputs.config
    own = {
        f"{_PREFIX}container-type": "container",
        f"{_PREFIX}sandbox-id": inputs.pod_id,
        f"{_PREFIX}sandbox-name": pod.metadata.name,
        f"{_PREFIX}sandbox-namespace": pod.metadata.namespace,
        f"{_PREFIX}sandbox-uid": pod.metadata.uid,
        f"{_PREFIX}container-name": config.metadata.name,
        f"{_PREFIX}image-name": inputs.image_name or config.image.user_specified_image or config.image.image,
    }
    passed = {k: pod.annotations[k] for k in inputs.handler.pod_annotations if k in pod.annotations}
    passed |= {k: config.annotations[k] for k in inputs.handler.container_annotations if k in config.annotations}
    return strings.string_map(passed | own, "config.annotations")
