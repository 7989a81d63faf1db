"""The built-in pod network: one bridge, one veth pair per pod, addresses of our own, no CNI.

The veth pair is made in one netlink message, its far end directly in the pod's namespace, as a port of the bridge; the pod's side is
configured over a socket that a child of the supervisor opened in there. Netlink requests block, so they run in threads: one for all
that makes something, which the kernel serializes anyway (RTNL), and several for deleting links, where a request sleeps for 17 ms in
RCU grace periods without the lock: ten at a time take 1.8 ms each, and nobody who makes one waits for them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface
from pathlib import Path
from typing import TypeVar

from cri.errors import ConfigError, CriError, InvalidArgument, Unavailable
from cri.network import conntrack, nat
from cri.network.base import PodNetwork, Result, Status
from cri.network.ipam import Address, HostPort, Interface, Reservation, Reservations, Subnet, gateway, parse_subnets
from cri.network.netlink import Socket
from cri.state import failpoints
from cri.undo import Undo
from shim.errors import Failure
from shim.linux import path as paths

T = TypeVar("T")

BRIDGE = "crishim0"
POD_LINK = "eth0"
_PREFIX = "csv"
_CIDR_FILE = "pod_cidr"
_SYSCTL = Path("/proc/sys/net")
_UNTRIED = "not prepared yet"
_LOOPBACK_INDEX = 1  # the first link of every network namespace

log = logging.getLogger("cri.network")


def link_name(pod_id: str) -> str:
    """The host's end of a pod's veth pair; 15 characters is all the kernel allows."""
    return _PREFIX + pod_id[:12]


def mac(address: Address) -> str:
    """A MAC derived from an IPv4 address (empty for IPv6): a neighbour's ARP entry is then right for whichever pod has the address."""
    return "0a:58:" + address.packed.hex(":") if address.version == 4 else ""


def _link_mac(addresses: Iterable[Address]) -> str:
    return next((m for a in addresses if (m := mac(a))), "") or "0a:58:" + os.urandom(4).hex(":")


class BridgeNetwork:
    """``base.Network`` on a bridge in the daemon's own network namespace. ``directory`` is ``root/network``."""

    def __init__(self, directory: Path, *, subnets: Iterable[str], boot_id: str, bridge: str = BRIDGE) -> None:
        self._bridge = bridge
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._reservations = Reservations(directory / "pods", boot_id)
        self._configured = parse_subnets(subnets)
        self._subnets = self._recorded_cidr() or self._configured
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._deleters = ThreadPoolExecutor(max_workers=10, thread_name_prefix="network-delete")
        self._connecting: dict[str, asyncio.Future[None]] = {}
        self._preparing = asyncio.Lock()
        self._nat = asyncio.Lock()
        self._host: Socket | None = None  # the maker's
        self._index = 0  # of the bridge; 0: not prepared yet
        self._mtu = 1500
        self._problem = _UNTRIED
        self._repair: asyncio.Task[None] | None = None
        self._leaving: set[str] = set()  # pods whose host ports must not lead anywhere any more

    # -- base.Network

    def status(self) -> Status:
        if not self._problem:
            return Status(True)
        # a node that is not ready gets no pods, so nothing but the kubelet's next question would ever try again
        if self._repair is None or self._repair.done():
            self._repair = asyncio.get_running_loop().create_task(self._try_to_prepare())
        return Status(False, "NetworkPluginNotReady", f"built-in bridge network: {self._problem}", pending=self._problem is _UNTRIED)

    async def setup(self, pod: PodNetwork) -> Result:
        if pod.netlink is None:
            raise Unavailable(f"pod network: no netlink socket in the namespace of pod {pod.pod_id}")
        await self.teardown(pod)  # a retry of an attempt that was interrupted
        await self._prepare()
        ports = nat.host_ports(pod.port_mappings, (s.version for s in self._subnets))
        nat.check_conflicts(ports, self._reservations.held.values())
        async with Undo("set up pod network") as undo:
            undo.push("release network", lambda: self.teardown(pod))
            reservation = self._reservations.allocate(pod.pod_id, self._subnets, link_name(pod.pod_id), ports)
            netlink = await pod.netlink()
            work = self._connecting[pod.pod_id] = self._submit(self._maker, lambda: self._connect(pod, reservation, netlink))
            await asyncio.shield(work)
            del self._connecting[pod.pod_id]
            failpoints.hit("add network", "rules")
            if ports:
                await self._apply_nat()
                await self._forget_flows(ports)
        failpoints.hit("add network", "result")
        return Result(
            ips=tuple(str(i.ip) for i in reservation.interfaces),
            raw={
                "bridge": self._bridge,
                "link": reservation.link,
                "addresses": list(reservation.addresses),
                "gateways": [str(gateway(s)) for s in self._subnets],
            },
        )

    async def teardown(self, pod: PodNetwork) -> None:
        await self._release(pod.pod_id)

    async def recover(self, live: Collection[str]) -> None:
        keep = set(live)
        for pod_id in [p for p in self._reservations.held if p not in keep]:
            log.info("releasing the network of pod %s, which is gone", pod_id)
            try:
                await self._release(pod_id)
            except (CriError, Failure) as error:  # its address stays reserved; the next start tries again
                log.error("%s", error)
        await self._try_to_prepare()
        await self._run(self._maker, lambda: self._sweep({link_name(p) for p in keep}))

    def update_pod_cidr(self, cidr: str) -> None:
        """New pods get addresses of these subnets; those that run keep theirs. Survives a restart of the daemon."""
        try:
            subnets = parse_subnets(c for c in cidr.split(",") if c.strip())
        except ConfigError as error:
            raise InvalidArgument(str(error), field="runtime_config.network_config.pod_cidr") from None
        if subnets == self._subnets:
            return
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            paths.write_atomic(fd, _CIDR_FILE, cidr.encode())
        finally:
            os.close(fd)
        self._subnets, self._index = subnets, 0

    async def close(self) -> None:
        if self._repair is not None:
            self._repair.cancel()
        await self._run(self._maker, self._close)
        self._maker.shutdown(wait=False)
        await asyncio.get_running_loop().run_in_executor(None, self._deleters.shutdown)
        self._reservations.close()

    # -- the node's side

    async def _prepare(self) -> None:
        """Bridge, sysctls and rules; once, and again after what failed or changed."""
        async with self._preparing:
            if self._index and not self._problem:
                return
            try:
                index = await self._run(self._maker, self._make_bridge)
                await self._apply_nat()
            except (CriError, Failure) as error:
                self._problem = str(error)
                raise
            self._index, self._problem = index, ""

    async def _try_to_prepare(self) -> None:
        try:
            await self._prepare()
        except (CriError, Failure) as error:
            log.error("%s", error)  # and status() says it until it works

    async def _apply_nat(self) -> None:
        # one at a time, rendered when its turn comes: the last one written has everybody's ports
        async with self._nat:
            held = [r for r in self._reservations.held.values() if r.pod_id not in self._leaving]
            if any(r.ports for r in held):
                self._sysctl(f"ipv4/conf/{self._bridge}/route_localnet", "1")
            subnets = {*self._subnets, *(i.network for r in held for i in r.interfaces)}  # after a new pod CIDR, older ones too
            await nat.apply(nat.render(self._bridge, sorted(subnets, key=str), held))

    async def _forget_flows(self, ports: Iterable[HostPort]) -> None:
        """A flow of UDP is translated as its first packet was for as long as it goes on: to the pod before, or to none."""
        numbers = {port.port for port in ports if port.protocol == "udp"}
        if numbers:
            try:
                await self._run(self._maker, lambda: conntrack.forget({s.version for s in self._subnets}, "udp", numbers))
            except OSError as error:
                raise Failure.wrap("pod network", "forget flows of host ports", error) from None

    def _sysctl(self, name: str, value: str) -> None:
        """Set a sysctl of the daemon's own network namespace; one that already is as it should be is not written (read-only /proc/sys)."""
        file = _SYSCTL / name
        try:
            if file.read_text().strip() != value:
                file.write_text(value)
        except OSError as error:
            raise Failure.wrap("prepare pod network", "sysctl", error, str(file)) from None

    def _make_bridge(self) -> int:
        from cri.network import messages

        host = self._socket()
        self._mtu = messages.uplink_mtu(host)
        gateways = [ip_interface(f"{gateway(s)}/{s.prefixlen}") for s in self._subnets]
        (error,) = host.batch([messages.new_bridge(self._bridge, _link_mac(g.ip for g in gateways), self._mtu)])
        if error is not None and error.errno != errno.EEXIST:
            raise Failure.wrap("prepare pod network", "create bridge", error, self._bridge)
        index = messages.link_index(host, self._bridge)
        self._sysctl("ipv4/ip_forward", "1")
        if (_SYSCTL / "ipv6").exists():
            # CVE-2020-10749: a pod must not become the node's IPv6 router by advertising itself
            self._sysctl(f"ipv6/conf/{self._bridge}/accept_ra", "0")
        if any(s.version == 6 for s in self._subnets):
            self._sysctl("ipv6/conf/all/forwarding", "1")
        self._set_gateways(host, index, gateways)
        return index

    def _set_gateways(self, host: Socket, index: int, gateways: list[Interface]) -> None:
        """Exactly the gateways: an old subnet's goes once no pod lives in it."""
        from cri.network import messages

        lived_in = {i.network for r in self._reservations.held.values() for i in r.interfaces}
        have = {ip_interface(a) for a in messages.addresses(host, index)}
        stale = [a for a in have if a not in gateways and a.network not in lived_in]
        wanted = [messages.add_address(index, g) for g in gateways if g not in have]
        try:
            host.request(*[messages.delete_address(index, a) for a in stale], *wanted, messages.link_up(index))
        except OSError as error:
            raise Failure.wrap("prepare pod network", "configure bridge", error, self._bridge) from None

    def _sweep(self, links_of_live: set[str]) -> None:
        """Delete ports of the bridge that no pod owns (their reservation was lost)."""
        try:
            index = socket.if_nametoindex(self._bridge)
        except OSError:
            return
        from cri.network import messages

        host = self._socket()
        owned = links_of_live | {r.link for r in self._reservations.held.values()}
        for name in messages.ports(host, index):
            if name.startswith(_PREFIX) and name not in owned:
                log.info("deleting link %s, which belongs to no pod", name)
                host.batch([messages.delete_link(name)])

    # -- one pod

    def _connect(self, pod: PodNetwork, reservation: Reservation, netlink_fd: int) -> None:
        from cri.network import messages

        with Socket(netlink_fd) as inside:
            self._reservations.record(reservation)
            failpoints.hit("add network", "address")
            host = self._socket()
            step, where = "open", pod.netns_path
            try:
                netns = os.open(pod.netns_path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    step, where = "create veth", reservation.link
                    address = _link_mac(i.ip for i in reservation.interfaces)
                    host.request(
                        messages.new_veth(reservation.link, self._index, self._mtu, POD_LINK, address, netns),
                        messages.port_up(reservation.link),
                    )
                finally:
                    os.close(netns)
                failpoints.hit("add network", "veth")
                step, where = "configure", POD_LINK
                index = messages.link_index(inside, POD_LINK)
                inside.request(
                    messages.link_up(_LOOPBACK_INDEX),
                    messages.link_up(index),
                    *[messages.add_address(index, i) for i in reservation.interfaces],
                    *[messages.default_route(gateway(i.network), index) for i in reservation.interfaces],
                )
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EINVAL) and step == "create veth":
                    self._index = 0  # somebody deleted the bridge: the next attempt makes it again
                raise Failure.wrap("set up pod network", step, error, where) from None

    async def _release(self, pod_id: str) -> None:
        reservation = self._reservations.held.get(pod_id)
        if reservation is None:
            return
        self._leaving.add(pod_id)
        try:
            if pod_id in self._connecting:  # its setup was cancelled or failed; what runs in the thread runs to its end
                await asyncio.wait([self._connecting.pop(pod_id)])
            if reservation.ports:
                await self._apply_nat()  # first: a port must never lead to the next owner of the address
                await self._forget_flows(reservation.ports)
            failpoints.hit("delete network", "veth")
            await self._run(self._deleters, lambda: self._disconnect(reservation))
            self._reservations.forget(pod_id)
        finally:
            self._leaving.discard(pod_id)

    def _disconnect(self, reservation: Reservation) -> None:
        from cri.network import messages

        with Socket() as host:
            (error,) = host.batch([messages.delete_link(reservation.link)])
        if error is not None and error.errno != errno.ENODEV:
            raise Failure.wrap("tear down pod network", "delete link", error, reservation.link)
        failpoints.hit("delete network", "address")
        self._reservations.erase(reservation.pod_id)

    # -- plumbing

    def _socket(self) -> Socket:
        if self._host is None:
            self._host = Socket()
        return self._host

    def _close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    def _submit(self, thread: ThreadPoolExecutor, function: Callable[[], T]) -> asyncio.Future[T]:
        work = asyncio.get_running_loop().run_in_executor(thread, function)
        # if nobody waits any more its failure has been seen all the same: the caller was cancelled, and undo takes everything back
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        return work

    async def _run(self, thread: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        """Run in a thread. Cancelling the caller lets the work finish."""
        return await asyncio.shield(self._submit(thread, function))

    def _recorded_cidr(self) -> tuple[Subnet, ...] | None:
        try:
            text = (self._directory / _CIDR_FILE).read_text()
        except FileNotFoundError:
            return None
        return parse_subnets(text.split(","))
