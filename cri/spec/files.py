"""/etc/hosts, /etc/hostname and /etc/resolv.conf of a pod, as bytes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from cri.errors import InvalidArgument
from cri.spec import strings
from cri.spec.inputs import HostFacts
from protos.runtime.v1 import api_pb2 as v1

HOSTS, HOSTNAME, RESOLV_CONF = "hosts", "hostname", "resolv.conf"

_LOOPBACK = (
    "127.0.0.1\tlocalhost\n"
    "::1\tlocalhost ip6-localhost ip6-loopback\n"
    "fe00::0\tip6-localnet\n"
    "ff00::0\tip6-mcastprefix\n"
    "ff02::1\tip6-allnodes\n"
    "ff02::2\tip6-allrouters\n"
)
_FIELD = "config.dns_config"


def render(config: v1.PodSandboxConfig, host: HostFacts) -> dict[str, bytes]:
    """Content by file name. The kubelet mounts an /etc/hosts of its own; this one serves everybody else."""
    hostname = pod_hostname(config, host)
    return {
        HOSTS: hosts(config, host, hostname),
        HOSTNAME: f"{hostname}\n".encode(),
        RESOLV_CONF: resolv_conf(config.dns_config, host),
    }


def pod_hostname(config: v1.PodSandboxConfig, host: HostFacts) -> str:
    """The pod's name on the network; the host's for a pod that has none or lives in the host's network."""
    name = config.hostname
    if not name:
        return host.hostname
    strings.word(name, "config.hostname")
    if len(name.encode()) > 64:  # __NEW_UTS_LEN
        raise InvalidArgument("is longer than 64 bytes", field="config.hostname")
    return name


def hosts(config: v1.PodSandboxConfig, host: HostFacts, hostname: str, addresses: Iterable[str] = ()) -> bytes:
    """The host's file for a pod in its network, else loopback names and the pod's own."""
    if config.linux.security_context.namespace_options.network == v1.NODE:
        return _read(host, "/etc/hosts")
    own = [f"{address}\t{hostname}\n" for address in addresses]
    return (_LOOPBACK + "".join(own or [f"127.0.1.1\t{hostname}\n"])).encode()


def resolv_conf(dns: v1.DNSConfig, host: HostFacts) -> bytes:
    """What the DNS configuration says; the host's file where it says nothing."""
    for i, server in enumerate(dns.servers):
        try:
            ipaddress.ip_address(strings.word(server, f"{_FIELD}.servers[{i}]"))
        except ValueError:
            raise InvalidArgument(f"{server!r:.80} is not an address", field=f"{_FIELD}.servers[{i}]") from None
    searches = [strings.word(s, f"{_FIELD}.searches[{i}]") for i, s in enumerate(dns.searches)]
    options = [strings.word(o, f"{_FIELD}.options[{i}]") for i, o in enumerate(dns.options)]
    lines = [f"search {' '.join(searches)}"] if searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(options)}"] if options else []
    if not lines:
        return _read(host, "/etc/resolv.conf")
    return ("\n".join(lines) + "\n").encode()


def _read(host: HostFacts, path: str) -> bytes:
    try:
        return host.read(path)
    except FileNotFoundError:
        return b""  # a host without the file has nothing to pass on
