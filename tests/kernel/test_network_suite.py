"""What every pod network does, on a real kernel: the built-in bridge, and CNI's bridge, host-local and portmap, Debian's or native."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cri.config import NATIVE_PLUGINS, Cni
from cri.errors import CriError
from cri.network.base import Network, PodNetwork, Result, Status
from cri.network.bridge import BridgeNetwork
from cri.network.cni.network import CniNetwork
from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.harness import wait_for
from tests.kernel.netns import Netns

SUBNETS = ("10.233.0.0/24", "fd00:233::/64")
DEBIAN = "/usr/lib/cni"


def bridge(directory: Path) -> Network:
    return BridgeNetwork(directory / "network", subnets=SUBNETS, boot_id="b", bridge="suite0")


def executed(directory: Path) -> Network:
    return cni(directory, ())


def native(directory: Path) -> Network:
    return cni(directory, NATIVE_PLUGINS)


def cni(directory: Path, native: tuple[str, ...]) -> Network:
    ipam = {"type": "host-local", "dataDir": str(directory / "ipam"), "ranges": [[{"subnet": s}] for s in SUBNETS]}
    ipam["routes"] = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    plugins = [
        {"type": "bridge", "bridge": "suite0", "isGateway": True, "ipMasq": True, "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    configurations = directory / "net.d"
    configurations.mkdir(exist_ok=True)
    (configurations / "10.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "suite", "plugins": plugins}))
    config = Cni(conf_dir=str(configurations), bin_dirs=(DEBIAN,), native_plugins=native)
    return CniNetwork(directory / "network", config, sysctls=_sysctls)


PODS: dict[str, Netns] = {}


async def _sysctls(pod_id: str, write: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, int]]:
    """As a child of the supervisor does it."""
    await asyncio.to_thread(PODS[pod_id].call, lambda: [Path("/proc/sys", n).write_text(t) for n, t in write.items() if t is not None])
    return {}, {}


class Suite:
    """A node and pods; ``use`` runs something with the network as a daemon that has just started would."""

    def __init__(self, make: Callable[[Path], Network], directory: Path) -> None:
        self._make, self._directory = make, directory
        self.node = Netns("node")
        self.node.run("ip", "link", "set", "lo", "up")
        self._pods: list[Netns] = []

    def pod(self, *ports: v1.PortMapping, path: str = "") -> PodNetwork:
        netns = Netns("pod")
        self._pods.append(netns)

        async def netlink() -> int:
            return netns.netlink()

        names = {"namespace": "ns", "name": "p", "uid": "u"}
        pod_id = secrets.token_hex(32)
        PODS[pod_id] = netns
        return PodNetwork(pod_id, path or netns.path, netlink=netlink, port_mappings=ports, **names)

    def inside(self, pod: PodNetwork, *argv: str) -> str:
        return next(n for n in self._pods if n.path == pod.netns_path).run(*argv)

    def use(self, body: Callable[[Network], Awaitable[object]]) -> None:
        async def main() -> None:
            network = self._make(self._directory)
            try:
                await asyncio.wait_for(body(network), 60)
            finally:
                await network.close()

        self.node.call(lambda: asyncio.run(main()))

    def held(self) -> list[str]:
        """Links and addresses of pods."""
        shown = self.node.run("ip", "-o", "link")
        links = [line.split(": ")[1].split("@")[0] for line in shown.splitlines()]
        records = [p.name for top in ("network/pods", "network/cni/results", "ipam/suite") for p in self._files(top)]
        return sorted([n for n in links if n not in ("lo", "suite0")] + records)

    def _files(self, top: str) -> list[Path]:
        directory = self._directory / top
        names = os.listdir(directory) if directory.is_dir() else []
        return [directory / n for n in names if n != "lock" and not n.startswith("last_reserved")]

    def close(self) -> None:
        for netns in (self.node, *self._pods):
            netns.delete()


@pytest.fixture(params=[bridge, executed, native], ids=["bridge", "executed", "native"])
def suite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Suite]:
    if request.param is executed and not os.path.exists(f"{DEBIAN}/bridge"):
        pytest.skip(f"no plugins in {DEBIAN}")
    suite = Suite(request.param, tmp_path)
    try:
        yield suite
    finally:
        suite.close()


def test_ready(suite: Suite) -> None:
    async def body(network: Network) -> None:
        await network.recover(())
        assert network.status() == Status(True)

    suite.use(body)


def test_pods_have_their_addresses_and_reach_each_other(suite: Suite) -> None:
    one, two = suite.pod(), suite.pod()
    results: list[Result] = []

    async def body(network: Network) -> None:
        results.extend(await asyncio.gather(network.setup(one), network.setup(two)))

    suite.use(body)
    assert len({ip for r in results for ip in r.ips}) == 4
    assert json.dumps([dict(r.raw) for r in results])
    for pod, result in zip((one, two), results, strict=True):
        four, six = result.ips
        assert four.startswith("10.233.0.") and six.startswith("fd00:233::")
        shown = suite.inside(pod, "ip", "addr", "show", "eth0")
        assert f" {four}/24 " in shown and f" {six}/64 " in shown
    for address in (*results[1].ips, "10.233.0.1", "fd00:233::1"):
        suite.inside(one, "busybox", "ping", "-c1", "-W5", address)
    suite.node.run("busybox", "ping", "-c1", "-W5", results[0].ips[0])


def test_teardown_gives_everything_back_and_again(suite: Suite) -> None:
    pod = suite.pod(v1.PortMapping(host_port=8080, container_port=80))

    async def body(network: Network) -> None:
        before = suite.held()
        await network.setup(pod)
        assert suite.held() != before
        await network.teardown(pod)
        assert suite.held() == before == []
        await network.teardown(pod)
        await network.teardown(suite.pod())

    suite.use(body)


def test_teardown_by_another_daemon_after_the_namespace_is_gone(suite: Suite) -> None:
    pod = suite.pod()

    async def first(network: Network) -> None:
        await network.setup(pod)

    async def second(network: Network) -> None:
        await network.teardown(pod)

    suite.use(first)
    suite._pods[0].delete()
    suite.use(second)
    wait_for("nothing", lambda: suite.held() == [])


def test_a_setup_that_fails_leaves_nothing(suite: Suite) -> None:
    pod = suite.pod(path="/run/netns/there-is-no-such-namespace")

    async def body(network: Network) -> None:
        with pytest.raises(Exception) as failed:
            await network.setup(pod)
        assert isinstance(failed.value, CriError) or str(failed.value)
        assert suite.held() == []

    suite.use(body)


def test_recover_keeps_the_living_and_releases_the_rest(suite: Suite) -> None:
    living, dead = suite.pod(), suite.pod()
    alone: list[str] = []

    async def first(network: Network) -> None:
        await network.setup(living)
        alone.extend(suite.held())
        await network.setup(dead)

    async def second(network: Network) -> None:
        assert suite.held() != alone
        await network.recover({living.pod_id})
        assert suite.held() == alone
        suite.node.run("busybox", "ping", "-c1", "-W5", "10.233.0.2")
        await network.teardown(living)
        assert suite.held() == []

    suite.use(first)
    suite.use(second)


def test_a_pod_cidr_is_checked(suite: Suite) -> None:
    async def body(network: Network) -> None:
        with pytest.raises(CriError):
            network.update_pod_cidr("10.0.0.300/24")
        network.update_pod_cidr("10.234.0.0/24,fd00:234::/64")

    suite.use(body)
