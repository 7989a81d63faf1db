"""The people's commands: what they ask for, and what they say when nobody answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cri import cli, doctor
from cri import config as configuration
from cri.commands import run
from cri.commands.client import CommandError
from protos.runtime.v1 import api_pb2 as v1


def parsed(*arguments: str) -> tuple[v1.PodSandboxConfig, v1.ContainerConfig]:
    options = cli._parser().parse_args(["run", *arguments])
    return run.pod_config(options, "/logs"), run.container_config(options, "sha256:1")


def test_run_has_the_kubelets_defaults() -> None:
    pod, container = parsed("busybox", "echo", "-n", "hi")
    assert list(container.args) == ["echo", "-n", "hi"]
    assert pod.hostname == pod.metadata.name
    context = container.linux.security_context
    assert context.namespace_options.pid == v1.CONTAINER
    assert context.seccomp.profile_type == v1.SecurityProfile.RuntimeDefault
    assert "/proc/kcore" in context.masked_paths
    assert not context.privileged


def test_run_options() -> None:
    pod, container = parsed(
        *("--network", "host", "--user", "0:5", "-e", "A=b=c", "-v", "/a:/b:ro", "--memory", "64m", "--cpus", "0.5"),
        *("--privileged", "--name", "N", "image", "--", "sh"),
    )
    context = container.linux.security_context
    assert pod.linux.security_context.namespace_options.network == context.namespace_options.network == v1.NODE
    assert pod.hostname == ""
    assert context.HasField("run_as_user") and context.run_as_user.value == 0
    assert context.run_as_group.value == 5
    assert container.envs[0].value == b"b=c"
    assert container.mounts[0].readonly
    assert container.linux.resources.memory_limit_in_bytes == 64 << 20
    assert container.linux.resources.cpu_quota == 50_000
    assert list(container.args) == ["sh"]
    assert pod.linux.security_context.privileged and context.privileged
    assert not context.masked_paths


@pytest.mark.parametrize("bad", [("-v", "a:/b"), ("-v", "/a:/b:rx"), ("--memory", "lots"), ("--user", "1:wheel")])
def test_wrong_options(bad: tuple[str, str]) -> None:
    with pytest.raises(CommandError):
        parsed(*bad, "image")


@pytest.mark.parametrize("command", [["run", "busybox"], ["pull", "busybox"]])
def test_no_daemon_is_one_line(tmp_path: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-m", "cri.cli", command[0], "--socket", str(tmp_path / "none.sock"), *command[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode in (1, 125)
    assert done.stderr.startswith("cri-shim: no daemon answers at ")
    assert len(done.stderr.splitlines()) == 1


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    flags = {"root": str(tmp_path / "root"), "state": str(tmp_path / "state"), "network.mode": "bridge"}
    findings = list(doctor.examine(configuration.load(flags=flags, environ={})))
    assert {"kernel", "cgroups", "overlay", "seccomp", "limits", "oom_score_adj", "forwarding", "nftables"} <= {f.check for f in findings}
    assert not [f for f in findings if "could not be checked" in f.found]
    assert all(f.fix for f in findings if f.level == "fail")
    assert not (tmp_path / "root").exists()


def test_doctor_fails_where_something_required_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "KERNEL_FLOOR", (99, 0))
    config = configuration.load(flags={"root": str(tmp_path)}, environ={})
    assert doctor.main(config) == 1
    assert "FAIL kernel" in capsys.readouterr().out
