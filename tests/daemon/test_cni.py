"""Pods on CNI networks: Debian's plugins do the work, over the daemon's socket."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from protos.runtime.v1 import api_pb2 as v1
from tests.daemon.cni import DEBIAN, Plugins, cni_daemon, ips, network_condition, remove, sandbox, stop
from tests.daemon.harness import Daemon, Node, wait_for

pytestmark = pytest.mark.skipif("not __import__('os').path.exists('/usr/lib/cni/bridge')", reason=f"no plugins in {DEBIAN}")


@pytest.fixture(scope="module")
def world(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Plugins]]:
    with cni_daemon(node, tmp_path_factory.mktemp("cni")) as world:
        yield world


@pytest.fixture(scope="module")
def daemon(world: tuple[Daemon, Plugins]) -> Daemon:
    return world[0]


@pytest.fixture
def plugins(world: tuple[Daemon, Plugins]) -> Iterator[Plugins]:
    """Bridge and portmap, dual stack; afterwards everything must be given back."""
    daemon, plugins = world
    plugins.behave()
    plugins.install()
    yield plugins
    plugins.behave()
    daemon.remove_pods()
    plugins.nothing_left(daemon)
    plugins.uninstall()


def output(daemon: Daemon, container: str, *command: str) -> str:
    reply = daemon.exec(container, *command)
    assert reply.exit_code == 0, reply.stderr
    return reply.stdout.decode()


def serve(daemon: Daemon, image: str, page: str, **fields: object) -> tuple[str, str]:
    """A pod with a web server; its id and its container's."""
    pod = daemon.run_pod(**fields)  # type: ignore[arg-type]
    script = f"mkdir -p /www && echo {page} > /www/index.html && exec httpd -f -p [::]:80 -h /www"
    container = daemon.run(pod, image, "sh", "-c", script)
    wait_for("the server", lambda: daemon.exec(container, "wget", "-qO-", "http://127.0.0.1/").exit_code == 0)
    return pod[0], container


def fetch(daemon: Daemon, address: str, port: int) -> str:
    """From the node."""
    shell = f"exec 3<>/dev/tcp/{address}/{port} && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"
    return daemon.node.run("bash", "-c", shell).stdout


def test_not_ready_until_there_is_a_network_and_again_without(daemon: Daemon, world: tuple[Daemon, Plugins]) -> None:
    plugins = world[1]
    condition = network_condition(daemon)
    assert (condition.status, condition.reason) == (False, "NetworkPluginNotReady")
    assert condition.message.startswith("Network plugin returns error: cni plugin not initialized: no network config found in ")
    with pytest.raises(grpc.RpcError) as refused:
        daemon.run_pod()
    assert "cni plugin not initialized" in refused.value.details() and refused.value.code() == grpc.StatusCode.UNAVAILABLE
    daemon.remove_pods()
    host = daemon.run_pod(host_network=True)
    remove(daemon, host[0])
    plugins.install()
    assert network_condition(daemon).status, "seen at once"
    (plugins.networks / "10-test.conflist").write_text("{")
    assert "10-test.conflist: not JSON" in network_condition(daemon).message
    plugins.install({"type": "nowhere"})
    assert 'failed to find plugin "nowhere" in path' in network_condition(daemon).message
    plugins.install()
    assert network_condition(daemon).status
    plugins.uninstall()
    assert not network_condition(daemon).status


def test_pods_reach_each_other_the_node_and_a_host_port(daemon: Daemon, plugins: Plugins, busybox: str) -> None:
    server, _ = serve(daemon, busybox, "here", port_mappings=[v1.PortMapping(host_port=8099, container_port=80)])
    client_pod = daemon.run_pod()
    client = daemon.run(client_pod, busybox, "sleep", "1000")
    four, six = ips(daemon, server)
    assert four.startswith("10.231.0.") and six.startswith("fd00:231::")
    assert output(daemon, client, "wget", "-qO-", f"http://{four}/") == "here\n"
    assert output(daemon, client, "wget", "-qO-", f"http://[{six}]/") == "here\n"
    for address in ("10.231.0.1", "192.0.2.1", "fd00:231::1"):
        output(daemon, client, "ping", "-c1", "-w5", address)
    assert "here" in fetch(daemon, four, 80) and "here" in fetch(daemon, six, 80), "the node reaches pods"
    assert "here" in fetch(daemon, "192.0.2.1", 8099)
    assert output(daemon, client, "wget", "-qO-", "http://192.0.2.1:8099/") == "here\n"
    assert output(daemon, client, "wget", "-qO-", "http://[fd00:231::1]:8099/") == "here\n"
    shown = output(daemon, client, "ip", "addr")
    assert all(f"{ip}/" in shown for ip in ips(daemon, client_pod[0])) and "LOOPBACK,UP" in shown
    assert ips(daemon, client_pod[0])[0] in output(daemon, client, "cat", "/etc/hosts")
    for link in ("all", "default", "eth0"):
        assert output(daemon, client, "cat", f"/proc/sys/net/ipv6/conf/{link}/accept_ra").strip() == "0", "CVE-2020-10749"
    remove(daemon, server)
    with pytest.raises(Exception, match="returned non-zero"):
        fetch(daemon, "192.0.2.1", 8099)


def test_the_result_is_in_the_verbose_status_and_cached_as_libcni_does(daemon: Daemon, plugins: Plugins) -> None:
    pod, config = daemon.run_pod()
    reply = daemon.runtime.PodSandboxStatus(v1.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True), timeout=10)
    shown = json.loads(reply.info["info"])["network"]
    assert shown["network"] == "testnet" and shown["configuration"].endswith("10-test.conflist") and shown["cniVersion"] == "1.0.0"
    assert [i["address"].split("/")[0] for i in shown["cniResult"]["ips"]] == ips(daemon, pod)
    cached = json.loads((daemon.root / "network" / "cni" / "results" / f"testnet-{pod}-eth0").read_text())
    assert (cached["kind"], cached["containerId"], cached["ifName"], cached["networkName"]) == ("cniCacheV1", pod, "eth0", "testnet")
    assert cached["result"] == shown["cniResult"] and ["K8S_POD_NAME", config.metadata.name] in cached["cniArgs"]


@pytest.mark.parametrize("versions, chosen", [(["0.3.1"], "0.3.1"), (["0.4.0"], "0.4.0"), (["0.3.1", "0.4.0", "1.0.0", "1.1.0"], "1.0.0")])
def test_the_newest_version_that_configuration_and_plugins_speak(
    daemon: Daemon, plugins: Plugins, busybox: str, versions: list[str], chosen: str
) -> None:
    """Debian's plugins end at 1.0.0."""
    plugins.install(plugins.bridge(), plugins.portmap(), plugins.scripted(), version=versions[0], cniVersions=versions)
    wait_for("NetworkReady", lambda: network_condition(daemon).status)
    pod, _ = daemon.run_pod()
    assert len(ips(daemon, pod)) == 2
    remove(daemon, pod)
    add, delete = plugins.calls("ADD")[-1]["configuration"], plugins.calls("DEL")[-1]["configuration"]
    assert add["cniVersion"] == delete["cniVersion"] == add["prevResult"]["cniVersion"] == chosen
    assert ("prevResult" in delete) == (chosen != "0.3.1"), "DEL has it since 0.4.0"


def test_a_version_that_no_plugin_speaks(daemon: Daemon, plugins: Plugins) -> None:
    plugins.install(plugins.bridge(), version="1.1.0")
    with pytest.raises(grpc.RpcError, match=r"bridge.*failed \(add\): incompatible CNI versions"):
        daemon.run_pod()
    plugins.install(plugins.bridge(), version="1.1.0", cniVersions=["9.9.9", "0.0.1"])
    with pytest.raises(grpc.RpcError, match=r"allows CNI 1.1.0, 0.0.1, its plugins speak other versions \(bridge: "):
        daemon.run_pod()


def test_what_plugins_are_told(daemon: Daemon, plugins: Plugins) -> None:
    capabilities = "portMappings bandwidth dns ipRanges mac ips aliases cgroupPath io.kubernetes.cri.pod-annotations".split()
    plugins.install(plugins.bridge(), plugins.scripted(*capabilities), plugins.scripted())
    update = v1.UpdateRuntimeConfigRequest(
        runtime_config=v1.RuntimeConfig(network_config=v1.NetworkConfig(pod_cidr="10.77.0.0/24,fd00:77::/64"))
    )
    daemon.runtime.UpdateRuntimeConfig(update, timeout=10)
    annotations = {
        "kubernetes.io/ingress-bandwidth": "10M",
        "network.cri-shim.io/mac": "0a:58:0a:00:00:07",
        "network.cri-shim.io/ips": "10.231.0.77",
        "network.cri-shim.io/aliases": "db",
    }
    dns = v1.DNSConfig(servers=["10.0.0.10"], searches=["here"])
    pod, config = daemon.run_pod(
        annotations=annotations, dns_config=dns, port_mappings=[v1.PortMapping(host_port=8098, container_port=80, protocol=v1.UDP)]
    )
    remove(daemon, pod)
    first, second = plugins.calls("ADD")
    deleted = plugins.calls("DEL")[-1]
    assert first["configuration"]["runtimeConfig"] == {
        "portMappings": [{"hostPort": 8098, "containerPort": 80, "protocol": "udp"}],
        "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 4294967295},
        "dns": {"servers": ["10.0.0.10"], "searches": ["here"], "options": []},
        "ipRanges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd00:77::/64"}]],
        "mac": "0a:58:0a:00:00:07",
        "ips": ["10.231.0.77"],
        "aliases": ["db"],
        "cgroupPath": config.linux.cgroup_parent,
        "io.kubernetes.cri.pod-annotations": annotations,
    }
    assert "runtimeConfig" not in second["configuration"] and "capabilities" not in first["configuration"]
    assert first["configuration"]["name"] == "testnet" and len(first["configuration"]["prevResult"]["ips"]) == 2
    assert deleted["configuration"]["runtimeConfig"] == first["configuration"]["runtimeConfig"], "the same at DEL"
    environment = first["environment"]
    assert environment["CNI_ARGS"] == (
        f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={config.metadata.name};"
        f"K8S_POD_INFRA_CONTAINER_ID={pod};K8S_POD_UID={config.metadata.uid}"
    )
    assert (environment["CNI_CONTAINERID"], environment["CNI_IFNAME"]) == (pod, "eth0")
    assert environment["CNI_NETNS"] == deleted["environment"]["CNI_NETNS"] == str(daemon.state / "netns" / pod)
    ours = {"PATH", "CNI_COMMAND", "CNI_PATH", "CNI_ARGS", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"}
    assert set(environment) - {"LC_CTYPE"} == ours, "nothing of the daemon's environment (LC_CTYPE is the script's own)"


MANY = int(os.environ.get("PODS", "100"))  # 500 and more by hand


@pytest.mark.parametrize("count", [20, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_pods_churned_ten_at_a_time_leave_nothing(daemon: Daemon, plugins: Plugins, count: int) -> None:
    plugins.install(plugins.bridge())

    def one(_: int) -> tuple[str, str]:
        pod = daemon.run_pod()[0]
        return pod, sandbox(daemon, pod).network.ip

    def descriptors() -> int:
        pid = daemon.pids().daemon
        return len(os.listdir(f"/proc/{pid}/fd"))

    with ThreadPoolExecutor(10) as threads:
        before = None
        for _ in range(count // 10):
            pods = list(threads.map(one, range(10)))
            assert len({ip for _, ip in pods}) == 10
            list(threads.map(lambda pod: remove(daemon, pod[0]), pods))
            if before is None:
                before = descriptors()
    plugins.nothing_left(daemon)
    assert before is not None and descriptors() <= before


def test_a_pod_keeps_its_configuration_until_it_is_deleted(daemon: Daemon, plugins: Plugins) -> None:
    pod, _ = daemon.run_pod()
    plugins.install(plugins.scripted())
    daemon.restart()
    assert len(ips(daemon, pod)) == 2
    remove(daemon, pod)
    assert not plugins.calls("DEL"), "the plugins of its ADD"


def test_another_boot(daemon: Daemon, plugins: Plugins) -> None:
    """Addresses on disk outlive a reboot: they are released, with an empty CNI_NETNS, because the namespace is gone."""
    plugins.install({**plugins.bridge(), "ipMasq": False}, plugins.scripted())  # rules do not outlive one
    pod, _ = daemon.run_pod()
    assert plugins.held(daemon)["addresses"]
    daemon.kill()
    record = daemon.root / "pods" / f"{pod}.json"
    document = json.loads(record.read_text())
    document["facts"]["boot_id"] = "0" * 36
    record.write_text(json.dumps(document))
    daemon.node.run("umount", "-l", str(daemon.state / "netns" / pod))
    daemon.start()
    wait_for("the release", lambda: not plugins.held(daemon)["results"])
    assert [call["environment"]["CNI_NETNS"] for call in plugins.calls("DEL")] == [""]
    assert sandbox(daemon, pod).state == v1.SANDBOX_NOTREADY


def test_a_namespace_that_is_gone_does_not_keep_a_pod_from_going(daemon: Daemon, plugins: Plugins) -> None:
    # Debian's bridge leaves its masquerading rules when it cannot look into the namespace
    plugins.install({**plugins.bridge(), "ipMasq": False}, plugins.portmap(), plugins.scripted())
    pod, _ = daemon.run_pod(port_mappings=[v1.PortMapping(host_port=8097, container_port=80)])
    daemon.node.run("umount", "-l", str(daemon.state / "netns" / pod))
    stop(daemon, pod)
    assert plugins.calls("DEL")[-1]["environment"]["CNI_NETNS"] == ""
    remove(daemon, pod)
    plugins.nothing_left(daemon)


def test_pod_cidr_makes_a_configuration_from_a_template(node: Node, tmp_path_factory: pytest.TempPathFactory) -> None:
    template = tmp_path_factory.mktemp("template") / "cni.template"
    with cni_daemon(node, tmp_path_factory.mktemp("cni")) as (daemon, plugins):
        pool = json.dumps(plugins.bridge(subnet="{{.PodCIDR}}", routes=[{"dst": "0.0.0.0/0"}]))
        template.write_text('{"cniVersion": "1.0.0", "name": "testnet", "plugins": [' + pool.replace("cnitest0", "cnitest1") + "]}")
        daemon.kill()
        daemon.env["CRI_SHIM_NETWORK_CNI_CONF_TEMPLATE"] = str(template)
        daemon.start()
        assert not network_condition(daemon).status
        network = v1.RuntimeConfig(network_config=v1.NetworkConfig(pod_cidr="10.232.7.0/24"))
        daemon.runtime.UpdateRuntimeConfig(v1.UpdateRuntimeConfigRequest(runtime_config=network), timeout=10)
        assert network_condition(daemon).status
        assert ips(daemon, daemon.run_pod()[0])[0].startswith("10.232.7.")
