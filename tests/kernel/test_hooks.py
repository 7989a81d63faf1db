"""OCI hooks (config.md#posix-platform-hooks): each stage, its order, its state, its namespaces, and its failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shim.errors import Failure
from shim.oci.spec import Hook, Hooks, Spec
from tests.kernel.supervised import rig, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60), pytest.mark.mount]


def hooks(**stages: tuple[Hook, ...]) -> Callable[[Spec], Spec]:
    def change(spec: Spec) -> Spec:
        # An environment that no hook may see (CVE-2024-0132, CVE-2025-23266).
        env = (*spec.process.env, "LD_PRELOAD=/evil.so")
        return replace(spec, hooks=Hooks(**stages), process=replace(spec.process, env=env), annotations={"a": "b"})

    return change


def shell(script: str, timeout: int | None = None) -> Hook:
    return Hook("/bin/sh", ("sh", "-c", script), ("PATH=/usr/bin:/bin", "HOOK=1"), timeout)


async def test_stages_in_order_with_state(tmp_path: Path) -> None:
    log = tmp_path / "log"
    host = [
        f"(cat; echo; echo '{stage}' $HOOK $(pwd) $(env | grep -c LD_PRELOAD); readlink /proc/self/ns/mnt) >> {log}"
        for stage in ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    ]
    stages = {
        "prestart": (shell(host[0]),),
        "create_runtime": (shell(host[1]),),
        "create_container": (shell(host[2]), shell("cat > /dev/null; echo made > $PWD/../$(basename $PWD)/dev/null")),
        "start_container": (Hook("/bin/sh", ("sh", "-c", "cat > /from-start-container"), ("PATH=/bin",)),),
        "poststart": (shell(host[3]),),
        "poststop": (shell(host[4]),),
    }
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "sh", "-c", "cat /from-start-container; sleep 0.3", change=hooks(**stages))
        await node.exit(name)
        state = json.loads(node.lines(name)[0])
        assert state["id"] == name and state["status"] == "created" and state["annotations"] == {"a": "b"}
        await node.remove(name)
        await until(lambda: log.read_text().count("\n") >= 15)
    lines = log.read_text().splitlines()
    states, facts, namespaces = [json.loads(line) for line in lines[0::3]], lines[1::3], lines[2::3]
    assert facts == [f"{stage} 1 / 0" for stage in ("prestart", "createRuntime", "createContainer", "poststart", "poststop")]
    assert [s["status"] for s in states] == ["creating", "creating", "creating", "running", "stopped"]
    assert all(s["id"] == name and s["bundle"].endswith(name) for s in states)
    own = Path("/proc/self/ns/mnt").readlink().name
    assert namespaces[0] == namespaces[1] == namespaces[3] == own and namespaces[2] != own


async def test_create_container_hooks_see_the_root(tmp_path: Path) -> None:
    """What CDI hooks do: write into the container's root, found at the bundle's rootfs, with the host's programs."""
    script = 'b=$(sed \'s/.*"bundle": *"\\([^"]*\\)".*/\\1/\'); echo from-hook > $b/rootfs/etc/made; test -d /usr/share'
    async with rig() as node:
        pod = await node.pod()
        name = await node.run(pod, "cat", "/etc/made", change=hooks(create_container=(shell(script),)))
        await node.exit(name)
        assert node.lines(name) == ["from-hook"]


@pytest.mark.parametrize("stage", ["prestart", "create_runtime", "create_container"])
async def test_a_failing_hook_fails_the_create(stage: str) -> None:
    async with rig() as node:
        pod = await node.pod()
        with pytest.raises(Failure, match="exit code 3: it says why"):
            await node.create(pod, "true", change=hooks(**{stage: (shell("echo it says why; exit 3"),)}))
        with pytest.raises(Failure, match="no/such/hook.*ENOENT|exit code 127"):
            await node.create(pod, "true", change=hooks(**{stage: (Hook("/no/such/hook"),)}))
        with pytest.raises(Failure, match="still running after 1 s"):
            await node.create(pod, "true", change=hooks(**{stage: (shell("sleep 30", timeout=1),)}))
        name = await node.run(pod, "true")
        assert (await node.exit(name)).exit_code == 0
