"""Pods: namespaces, sysctls, hostname, files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import files, sandbox
from cri.spec.inputs import HandlerConfig, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import validate
from shim.oci.sandbox import Sandbox
from shim.oci.spec import IDMapping
from shim.oci.spec import NamespaceType as N

PLAIN = HandlerConfig(unprivileged_ports=False, unprivileged_icmp=False)
HOST_FILES = {"/etc/hosts": b"1.2.3.4 host\n", "/etc/resolv.conf": b"nameserver 9.9.9.9\n"}
HOST = HostFacts(hostname="node", read=HOST_FILES.__getitem__)


def config(sysctls: dict[str, str] | None = None, **options: Any) -> v1.PodSandboxConfig:
    context = v1.LinuxSandboxSecurityContext(namespace_options=v1.NamespaceOption(**options))
    return v1.PodSandboxConfig(
        hostname="" if options.get("network") == v1.NODE else "pod",
        linux=v1.LinuxPodSandboxConfig(cgroup_parent="/kubepods", security_context=context, sysctls=sysctls),
    )


def build(pod: v1.PodSandboxConfig, handler: HandlerConfig = PLAIN, host: HostFacts = HOST) -> Sandbox:
    made = sandbox.build("id", pod, netns_path="/run/netns/id", userns_path="/run/userns/id", host=host, handler=handler)
    validate.validate_sandbox(made)
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pid": v1.CONTAINER}, Sandbox("id", (N.NETWORK, N.UTS, N.IPC), "pod", "/run/netns/id", shm_size=64 << 20)),
        ({}, Sandbox("id", (N.NETWORK, N.UTS, N.IPC, N.PID), "pod", "/run/netns/id", shm_size=64 << 20, cgroups_path="/kubepods/id")),
        ({"network": v1.NODE, "pid": v1.NODE, "ipc": v1.NODE}, Sandbox("id", ())),
        ({"network": v1.NODE, "pid": v1.CONTAINER}, Sandbox("id", (N.IPC,), shm_size=64 << 20)),
        ({"ipc": v1.NODE, "pid": v1.NODE}, Sandbox("id", (N.NETWORK, N.UTS), "pod", "/run/netns/id")),
    ],
)
def test_namespaces(options: dict[str, Any], expected: Sandbox) -> None:
    assert build(config(**options)) == expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"network": v1.CONTAINER}, "network"),
        ({"network": v1.TARGET}, "network"),
        ({"ipc": v1.CONTAINER}, "ipc"),
        ({"pid": v1.TARGET}, "pid"),
        ({"userns_options": v1.UserNamespace(mode=v1.NODE, uids=[v1.IDMapping(length=1)])}, "userns_options"),
    ],
)
def test_namespaces_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^config\.linux\.security_context\.namespace_options\.{field}"):
        build(config(**options))


def ids(container: int = 0, host: int = 200000, length: int = 65536) -> v1.IDMapping:
    return v1.IDMapping(container_id=container, host_id=host, length=length)


def test_user_namespace() -> None:
    users = v1.UserNamespace(mode=v1.POD, uids=[ids()], gids=[ids()])
    made = build(config(userns_options=users))
    assert N.USER in made.namespaces
    assert made.uid_mappings == made.gid_mappings == (IDMapping(0, 200000, 65536),)
    assert made.userns_path == "", "it is found through the network namespace"
    assert build(config(userns_options=users, network=v1.NODE)).userns_path == "/run/userns/id"
    assert N.USER not in build(config(userns_options=v1.UserNamespace(mode=v1.NODE))).namespaces
    assert N.USER not in build(config()).namespaces
    with pytest.raises(FailedPrecondition, match=r"userns_options: this kernel is old"):
        sandbox.build("id", config(userns_options=users), netns_path="/n", host=HostFacts(no_user_namespaces="this kernel is old"))


@pytest.mark.parametrize(
    ("users", "field"),
    [
        ({"uids": [ids(), ids(host=400000)], "gids": [ids()]}, "uids"),
        ({"uids": [ids()], "gids": []}, "gids"),
        ({"uids": [], "gids": []}, "uids"),
        ({"uids": [ids(container=1)], "gids": [ids(container=1)]}, r"uids\[0\].container_id"),
        ({"uids": [ids(length=0)], "gids": [ids(length=0)]}, r"uids\[0\].length"),
        ({"uids": [ids(host=2**32 - 10)], "gids": [ids(host=2**32 - 10)]}, r"uids\[0\].length"),
        ({"uids": [ids()], "gids": [ids(host=300000)]}, "gids"),
        ({"mode": v1.CONTAINER}, "mode"),
        ({"mode": v1.TARGET, "uids": [ids()], "gids": [ids()]}, "mode"),
        ({"mode": 17}, "mode"),
        ({"mode": v1.NODE, "uids": [ids()], "gids": [ids()]}, ""),
    ],
)
def test_user_namespaces_refused(users: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"namespace_options\.userns_options(\.{field})?: "):
        build(config(userns_options=v1.UserNamespace(**users)))


def test_no_user_namespace_with_the_hosts_pids() -> None:
    with pytest.raises(InvalidArgument, match=r"namespace_options\.pid"):
        build(config(userns_options=v1.UserNamespace(uids=[ids()], gids=[ids()]), pid=v1.NODE))


def test_default_sysctls_give_way_to_the_request() -> None:
    on = HandlerConfig()
    port, ping = "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"
    assert build(config(), on).sysctl == {port: "0", ping: "0 2147483647"}
    assert build(config({port: "80"}), on).sysctl == {port: "80", ping: "0 2147483647"}
    slashed = port.replace(".", "/")
    assert build(config({slashed: "80"}), on).sysctl == {slashed: "80", ping: "0 2147483647"}
    assert build(config(network=v1.NODE), on).sysctl == {}


def test_no_router_advertisements() -> None:
    """CVE-2020-10749; a request may want them."""
    every, new = "net.ipv6.conf.all.accept_ra", "net.ipv6.conf.default.accept_ra"
    found = build(config(), host=replace(HOST, ipv6=True)).sysctl
    assert (found[every], found[new]) == ("0", "0")
    assert build(config({new: "2"}), host=replace(HOST, ipv6=True)).sysctl[new] == "2"
    assert every not in build(config()).sysctl
    assert build(config(network=v1.NODE), host=replace(HOST, ipv6=True)).sysctl == {}


@pytest.mark.parametrize(
    "sysctls",
    [
        {"net.core.somaxconn": "1024"},
        {"net/ipv4/conf/eth0.100/forwarding": "1"},
        {"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "5"},
        {"kernel.sem": "250\t32000 100 128"},
    ],
)
def test_sysctls(sysctls: dict[str, str]) -> None:
    assert build(config(sysctls)).sysctl == sysctls


@pytest.mark.parametrize(
    ("sysctls", "options"),
    [
        ({"kernel.core_pattern": "|/bin/x"}, {}),
        ({"kernel.shmx": "1"}, {}),  # a prefix is not enough
        ({"vm.swappiness": "1"}, {}),
        ({"net.ipv4.ip_forward": "1+kernel.core_pattern=|/x"}, {}),  # CVE-2022-0811
        ({"net.ipv4.ip_forward+kernel.core_pattern": "1"}, {}),
        ({"net.ipv4.ip_forward": "1\nx"}, {}),
        ({"net.ipv4.ip_forward": ""}, {}),
        ({"net.ipv4.ip_forward=1": "1"}, {}),
        ({"net/../kernel/core_pattern": "1"}, {}),
        ({"net.ipv4.ip_forward": "1"}, {"network": v1.NODE}),  # CVE-2022-0532
        ({"kernel.shmmax": "1"}, {"ipc": v1.NODE}),
        ({"kernel.domainname": "x"}, {"network": v1.NODE}),
        ({"net.ipv4.ip_forward": "1", "net/ipv4/ip_forward": "0"}, {}),
        ({"": "1"}, {}),
    ],
)
def test_sysctls_refused(sysctls: dict[str, str], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"^config\.linux\.sysctls\["):
        build(config(sysctls, **options))


@given(st.text(max_size=40), st.text(max_size=10))
def test_whatever_passes_here_passes_the_core(name: str, value: str) -> None:
    try:
        build(config({name: value}))  # holds the result against shim.oci.validate
    except InvalidArgument:
        pass


@pytest.mark.parametrize("name", ["a b", "a\nb", "h" * 65, "a\0", "\u2028", "é" * 33])
def test_hostnames_refused(name: str) -> None:
    pod = config()
    pod.hostname = name
    with pytest.raises(InvalidArgument, match=r"^config\.hostname"):
        build(pod)


def dns(**fields: Any) -> bytes:
    return files.resolv_conf(v1.DNSConfig(**fields), HOST)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, b"nameserver 9.9.9.9\n"),
        ({"servers": ["10.0.0.10", "fe80::1%eth0"]}, b"nameserver 10.0.0.10\nnameserver fe80::1%eth0\n"),
        (
            {"servers": ["1.1.1.1"], "searches": ["a.svc", "b"], "options": ["ndots:5", "edns0"]},
            b"search a.svc b\nnameserver 1.1.1.1\noptions ndots:5 edns0\n",
        ),
        ({"searches": ["."]}, b"search .\n"),
    ],
)
def test_resolv_conf(fields: dict[str, Any], expected: bytes) -> None:
    assert dns(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"servers": ["1.1.1.1\nnameserver 6.6.6.6"]}, "servers[0]"),
        ({"servers": ["1.1.1.1", "dns.example"]}, "servers[1]"),
        ({"servers": [""]}, "servers[0]"),
        ({"searches": ["a\nnameserver 6.6.6.6"]}, "searches[0]"),
        ({"searches": ["a b"]}, "searches[0]"),
        ({"options": ["ndots:5", "x\n"]}, "options[1]"),
        ({"options": ["\u2028"]}, "options[0]"),
    ],
)
def test_resolv_conf_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        dns(**fields)
    assert caught.value.field == f"config.dns_config.{field}"


@given(st.lists(st.text(max_size=12), max_size=3), st.lists(st.text(max_size=12), max_size=3))
def test_every_line_of_resolv_conf_is_ours(searches: list[str], options: list[str]) -> None:
    try:
        text = dns(servers=["1.1.1.1"], searches=searches, options=options).decode()
    except InvalidArgument:
        return
    assert len(text.splitlines()) == 1 + bool(searches) + bool(options)


def test_pod_files() -> None:
    rendered = files.render(config(), HOST)
    assert rendered["hostname"] == b"pod\n"
    assert rendered["hosts"].startswith(b"127.0.0.1\tlocalhost\n")
    assert rendered["hosts"].endswith(b"127.0.1.1\tpod\n")
    assert files.hosts(config(), HOST, "pod", ["10.0.0.2", "fd00::2"]).endswith(b"ff02::2\tip6-allrouters\n10.0.0.2\tpod\nfd00::2\tpod\n")


def test_host_network_files() -> None:
    rendered = files.render(config(network=v1.NODE), HOST)
    assert rendered == {"hosts": b"1.2.3.4 host\n", "hostname": b"node\n", "resolv.conf": b"nameserver 9.9.9.9\n"}
    assert files.render(config(network=v1.NODE), HostFacts())["hosts"] == b""  # a host without the file


Profile = v1.SecurityProfile


@pytest.mark.parametrize(
    ("context", "field"),
    [
        ({"run_as_user": v1.Int64Value(value=-1)}, "run_as_user"),
        ({"run_as_user": v1.Int64Value(value=2**31)}, "run_as_user"),
        ({"run_as_group": v1.Int64Value(value=1)}, "run_as_group"),
        ({"run_as_user": v1.Int64Value(value=1), "run_as_group": v1.Int64Value(value=-1)}, "run_as_group"),
        ({"supplemental_groups": [1, -1]}, "supplemental_groups[1]"),
        ({"supplemental_groups_policy": 7}, "supplemental_groups_policy"),
        ({"seccomp": Profile(profile_type=7)}, "seccomp.profile_type"),
        ({"seccomp": Profile(profile_type=Profile.Localhost)}, "seccomp.localhost_ref"),
        ({"apparmor": Profile(profile_type=Profile.RuntimeDefault, localhost_ref="x")}, "apparmor.localhost_ref"),
        ({"seccomp_profile_path": "x"}, "seccomp_profile_path"),
    ],
)
def test_values_for_the_pods_own_process_are_checked(context: dict[str, Any], field: str) -> None:
    config = v1.PodSandboxConfig()
    config.linux.security_context.CopyFrom(v1.LinuxSandboxSecurityContext(**context))
    with pytest.raises(InvalidArgument) as caught:
        sandbox.build("p", config, netns_path="/n", host=HostFacts())
    assert caught.value.field == f"config.linux.security_context.{field}"
