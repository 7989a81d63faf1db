"""A node and a pod as network namespaces, and the plugins of a network at work on them: native ones, and Debian's."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cri.network.base import PodNetwork
from cri.network.cni import arguments, chain, conf
from cri.network.cni.cache import Attachment
from cri.network.cni.execute import Plugins
from cri.network.native.chain import Native
from protos.runtime.v1 import api_pb2 as v1
from shim.linux import libc
from tests.kernel.netns import CLONE_NEWNET, Netns

T = TypeVar("T")
DEBIAN = "/usr/lib/cni"
ALL = ("loopback", "bridge", "ptp", "host-local", "portmap", "bandwidth", "firewall", "tuning")
POD_ID = "ab" * 32
_VETH = re.compile(r"\bveth[0-9a-f]{8}\b")
_MAC = re.compile(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b")
_LINK_LOCAL = re.compile(r"\bfe80::[0-9a-f:]+")
_FACTS = ("ifname", "flags", "mtu", "qdisc", "group", "txqlen", "link_type", "promiscuity", "linkinfo", "master")


class World:
    """One node with one pod, gone with ``close``. Its loop runs in a thread that lives in the node's namespace."""

    def __init__(self, directory: Path, pods: int = 1) -> None:
        self.directory = directory
        self.node, self.pods = Netns("node"), [Netns("pod") for _ in range(pods)]
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        ready = threading.Event()

        def body() -> None:
            fd = os.open(self.node.path, os.O_RDONLY | os.O_CLOEXEC)
            libc.setns(fd, CLONE_NEWNET)
            os.close(fd)
            ready.set()
            self.loop.run_forever()

        self._thread = threading.Thread(target=body)
        self._thread.start()
        ready.wait()
        self.node.run("ip", "link", "set", "lo", "up")
        for pod in self.pods:
            pod.run("ip", "link", "set", "lo", "up")
        self.plugins = Plugins([DEBIAN], 30)
        self.native = Native(ALL, 30, self._netlink, self._sysctls)

    def close(self) -> None:
        self.run(self.native.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        for namespace in (*self.pods, self.node):
            namespace.delete()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def _pod(self, pod_id: str) -> Netns:
        return self.pods[int(pod_id[-2:], 16) - 0xAB]

    async def _netlink(self, pod_id: str) -> int:
        return await asyncio.to_thread(self._pod(pod_id).netlink)

    async def _sysctls(self, pod_id: str, write: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, int]]:
        def work() -> tuple[dict[str, str], dict[str, int]]:
            values, failed = {}, {}
            for name, text in write.items():
                try:
                    if text is not None:
                        Path("/proc/sys", name).write_text(text)
                    values[name] = Path("/proc/sys", name).read_text().removesuffix("\n")
                except OSError as error:
                    failed[name] = error.errno or 0
            return values, failed

        return await asyncio.to_thread(lambda: self._pod(pod_id).call(work))

    # -- a network

    def attachment(self, network: conf.NetworkConf, pod: int = 0, **fields: Any) -> Attachment:
        pod_id = POD_ID[:-2] + f"{0xAB + pod:02x}"
        told = PodNetwork(pod_id=pod_id, netns_path=self.pods[pod].path, namespace="default", name="pod", uid="uid", **fields)
        return Attachment(
            container_id=pod_id,
            if_name="eth0",
            network_name=network.name,
            netns=told.netns_path,
            cni_args=arguments.arguments(told),
            capability_args=arguments.capabilities(told),
        )

    def network(self, plugins: list[dict[str, Any]], version: str) -> conf.NetworkConf:
        raw = {"cniVersion": version, "name": "testnet", "plugins": plugins}
        return conf.parse(json.dumps(raw).encode())

    def add(self, native: bool, network: conf.NetworkConf, attachment: Attachment) -> None:
        if not native:
            attachment.result = self.run(chain.add(self.plugins, network, attachment))
            return
        options = self.native.options(network)
        assert options is not None
        netlink: Callable[[], Awaitable[int]] = lambda: self._netlink(attachment.container_id)  # noqa: E731
        attachment.result = self.run(self.native.add(network, options, attachment, netlink))

    def delete(self, native: bool, network: conf.NetworkConf, attachment: Attachment, netns: str | None = None) -> None:
        netns = attachment.netns if netns is None else netns
        if not native:
            self.run(chain.delete(self.plugins, network, attachment, netns))
            return
        options = self.native.options(network)
        assert options is not None
        self.run(self.native.delete(network, options, attachment, netns))

    def check(self, native: bool, network: conf.NetworkConf, attachment: Attachment) -> None:
        if not native:
            self.run(chain.check(self.plugins, network, attachment))
            return
        options = self.native.options(network)
        assert options is not None
        self.run(self.native.check(network, options, attachment))

    # -- what is there

    def state(self) -> dict[str, Any]:
        """Everything that plugins make, without what is random."""
        found: dict[str, Any] = {"files": self._files()}
        for name, namespace in (("node", self.node), *((f"pod{n}", pod) for n, pod in enumerate(self.pods))):
            found[name] = {**_links(namespace), "sysctls": _sysctls(namespace)}
        for command in ("iptables-save", "ip6tables-save"):
            text = self.node.run(command)
            # counters, and tables that somebody has looked at
            found[command] = [re.sub(r" \[\d+:\d+\]", "", line) for line in text.splitlines() if line.startswith((":CNI", ":ADM", "-A"))]
        found["nft bridge"] = re.sub(r" # handle \d+", "", self.node.run("nft", "list", "ruleset", "bridge")).splitlines()
        text = json.dumps(found).replace(self.directory.name, "WORLD")
        return json.loads(self.anonymous(text))  # type: ignore[no-any-return]

    def anonymous(self, text: str) -> str:
        for number, pod in enumerate(self.pods):
            text = text.replace(pod.path, f"NETNS{number}").replace(pod.name, f"NETNS{number}")
        for pattern, word in ((_VETH, "VETH"), (_MAC, "MAC"), (_LINK_LOCAL, "FE80")):
            text = pattern.sub(word, text)
        return text

    def _files(self) -> dict[str, str]:
        return {str(p.relative_to(self.directory)): p.read_text() for p in sorted(self.directory.rglob("*")) if p.is_file()}


def _links(namespace: Netns) -> dict[str, Any]:
    links = json.loads(namespace.run("ip", "-j", "-d", "link"))
    addresses = json.loads(namespace.run("ip", "-j", "addr"))
    return {
        "links": sorted(json.dumps({k: _plain(link[k]) for k in _FACTS if k in link}, sort_keys=True) for link in links),
        "addresses": sorted(json.dumps([a["ifname"], [_address(i) for i in a["addr_info"]]]) for a in addresses),
        "routes": sorted(json.dumps({**r, "flags": []}, sort_keys=True) for v in "46" for r in _routes(namespace, v)),
        "shaping": sorted(line for line in namespace.run("tc", "qdisc").splitlines()),
        "filters": [
            re.sub(r"index \d+", "", line)
            for link in links
            for line in namespace.run("tc", "filter", "show", "dev", link["ifname"], "parent", "ffff:").splitlines()
            if link["ifname"] != "lo"
        ],
    }


def _routes(namespace: Netns, version: str) -> list[dict[str, Any]]:
    return json.loads(namespace.run("ip", "-j", f"-{version}", "route"))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """What is configured, not what is counted or still changes."""
    if isinstance(value, list):
        return [flag for flag in value if flag in ("UP", "PROMISC", "ALLMULTI")]
    if isinstance(value, dict) and "info_data" in value:
        wanted = {k: v for k, v in value["info_data"].items() if k in ("vlan_filtering", "forward_delay", "mode")}
        return {**value, "info_data": wanted}
    if isinstance(value, dict) and "info_slave_data" in value:
        slave = value["info_slave_data"]
        return {**value, "info_slave_data": {k: slave[k] for k in ("hairpin", "isolated", "guard")}}
    return value


def _address(info: dict[str, Any]) -> list[Any]:
    flags = sorted(k for k in ("dadfailed", "nodad", "noprefixroute", "dynamic") if info.get(k))
    return [info["local"], info["prefixlen"], info.get("broadcast"), info["scope"], flags]


def _sysctls(namespace: Netns) -> dict[str, str]:
    def read() -> dict[str, str]:
        found = {}
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            found[name] = Path("/proc/sys/net", name).read_text().strip()
        names = {"ipv6": ("accept_ra", "accept_dad", "disable_ipv6"), "ipv4": ("route_localnet", "arp_notify", "rp_filter")}
        for family in names:
            for directory in Path("/proc/sys/net", family, "conf").iterdir():
                for name in names[family]:
                    found[f"{directory.name}/{name}"] = (directory / name).read_text().strip()
        return found

    return dict(sorted(namespace.call(read).items()))


def mapping(host: int, container: int, protocol: Any = v1.TCP, ip: str = "") -> v1.PortMapping:
    return v1.PortMapping(host_port=host, container_port=container, protocol=protocol, host_ip=ip)
