"""A node with CNI: Debian's plugins, and one that does what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import Daemon, Node, running

DEBIAN = "/usr/lib/cni"
SUBNETS = ("10.231.0.0/16", "fd00:231::/64")

#: ``scripted``: notes every call, then runs what is in the file ``<COMMAND>``, then behaves.
_SCRIPTED = r"""#!{python} -SE
import json, os, sys, time
here = {here!r}
command = os.environ["CNI_COMMAND"]
text = sys.stdin.read()
conf = json.loads(text)
with open(here + "/calls", "a") as calls:
    calls.write(json.dumps({{"command": command, "environment": dict(os.environ), "configuration": conf, "pid": os.getpid()}}) + "\n")
def refuse(code, message, details=""):
    print(json.dumps({{"cniVersion": conf["cniVersion"], "code": code, "msg": message, "details": details}}))
    sys.exit(1)
def hang():
    if os.fork() == 0:
        time.sleep(1000)
    time.sleep(1000)
def once(name):
    try:
        os.mkdir(here + "/" + name)
        return True
    except FileExistsError:
        return False
if os.path.exists(here + "/" + command):
    exec(open(here + "/" + command).read())
if command == "VERSION":
    print(json.dumps({{"cniVersion": conf["cniVersion"], "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}}))
if command == "ADD":
    alone = {{"cniVersion": conf["cniVersion"], "interfaces": [{{"name": "eth0", "sandbox": os.environ["CNI_NETNS"]}}],
             "ips": [{{"address": "10.231.9.9/16", "interface": 0}}]}}
    print(json.dumps(conf.get("prevResult") or alone))
"""


class Plugins:
    """Where a daemon of these tests looks for networks and plugins, and what plugins have done."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.networks, self.binaries, self.addresses = directory / "net.d", directory / "bin", directory / "ipam"
        for path in (self.networks, self.binaries):
            path.mkdir()
        scripted = self.binaries / "scripted"
        scripted.write_text(_SCRIPTED.format(python=sys.executable, here=str(directory)))
        scripted.chmod(0o755)

    def environment(self, timeout: str, native: bool) -> dict[str, str]:
        prefix = "CRI_SHIM_NETWORK_"
        if not native:
            return {**self.environment(timeout, True), f"{prefix}CNI_NATIVE_PLUGINS": ""}
        directories = {f"{prefix}CNI_CONF_DIR": str(self.networks), f"{prefix}CNI_BIN_DIRS": f"{self.binaries},{DEBIAN}"}
        return {f"{prefix}MODE": "cni", f"{prefix}CNI_TIMEOUT": timeout, **directories}

    # -- networks

    def bridge(self, **ipam: Any) -> dict[str, Any]:
        routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        ranges = {"ranges": [[{"subnet": s}] for s in SUBNETS], "routes": routes}
        address = {"type": "host-local", "dataDir": str(self.addresses), **(ipam or ranges)}
        return {"type": "bridge", "bridge": "cnitest0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": address}

    def portmap(self) -> dict[str, Any]:
        return {"type": "portmap", "capabilities": {"portMappings": True}}

    def scripted(self, *capabilities: str) -> dict[str, Any]:
        return {"type": "scripted", "capabilities": dict.fromkeys(capabilities, True)} if capabilities else {"type": "scripted"}

    def install(self, *plugins: dict[str, Any], version: str = "1.0.0", file: str = "10-test.conflist", **fields: Any) -> None:
        """Put a network in place at once, as installers do."""
        network = {"cniVersion": version, "name": "testnet", "plugins": plugins or [self.bridge(), self.portmap()], **fields}
        temporary = self.directory / "new"
        temporary.write_text(json.dumps(network))
        os.replace(temporary, self.networks / file)

    def uninstall(self) -> None:
        for path in self.networks.iterdir():
            path.unlink()

    # -- the scripted plugin

    def order(self, command: str, script: str) -> None:
        """What it does from now on at ``command``."""
        (self.directory / command).write_text(script)

    def behave(self) -> None:
        """As a plugin should, and with an empty memory."""
        for path in self.directory.iterdir():
            if path.name.isupper() or path.name == "calls":
                path.unlink()
            elif path.name.startswith("once-"):
                path.rmdir()

    def calls(self, *commands: str) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "calls").read_text().splitlines()
            return [call for call in map(json.loads, lines) if not commands or call["command"] in commands]
        return []

    # -- what pods hold

    def held(self, daemon: Daemon) -> dict[str, Any]:
        """Everything that a pod can leave: addresses, records, links, rules."""
        network = self.addresses / "testnet"
        leases = sorted(os.listdir(network)) if network.exists() else []
        results = daemon.root / "network" / "cni" / "results"
        links = [line.split(": ")[1].split("@")[0] for line in daemon.node.run("ip", "-o", "link").stdout.splitlines()]
        rules = [daemon.node.run(command).stdout for command in ("iptables-save", "ip6tables-save")]
        return {
            "addresses": [n for n in leases if not n.startswith("last_reserved") and n != "lock"],
            "results": sorted(os.listdir(results)) if results.exists() else [],
            "veths": [n for n in links if n.startswith("veth")],
            "rules": [line for text in rules for line in text.splitlines() if "testnet" in line or line.startswith(":CNI-DN")],
            "pins": sorted(os.listdir(daemon.state / "netns")),
        }

    def nothing_left(self, daemon: Daemon, seconds: float = 10) -> None:
        """Wait until everything is given back."""
        deadline = time.monotonic() + seconds
        while (held := self.held(daemon)) != NOTHING:
            assert time.monotonic() < deadline, f"still held: {held}"
            time.sleep(0.05)


NOTHING: dict[str, Any] = {"addresses": [], "results": [], "veths": [], "rules": [], "pins": []}


@contextlib.contextmanager
def cni_daemon(
    node: Node, directory: Path, *, timeout: str = "30s", native: bool = False, **options: Any
) -> Iterator[tuple[Daemon, Plugins]]:
    """A started daemon on CNI; there is no configuration yet. Plugins are executed, or native where they can be."""
    plugins = Plugins(directory)
    with running(node, env=plugins.environment(timeout, native), **options) as daemon:
        yield daemon, plugins


def sandbox(daemon: Daemon, pod: str) -> v1.PodSandboxStatus:
    return daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=10).status


def ips(daemon: Daemon, pod: str) -> list[str]:
    network = sandbox(daemon, pod).network
    return [network.ip, *(a.ip for a in network.additional_ips)]


def network_condition(daemon: Daemon) -> v1.RuntimeCondition:
    conditions = daemon.runtime.Status(v1.StatusRequest(), timeout=10).status.conditions
    return next(c for c in conditions if c.type == "NetworkReady")


def stop(daemon: Daemon, pod: str, timeout: float = 30) -> None:
    daemon.runtime.StopPodSandbox(v1.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=timeout)


def remove(daemon: Daemon, pod: str) -> None:
    daemon.runtime.RemovePodSandbox(v1.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=30)
