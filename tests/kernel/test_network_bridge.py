"""The built-in bridge on a real kernel: node, pods and the world outside are network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from cri.errors import FailedPrecondition, ResourceExhausted
from cri.network.base import PodNetwork, Result
from cri.network.bridge import BridgeNetwork, link_name
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from tests.kernel.netns import Netns

SUBNETS = ("10.214.0.0/24", "fd00:214::/64")


class Pod:
    def __init__(self) -> None:
        self.id = secrets.token_hex(32)
        self.netns = Netns("pod")

    def network(self, *ports: v1.PortMapping) -> PodNetwork:
        async def netlink() -> int:
            return self.netns.netlink()

        return PodNetwork(self.id, self.netns.path, netlink=netlink, port_mappings=ports)


class World:
    """A node with an uplink to one outside host, and pods."""

    def __init__(self, directory: Path) -> None:
        self.node, self.outside = Netns("node"), Netns("out")
        self.directory = directory
        self.pods: list[Pod] = []
        self.node.run("ip", "link", "set", "lo", "up")
        self.node.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", self.outside.name)
        for netns, link, last in ((self.node, "up0", 1), (self.outside, "eth0", 2)):
            netns.run("ip", "addr", "add", f"192.0.2.{last}/24", "dev", link)
            netns.run("ip", "addr", "add", f"2001:db8::{last}/64", "dev", link, "nodad")
            netns.run("ip", "link", "set", link, "mtu", "1400", "up")
        self.node.run("ip", "route", "add", "default", "via", "192.0.2.2")
        self.node.run("ip", "-6", "route", "add", "default", "via", "2001:db8::2")

    def pod(self) -> Pod:
        self.pods.append(Pod())
        return self.pods[-1]

    def close(self) -> None:
        for netns in (self.node, self.outside, *(p.netns for p in self.pods)):
            netns.delete()

    def use(self, body: Callable[[BridgeNetwork], Awaitable[object]], *, subnets: tuple[str, ...] = SUBNETS, boot: str = "b") -> None:
        """Run ``body`` with a network, as the daemon would after a start, in the node's namespace."""

        async def main() -> None:
            network = BridgeNetwork(self.directory, subnets=subnets, boot_id=boot)
            try:
                await asyncio.wait_for(body(network) or asyncio.sleep(0), 50)  # type: ignore[arg-type]
            finally:
                await network.close()

        self.node.call(lambda: asyncio.run(main()))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "network")
    try:
        yield world
    finally:
        world.close()


def listen(netns: Netns, address: str, port: int, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = netns.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def family_of(address: str) -> int:
    return socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6


def connect(client: Netns, address: str, server: socket.socket, port: int = 0) -> str:
    """Connect from a namespace and exchange a byte; the caller's address as the server sees it."""
    with client.socket(family_of(address)) as sock:
        sock.connect((address, port or server.getsockname()[1]))
        peer, name = server.accept()
        with peer:
            sock.sendall(b"x")
            assert peer.recv(1) == b"x"
        return str(name[0])


def test_pods_reach_each_other_the_gateway_and_the_world(world: World) -> None:
    a, b = world.pod(), world.pod()

    async def body(network: BridgeNetwork) -> None:
        assert not network.status().ready
        await network.recover([])
        assert network.status().ready
        first, second = await network.setup(a.network()), await network.setup(b.network())
        assert first.ips == ("10.214.0.2", "fd00:214::2") and second.ips == ("10.214.0.3", "fd00:214::3")
        for mine, theirs, node, outside in zip(
            first.ips, second.ips, ("10.214.0.1", "fd00:214::1"), ("192.0.2.2", "2001:db8::2"), strict=True
        ):
            with listen(b.netns, theirs, 0, family_of(theirs)) as server:
                assert connect(a.netns, theirs, server) == mine
                assert connect(world.node, theirs, server) == node
            with listen(world.outside, outside, 0, family_of(outside)) as server:
                assert ip_address(connect(a.netns, outside, server)) in (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
        with listen(a.netns, "127.0.0.1", 0) as server:
            connect(a.netns, "127.0.0.1", server)
        assert "mtu 1400" in a.netns.run("ip", "link", "show", "eth0")

    world.use(body)


def test_teardown_is_idempotent_and_works_without_the_namespace(world: World) -> None:
    a, b = world.pod(), world.pod()

    async def body(network: BridgeNetwork) -> None:
        for pod in (a, b):
            await network.setup(pod.network())
        await network.teardown(a.network())
        await network.teardown(a.network())
        b.netns.delete()
        await network.teardown(PodNetwork(b.id, b.netns.path))
        await network.teardown(PodNetwork("0" * 64, ""))
        assert "csv" not in world.node.run("ip", "link")
        assert not list((world.directory / "pods").iterdir())

    world.use(body)


def test_a_failed_setup_leaves_nothing(world: World) -> None:
    a = world.pod()

    async def body(network: BridgeNetwork) -> None:
        broken = PodNetwork(a.id, a.netns.path + "-missing", netlink=a.network().netlink)
        with pytest.raises(Failure, match=r"set up pod network: open .*ENOENT"):
            await network.setup(broken)
        assert "csv" not in world.node.run("ip", "link")
        assert not list((world.directory / "pods").iterdir())
        assert (await network.setup(a.network())).ips[0] == "10.214.0.2"

    world.use(body)


def test_a_cancelled_setup_leaves_nothing(world: World) -> None:
    a = world.pod()

    async def body(network: BridgeNetwork) -> None:
        await network.recover([])
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.004):
            task = asyncio.ensure_future(network.setup(a.network()))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await task
                await network.teardown(a.network())
            except asyncio.CancelledError:
                pass
            assert "csv" not in world.node.run("ip", "link")
            assert not list((world.directory / "pods").iterdir())

    world.use(body)


def test_recovery_keeps_the_living_and_releases_the_dead(world: World) -> None:
    live, dead, lost = world.pod(), world.pod(), world.pod()
    results: dict[str, Result] = {}

    async def before(network: BridgeNetwork) -> None:
        for pod in (live, dead, lost):
            results[pod.id] = await network.setup(pod.network(v1.PortMapping(host_port=8000 + len(results), container_port=80)))
        (world.directory / "pods" / f"{lost.id}.json").write_text("")  # its record is torn

    async def after(network: BridgeNetwork) -> None:
        world.node.run("nft", "flush", "ruleset")
        await network.recover([live.id])
        links = world.node.run("ip", "link")
        assert link_name(live.id) in links and link_name(dead.id) not in links and link_name(lost.id) not in links
        assert [p.name for p in (world.directory / "pods").glob("*.json")] == [f"{live.id}.json"]
        rules = world.node.run("nft", "list", "table", "inet", "cri-shim")
        assert "8000" in rules and "8001" not in rules
        again = world.pod()
        assert (await network.setup(again.network())).ips[0] not in results[live.id].ips
        with listen(live.netns, results[live.id].ips[0], 0) as server:
            connect(again.netns, results[live.id].ips[0], server)

    world.use(before)
    world.use(after)


def test_a_bridge_that_somebody_deleted_is_made_again(world: World) -> None:
    a = world.pod()

    async def body(network: BridgeNetwork) -> None:
        await network.recover([])
        world.node.run("ip", "link", "delete", "crishim0")
        with pytest.raises(Failure):
            await network.setup(a.network())
        assert (await network.setup(a.network())).ips

    world.use(body)


def test_addresses_run_out_and_come_back(world: World) -> None:
    pods = [world.pod() for _ in range(2)]

    async def body(network: BridgeNetwork) -> None:
        await network.setup(pods[0].network())
        with pytest.raises(ResourceExhausted, match=r"10\.215\.0\.0/30"):
            await network.setup(pods[1].network())
        await network.teardown(pods[0].network())
        assert (await network.setup(pods[1].network())).ips == ("10.215.0.2",)

    world.use(body, subnets=("10.215.0.0/30",))


def test_pod_cidr_of_the_kubelet(world: World) -> None:
    old, new, later = world.pod(), world.pod(), world.pod()
    ips: list[str] = []

    async def body(network: BridgeNetwork) -> None:
        ips.extend((await network.setup(old.network())).ips[:1])
        network.update_pod_cidr("10.216.3.0/24")
        ips.extend((await network.setup(new.network())).ips)
        with listen(old.netns, ips[0], 0) as server:
            connect(world.node, ips[0], server)
        with listen(world.outside, "192.0.2.2", 0) as server:
            assert connect(old.netns, "192.0.2.2", server) == "192.0.2.1"

    async def after(network: BridgeNetwork) -> None:
        assert (await network.setup(later.network())).ips == ("10.216.3.3",)

    world.use(body)
    assert ips == ["10.214.0.2", "10.216.3.2"]
    world.use(after)


@pytest.mark.parametrize("host_ip", ["", "192.0.2.1"])
def test_host_ports(world: World, host_ip: str) -> None:
    a, b = world.pod(), world.pod()
    mappings = [
        v1.PortMapping(host_port=8080, container_port=80, host_ip=host_ip),
        v1.PortMapping(host_port=8053, container_port=53, host_ip=host_ip, protocol=v1.UDP),
    ]

    async def body(network: BridgeNetwork) -> None:
        result = await network.setup(a.network(*mappings))
        await network.setup(b.network())
        with listen(a.netns, "0.0.0.0", 80) as server:
            assert connect(world.outside, "192.0.2.1", server, 8080) == "192.0.2.2"  # the caller's address is kept
            connect(b.netns, "192.0.2.1", server, 8080)
            connect(a.netns, "192.0.2.1", server, 8080)  # itself, through the node
            connect(world.node, "192.0.2.1", server, 8080)
            if not host_ip:
                connect(world.node, "127.0.0.1", server, 8080)
                connect(b.netns, "10.214.0.1", server, 8080)
        if not host_ip:
            with listen(a.netns, "::", 80, socket.AF_INET6) as server:
                connect(world.outside, "2001:db8::1", server, 8080)
        with listen(a.netns, result.ips[0], 53, kind=socket.SOCK_DGRAM) as server, world.outside.socket(kind=socket.SOCK_DGRAM) as client:
            client.connect(("192.0.2.1", 8053))
            client.send(b"?")
            question, caller = server.recvfrom(10)
            server.sendto(b"!", caller)
            assert question == b"?" and client.recv(10) == b"!"
        with pytest.raises(FailedPrecondition, match="8080/tcp"):
            await network.setup(world.pod().network(mappings[0]))
        await network.teardown(a.network())
        with world.outside.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("192.0.2.1", 8080))

    world.use(body)


@pytest.mark.parametrize("version", [4, 6])
def test_flows_of_udp_change_pods_with_the_port(world: World, version: int) -> None:
    """A caller that never stops sending from one port: first to nobody, then to one pod, then to the next."""
    a, b = world.pod(), world.pod()
    mapping = v1.PortMapping(host_port=8053, container_port=53, protocol=v1.UDP)
    family, node, every = (socket.AF_INET, "192.0.2.1", "0.0.0.0") if version == 4 else (socket.AF_INET6, "2001:db8::1", "::")

    def reach(client: socket.socket, pod: Pod) -> None:
        with listen(pod.netns, every, 53, family, socket.SOCK_DGRAM) as server:
            server.settimeout(0.2)
            for _ in range(25):  # the bridge's own IPv6 address is tentative at first
                client.sendto(b"?", (node, 8053))
                with contextlib.suppress(TimeoutError):
                    assert server.recv(10) == b"?"
                    return
            raise AssertionError("the flow goes elsewhere")

    async def body(network: BridgeNetwork) -> None:
        await network.setup(b.network())  # connections are tracked from here on
        with world.outside.socket(family, socket.SOCK_DGRAM) as client, listen(world.node, every, 8053, family, socket.SOCK_DGRAM):
            client.sendto(b"?", (node, 8053))
            await network.setup(a.network(mapping))
            await asyncio.to_thread(reach, client, a)
            await network.teardown(a.network())
            assert world.node.udp_flows(8053, version) == 0
            await network.teardown(b.network())
            await network.setup(b.network(mapping))
            await asyncio.to_thread(reach, client, b)

    world.use(body)


def _sctp_init(source: int, destination: int) -> bytes:
    """An SCTP packet with an INIT chunk (RFC 9260, 3.1 and 3.3.2) and its CRC-32C."""

    def checksum(data: bytes) -> int:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value ^ 0xFFFFFFFF

    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 0x1234, 65536, 1, 1, 1)
    header = struct.pack(">HHI", source, destination, 0)
    return header + struct.pack("<I", checksum(header + bytes(4) + chunk)) + chunk


def test_host_port_of_sctp(world: World) -> None:
    """Packets, because not every kernel has SCTP's sockets (module sctp): translation and tracking are netfilter's."""
    a = world.pod()

    async def body(network: BridgeNetwork) -> None:
        await network.setup(a.network(v1.PortMapping(host_port=8132, container_port=132, protocol=v1.SCTP)))
        with (
            a.netns.socket(kind=socket.SOCK_RAW, protocol=132) as server,
            world.outside.socket(kind=socket.SOCK_RAW, protocol=132) as client,
        ):
            client.sendto(_sctp_init(5000, 8132), ("192.0.2.1", 0))
            packet, caller = server.recvfrom(2048)
            assert caller[0] == "192.0.2.2" and struct.unpack_from(">HH", packet, (packet[0] & 15) * 4) == (5000, 132)

    world.use(body)


def test_host_port_of_sctp_with_sockets(world: World) -> None:
    a = world.pod()
    try:
        a.netns.socket(protocol=132).close()
    except OSError:
        pytest.skip("this kernel has no SCTP sockets (module sctp)")

    async def body(network: BridgeNetwork) -> None:
        await network.setup(a.network(v1.PortMapping(host_port=8132, container_port=132, protocol=v1.SCTP)))
        with a.netns.socket(protocol=132) as server:
            server.bind(("0.0.0.0", 132))
            server.listen()
            with world.outside.socket(protocol=132) as client:
                client.connect(("192.0.2.1", 8132))
                client.sendall(b"x")
                assert server.accept()[0].recv(1) == b"x"

    world.use(body)


def test_pods_cannot_reach_the_nodes_loopback(world: World) -> None:
    """CVE-2020-8558: a pod that sends to 127.0.0.0/8 over its own link, while host ports need route_localnet on the bridge."""
    a = world.pod()

    async def body(network: BridgeNetwork) -> None:
        await network.setup(a.network(v1.PortMapping(host_port=8080, container_port=80)))
        with listen(world.node, "127.0.0.1", 0) as server:
            port = server.getsockname()[1]
            a.netns.run("sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1")
            a.netns.run("ip", "addr", "delete", "127.0.0.1/8", "dev", "lo")  # and with it the routes to loopback
            a.netns.run("ip", "route", "add", "127.0.0.1", "via", "10.214.0.1", "dev", "eth0")
            with a.netns.socket() as client:
                client.settimeout(0.5)
                with pytest.raises(OSError, match="timed out"):
                    client.connect(("127.0.0.1", port))

    world.use(body)


def test_setup_is_quick(world: World) -> None:
    pods = [world.pod() for _ in range(20)]
    times: dict[str, list[float]] = {"setup": [], "teardown": []}

    async def body(network: BridgeNetwork) -> None:
        await network.recover([])
        for pod in pods:
            described = pod.network()
            began = time.perf_counter()
            await network.setup(described)
            times["setup"].append((time.perf_counter() - began) * 1000)
        for pod in pods:
            began = time.perf_counter()
            await network.teardown(pod.network())
            times["teardown"].append((time.perf_counter() - began) * 1000)

    world.use(body, subnets=SUBNETS[:1])
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    print(medians)
    assert medians["setup"] < 50  # 2.2 ms on an idle machine; a shared one must not make this fail
