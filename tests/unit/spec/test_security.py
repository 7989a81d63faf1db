"""Capabilities, seccomp choice, AppArmor, SELinux, paths."""

from __future__ import annotations

from typing import Any

import pytest

from cri.errors import FailedPrecondition, InvalidArgument
from cri.spec import security
from cri.spec.inputs import HandlerConfig, HostFacts
from protos.runtime.v1 import api_pb2 as v1
from shim.linux.caps import NAMES
from shim.oci.spec import Capabilities, Seccomp

DEFAULT = set(security.DEFAULT_CAPABILITIES)
CONTEXT = "config.linux.security_context"
P = v1.SecurityProfile


def caps(privileged: bool = False, host: HostFacts | None = None, **lists: list[str]) -> Capabilities:
    wanted = v1.Capability(**{f"{k}_capabilities": v for k, v in lists.items()})
    context = v1.LinuxContainerSecurityContext(capabilities=wanted, privileged=privileged)
    return security.capabilities(context, host or HostFacts())


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, DEFAULT),
        ({"add": ["NET_ADMIN"]}, DEFAULT | {"CAP_NET_ADMIN"}),
        ({"add": ["cap_net_admin"]}, DEFAULT | {"CAP_NET_ADMIN"}),
        ({"drop": ["chown", "CAP_KILL"]}, DEFAULT - {"CAP_CHOWN", "CAP_KILL"}),
        ({"drop": ["ALL"]}, set()),
        ({"drop": ["all"], "add": ["NET_BIND_SERVICE"]}, {"CAP_NET_BIND_SERVICE"}),
        ({"add": ["ALL"]}, set(NAMES)),
        ({"add": ["ALL"], "drop": ["SYS_ADMIN"]}, set(NAMES) - {"CAP_SYS_ADMIN"}),
        ({"add": ["ALL"], "drop": ["ALL"]}, set()),
        ({"add": ["CHOWN"], "drop": ["CHOWN"]}, DEFAULT - {"CAP_CHOWN"}),
    ],
)
def test_capabilities(lists: dict[str, list[str]], expected: set[str]) -> None:
    found = caps(**lists)
    assert set(found.bounding) == set(found.effective) == set(found.permitted) == expected
    assert found.inheritable == found.ambient == ()  # CVE-2022-24769, CVE-2018-1000400


def test_privileged_has_what_the_host_has() -> None:
    assert caps(privileged=True, drop=["ALL"]).bounding == NAMES
    assert caps(privileged=True, host=HostFacts(capabilities=("CAP_CHOWN",))).bounding == ("CAP_CHOWN",)


def test_ambient_is_inheritable_because_the_kernel_wants_it() -> None:
    found = caps(add_ambient=["NET_BIND_SERVICE"])
    assert found.ambient == found.inheritable == ("CAP_NET_BIND_SERVICE",)
    assert caps(drop=["ALL"], add=["CHOWN"], add_ambient=["ALL"]).ambient == ("CAP_CHOWN",)
    with pytest.raises(InvalidArgument, match="add_ambient_capabilities"):
        caps(add_ambient=["SYS_ADMIN"])


@pytest.mark.parametrize("name", ["", "NET", "CAP_CAP_CHOWN", "CHOWN ", "CHOWN\0", "ſYS_ADMIN"])
def test_unknown_capabilities(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"capabilities\.drop_capabilities\[1\]"):
        caps(drop=["CHOWN", name])


def seccomp(handler: HandlerConfig | None = None, host: HostFacts | None = None, **context: Any) -> Seccomp | None:
    return security.seccomp(
        v1.LinuxContainerSecurityContext(**context),
        Capabilities(),
        host or HostFacts(read=PROFILES.__getitem__),
        handler or HandlerConfig(),
    )


PROFILES = {"/p.json": b'{"defaultAction": "SCMP_ACT_LOG"}', "/empty": b""}
MARKER = Seccomp("RuntimeDefault")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({}, None),
        ({"seccomp": P(profile_type=P.RuntimeDefault)}, MARKER),
        ({"seccomp": P(profile_type=P.Unconfined)}, None),
        ({"seccomp": P(profile_type=P.Localhost, localhost_ref="/p.json")}, Seccomp("SCMP_ACT_LOG")),
        ({"seccomp": P(profile_type=P.Localhost, localhost_ref="localhost//p.json")}, Seccomp("SCMP_ACT_LOG")),
        ({"seccomp_profile_path": "runtime/default"}, MARKER),
        ({"seccomp_profile_path": "unconfined"}, None),
        ({"seccomp_profile_path": "localhost//p.json"}, Seccomp("SCMP_ACT_LOG")),
        ({"seccomp": P(profile_type=P.Unconfined), "seccomp_profile_path": "runtime/default"}, None),
        ({"seccomp": P(profile_type=P.RuntimeDefault), "privileged": True}, None),
    ],
)
def test_seccomp(context: dict[str, Any], expected: Seccomp | None) -> None:
    assert seccomp(**context) == expected


def test_unset_seccomp_is_the_handlers_choice() -> None:
    handler = HandlerConfig(unset_seccomp_profile="runtime/default")
    assert seccomp(handler) == MARKER
    assert seccomp(handler, seccomp=P(profile_type=P.Unconfined)) is None
    assert seccomp(handler, privileged=True) is None


@pytest.mark.parametrize(
    ("context", "field"),
    [
        ({"seccomp": P(profile_type=P.RuntimeDefault, localhost_ref="/p.json")}, f"{CONTEXT}.seccomp.localhost_ref"),
        ({"seccomp": P(profile_type=7)}, f"{CONTEXT}.seccomp"),
        ({"seccomp": P(profile_type=P.Localhost)}, f"{CONTEXT}.seccomp.localhost_ref"),
        ({"seccomp": P(profile_type=P.Localhost, localhost_ref="p.json")}, f"{CONTEXT}.seccomp.localhost_ref"),
        ({"seccomp": P(profile_type=P.Localhost, localhost_ref="/p\n")}, f"{CONTEXT}.seccomp.localhost_ref"),
        ({"seccomp": P(profile_type=P.Localhost, localhost_ref="/empty")}, f"{CONTEXT}.seccomp.localhost_ref"),  # CVE-2023-2431
        ({"seccomp_profile_path": "p.json"}, f"{CONTEXT}.seccomp_profile_path"),
    ],
)
def test_seccomp_refused(context: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        seccomp(**context)
    assert caught.value.field == field


def test_missing_profile_and_missing_kernel_support() -> None:
    wanted = P(profile_type=P.Localhost, localhost_ref="/p.json")
    with pytest.raises(InvalidArgument, match="no such file"):
        seccomp(host=HostFacts(), seccomp=wanted)
    with pytest.raises(InvalidArgument, match="no seccomp"):
        seccomp(host=HostFacts(seccomp=False), seccomp=wanted)
    assert seccomp(host=HostFacts(seccomp=False), seccomp=P(profile_type=P.Unconfined)) is None


def apparmor(enabled: bool, no_default: str = "", **context: Any) -> str:
    host = HostFacts(apparmor=enabled, no_apparmor_default=no_default, apparmor_loaded=lambda name: name == "mine")
    return security.apparmor(v1.LinuxContainerSecurityContext(**context), host)


def test_apparmor() -> None:
    for enabled, default in ((True, security.APPARMOR_DEFAULT), (False, "")):
        assert apparmor(enabled) == default, "whoever says nothing gets the default, as with containerd"
        assert apparmor(enabled, apparmor=P(profile_type=P.RuntimeDefault)) == default
        assert apparmor(enabled, apparmor_profile="runtime/default") == default
        assert apparmor(enabled, apparmor=P(profile_type=P.Unconfined)) == ""
        assert apparmor(enabled, privileged=True) == ""
    for more in ({}, {"privileged": True}):
        assert apparmor(True, apparmor=P(profile_type=P.Localhost, localhost_ref="localhost/mine"), **more) == "mine"
    assert apparmor(True, apparmor_profile="localhost/mine") == "mine"
    assert apparmor(True, no_default="no parser") == ""
    with pytest.raises(FailedPrecondition, match="apparmor: the default profile is not loaded: no parser"):
        apparmor(True, no_default="no parser", apparmor=P(profile_type=P.RuntimeDefault))


@pytest.mark.parametrize(
    ("enabled", "context", "field"),
    [
        (False, {"apparmor": P(profile_type=P.Localhost, localhost_ref="x")}, "apparmor.localhost_ref"),
        (False, {"apparmor_profile": "localhost/x"}, "apparmor_profile.localhost_ref"),
        (True, {"apparmor": P(profile_type=P.Localhost, localhost_ref="other")}, "apparmor.localhost_ref"),
        (True, {"apparmor": P(profile_type=7)}, "apparmor"),
        (True, {"apparmor": P(profile_type=P.Localhost)}, "apparmor.localhost_ref"),
        (True, {"apparmor": P(profile_type=P.Localhost, localhost_ref="a\nb")}, "apparmor.localhost_ref"),
        (True, {"apparmor": P(profile_type=P.Unconfined, localhost_ref="a")}, "apparmor.localhost_ref"),
        (True, {"apparmor_profile": "x"}, "apparmor_profile"),
    ],
)
def test_apparmor_refused(enabled: bool, context: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        apparmor(enabled, **context)
    assert caught.value.field == f"{CONTEXT}.{field}"


def test_paths() -> None:
    assert security.masked_paths(v1.LinuxContainerConfig()) == security.MASKED_PATHS
    assert security.readonly_paths(v1.LinuxContainerConfig()) == security.READONLY_PATHS

    def with_context(**context: Any) -> v1.LinuxContainerConfig:
        return v1.LinuxContainerConfig(security_context=v1.LinuxContainerSecurityContext(**context))

    assert security.masked_paths(with_context()) == ()  # procMount: Unmasked
    assert security.masked_paths(with_context(masked_paths=["/proc/kcore/"])) == ("/proc/kcore",)
    assert security.readonly_paths(with_context(readonly_paths=["/a"], privileged=True)) == ()
    with pytest.raises(InvalidArgument, match=r"readonly_paths\[0\]"):
        security.readonly_paths(with_context(readonly_paths=["a"]))
