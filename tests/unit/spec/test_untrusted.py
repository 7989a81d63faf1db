"""ATTACKS.md, "Users, capabilities, seccomp" and "Untrusted strings", as far as a specification decides them: one test per row.

The same attacks against the live daemon are in tests/attacks/.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cri.errors import InvalidArgument
from cri.images.model import ImageConfig
from cri.spec import files, sandbox
from cri.spec.inputs import HandlerConfig, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import codec
from shim.oci.spec import Spec
from tests.unit.spec.conftest import Build

NEWLINES = ("\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029")


def number(value: int) -> v1.Int64Value:
    return v1.Int64Value(value=value)


class TestUsers:
    @pytest.mark.parametrize("name", ["1000", "0001000"])
    def test_cve_2016_3697_a_number_is_an_id_before_it_is_a_name(self, build: Build, name: str) -> None:
        for spec in (build(image=ImageConfig(user=name)), build(context={"run_as_username": name})):
            assert spec.process.user.uid == 1000

    @pytest.mark.parametrize(
        ("user", "add", "privileged"), list(itertools.product([None, 0, 1000], [[], ["ALL"], ["SYS_ADMIN"]], [False, True]))
    )
    def test_cve_2022_24769_nothing_is_inheritable(self, build: Build, user: int | None, add: list[str], privileged: bool) -> None:
        context: dict[str, Any] = {"capabilities": v1.Capability(add_capabilities=add), "privileged": privileged}
        if user is not None:
            context["run_as_user"] = number(user)
        host = HostFacts(devices=lambda _: ())
        capabilities = build(context=context, pod_context={"privileged": True}, host=host).process.capabilities
        assert capabilities is not None
        assert capabilities.inheritable == capabilities.ambient == ()

    @pytest.mark.parametrize(
        "user", ["2147483648", "4294967295", "4294967296", "9" * 36, "36" * 9, "-1", "+1", "-0", "1000:-1", "0:4294967296"]
    )
    def test_cve_2024_40635_ids_do_not_wrap_around(self, build: Build, user: str) -> None:
        with pytest.raises(InvalidArgument, match=r"^image config\.User"):
            build(image=ImageConfig(user=user))
        with pytest.raises(InvalidArgument, match=r"run_as_username"):
            build(context={"run_as_username": user})

    @pytest.mark.parametrize("value", [-1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
    def test_cve_2024_40635_in_numbers(self, build: Build, value: int) -> None:
        for context in (
            {"run_as_user": number(value)},
            {"run_as_user": number(0), "run_as_group": number(value)},
            {"supplemental_groups": [value]},
        ):
            with pytest.raises(InvalidArgument, match=rf"id {value} is outside"):
                build(context=context)

    @pytest.mark.parametrize("digits", ["١٠٠٠", "１０００", "¹"])
    def test_digits_of_other_scripts_are_names(self, build: Build, digits: str) -> None:
        user = build(image=ImageConfig(user=digits)).process.user
        assert (user.uid, user.username) == (0, digits)  # the image's passwd will not know it, and the create fails

    @pytest.mark.parametrize("profile", [b"", b" ", b"\n", b"{}", b"null", b"[]", b'{"defaultAction":""}'])
    def test_cve_2023_2431_an_empty_profile_is_not_unconfined(self, build: Build, profile: bytes) -> None:
        wanted = v1.SecurityProfile(profile_type=v1.SecurityProfile.Localhost, localhost_ref="/p")
        with pytest.raises(InvalidArgument, match=r"seccomp\.localhost_ref"):
            build(context={"seccomp": wanted}, host=HostFacts(read=lambda _: profile))


class TestUntrustedStrings:
    @pytest.mark.parametrize("value", ["1+kernel.core_pattern=|/evil", "0\nkernel.core_pattern=|/evil", "1\0", "1+"])
    def test_cve_2022_0811_one_value_is_one_setting(self, value: str) -> None:
        pod = v1.PodSandboxConfig(linux=v1.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_forward": value}))
        with pytest.raises(InvalidArgument, match=r"^config\.linux\.sysctls"):
            sandbox.build("id", pod, netns_path="/n", host=HostFacts())

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"network": v1.NODE}, "net.ipv4.ip_forward"),
            ({"network": v1.NODE}, "net/ipv4/ip_forward"),
            ({"ipc": v1.NODE}, "kernel.msgmax"),
            ({"ipc": v1.NODE}, "fs/mqueue/msg_max"),
            ({}, "kernel.core_pattern"),
            ({}, "kernel/core_pattern"),
            ({}, "net/../../kernel/core_pattern"),
            ({}, "net.ipv4.conf.all/../../../kernel/core_pattern"),
        ],
    )
    def test_cve_2022_0532_the_hosts_sysctls_are_the_hosts(self, options: dict[str, Any], name: str) -> None:
        context = v1.LinuxSandboxSecurityContext(namespace_options=v1.NamespaceOption(**options))
        pod = v1.PodSandboxConfig(linux=v1.LinuxPodSandboxConfig(sysctls={name: "1"}, security_context=context))
        with pytest.raises(InvalidArgument, match=r"^config\.linux\.sysctls"):
            sandbox.build("id", pod, netns_path="/n", host=HostFacts())

    @pytest.mark.parametrize("newline", NEWLINES)
    def test_cve_2022_4318_no_string_brings_its_own_line(self, build: Build, newline: str) -> None:
        evil = f"/x{newline}root::0:0::/:/bin/sh"
        with pytest.raises(InvalidArgument, match="working_dir"):
            build({"working_dir": evil})
        with pytest.raises(InvalidArgument, match="WorkingDir"):
            build(image=ImageConfig(working_dir=evil))
        with pytest.raises(InvalidArgument, match="hostname"):
            build(pod={"hostname": evil})
        for field in ("servers", "searches", "options"):
            with pytest.raises(InvalidArgument, match=rf"dns_config\.{field}"):
                files.resolv_conf(v1.DNSConfig(**{field: [evil]}), HostFacts())
        with pytest.raises(InvalidArgument, match="container_path"):
            build({"mounts": [v1.Mount(container_path=evil, host_path="/h")]})
        with pytest.raises(InvalidArgument, match="Volumes"):
            build(volumes={evil: "/v"})

    @pytest.mark.parametrize("newline", ["\n", "\r"])
    def test_cve_2022_4318_home(self, build: Build, newline: str) -> None:
        with pytest.raises(InvalidArgument, match="HOME"):
            build({"envs": [v1.KeyValue(key="HOME", value=f"/r{newline}x".encode())]})
        with pytest.raises(InvalidArgument, match="HOME"):
            build(image=ImageConfig(env=(f"HOME=/r{newline}x",)))

    def test_cve_2023_6476_annotations_pass_by_whole_name(self, build: Build) -> None:
        handler = HandlerConfig(pod_annotations=("io.example/allowed",), container_annotations=("io.example/allowed",))
        notes = {"io.example/allowed.evil": "1", "io.example/allowe": "1", "org.systemd.property.ExecStart": "['/evil']"}
        spec = build({"annotations": notes}, pod={"annotations": notes}, handler=handler)
        assert not spec.annotations.keys() & notes.keys()

    def test_cve_2026_53488_image_labels_do_nothing(self, build: Build) -> None:
        labels = {"io.kubernetes.cri.container-type": "sandbox", "org.opencontainers.image.runtime": "x", "com.docker.oci-hooks": "/evil"}
        handler = HandlerConfig(pod_annotations=tuple(labels), container_annotations=tuple(labels))
        assert build(image=ImageConfig(labels=labels), handler=handler) == build(handler=handler)

    def test_cve_2021_43784_a_mebibyte_of_environment_arrives_whole(self, build: Build) -> None:
        spec = build({"envs": [v1.KeyValue(key="BIG", value=b"x" * (1 << 20))]})
        assert codec.decode(Spec, codec.encode(spec)).process.env[-1] == "BIG=" + "x" * (1 << 20)

    @pytest.mark.parametrize("parent", ["../x", "/a/../../b", "/a\nb", "/a\0b"])
    def test_cgroup_parents_stay_in_the_hierarchy(self, build: Build, parent: str) -> None:
        with pytest.raises(InvalidArgument, match="cgroup_parent"):
            build(pod={"linux": v1.LinuxPodSandboxConfig(cgroup_parent=parent)})

    @pytest.mark.parametrize("key", ["../cgroup.procs", "/cgroup.procs", "memory.max/x", "cgroup", ".", "memory..", "a.b\n"])
    def test_unified_keys_are_files_of_the_group(self, build: Build, key: str) -> None:
        with pytest.raises(InvalidArgument, match=r"resources\.unified"):
            build({"resources": v1.LinuxContainerResources(unified={key: "1"})})

    def test_malformed_image_environment_takes_nothing_from_the_daemon(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CVE_2020_14370", "secret")
        spec = build(image=ImageConfig(env=("CVE_2020_14370", "=", "=x", "OK=1")))
        assert [e for e in spec.process.env if not e.startswith(("PATH=", "HOSTNAME="))] == ["OK=1"]

    @pytest.mark.parametrize("path", ["/proc", "/proc/sys", "/sys", "/sys/fs/cgroup", "/dev", "/dev/null", "/", "/var/../proc", "proc"])
    def test_cve_2023_27561_volumes_do_not_replace_kernel_file_systems(self, build: Build, path: str) -> None:
        with pytest.raises(InvalidArgument, match=r"config\.Volumes"):
            build(volumes={path: "/v"})
