"""tuning: parameters of the pod's network namespace, and of its interface. What the interface had before is kept until DEL."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from cri.network import rtnl
from cri.network.native.call import Call
from cri.network.native.options import Tuning
from cri.network.native.result import Result
from cri.network.netlink import Raw

_ALLOWED = Path("/etc/cni/tuning/allowlist.conf")


def _merged(conf: Tuning, call: Call) -> Tuning:
    """With what the network's ``args`` and the capability ``mac`` say."""
    args = conf.args.cni
    changes: dict[str, Any] = {"sysctl": {**conf.sysctl, **args.sysctl}}
    if call.runtime.get("mac"):
        changes["mac"] = call.runtime["mac"]
    for name in ("mac", "promisc", "mtu", "allmulti", "tx_q_len"):
        if (value := getattr(args, name)) is not None:
            changes[name] = value
    return msgspec.structs.replace(conf, **changes)


def parameters(conf: Tuning, call: Call) -> dict[str, str]:
    """By paths below /proc/sys. Raises ValueError for those of something else than the network, or that the node does not allow."""
    found = {}
    allowed = _allowed()
    for name, value in conf.sysctl.items():
        if allowed is not None and not any(re.search(pattern, name) for pattern in allowed):
            raise ValueError(f"sysctl {name} is not allowed by {_ALLOWED}")
        path = os.path.normpath(name.replace("IFNAME", call.if_name, 1).replace(".", "/")).lstrip("/")
        if not path.startswith("net/"):
            raise ValueError(f'invalid net sysctl key: "{name}"')
        found[path] = value
    return found


def _allowed() -> list[str] | None:
    try:
        return [line.strip() for line in _ALLOWED.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        return None


async def add(conf: Tuning, call: Call, previous: Result | None) -> Result:
    if previous is None:
        raise ValueError("required prevResult missing")
    conf = _merged(conf, call)
    wanted = parameters(conf, call)
    if wanted:
        _, failed = await call.parameters(wanted)
        for name, number in failed.items():
            raise OSError(number, f"{os.strerror(number)}: {name}")
    if not (conf.mac or conf.mtu or conf.promisc or conf.allmulti is not None or conf.tx_q_len is not None):
        return previous
    inside = await call.inside()
    facts = rtnl.link(inside, call.if_name)
    _back_up(conf, call, facts)
    inside.request(*_changes(facts.index, _wanted(conf)))
    return previous.with_mac(call.if_name, conf.mac) if conf.mac else previous


def _wanted(conf: Tuning) -> dict[str, Any]:
    """In the names of the backup."""
    found: dict[str, Any] = {"mac": conf.mac, "promisc": True if conf.promisc else None, "mtu": conf.mtu}
    return found | {"allmulti": conf.allmulti, "txQLen": conf.tx_q_len}


def _changes(index: int, values: dict[str, Any]) -> list[Raw]:
    messages = []
    if values.get("mac"):
        messages.append(rtnl.set_link(index, mac=values["mac"]))
    for name, flag in (("promisc", rtnl.PROMISC), ("allmulti", rtnl.ALLMULTI)):
        if values.get(name) is not None:
            messages.append(rtnl.set_link(index, flags=flag if values[name] else 0, change=flag))
    if values.get("mtu"):
        messages.append(rtnl.set_link(index, mtu=values["mtu"]))
    if values.get("txQLen") is not None:
        messages.append(rtnl.set_link(index, queue=values["txQLen"]))
    return messages


def _file(conf: Tuning, call: Call) -> Path:
    return Path(conf.data_dir, f"{call.container_id}_{call.if_name}.json")


def _back_up(conf: Tuning, call: Call, facts: rtnl.LinkFacts) -> None:
    kept: dict[str, Any] = {}
    if conf.mac:
        kept["mac"] = facts.mac
    if conf.promisc:
        kept["promisc"] = facts.promiscuity != 0
    if conf.mtu:
        kept["mtu"] = facts.mtu
    if conf.allmulti is not None:
        kept["allmulti"] = bool(facts.flags & rtnl.ALLMULTI)
    if conf.tx_q_len is not None:
        kept["txQLen"] = facts.queue
    file = _file(conf, call)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(kept, indent=1).encode())
    finally:
        os.close(fd)


async def delete(conf: Tuning, call: Call, previous: Result | None) -> None:
    """The interface is deleted next, with all that was changed of it; what is left is the file."""
    _file(conf, call).unlink(missing_ok=True)


async def check(conf: Tuning, call: Call, result: Result) -> None:
    conf = _merged(conf, call)
    wanted = parameters(conf, call)
    if wanted:
        values, failed = await call.parameters(dict.fromkeys(wanted))
        for name, value in wanted.items():
            if values.get(name) != value:
                raise ValueError(f"{name} is {values.get(name, os.strerror(failed.get(name, 0)))}, not {value}")
    facts = rtnl.link(await call.inside(), call.if_name)
    conf = msgspec.structs.replace(conf, mac=conf.mac.lower())
    there = {"mac": facts.mac, "mtu": facts.mtu, "allmulti": bool(facts.flags & rtnl.ALLMULTI), "txQLen": facts.queue}
    for name, value in _wanted(conf).items():
        if name != "promisc" and value not in ("", 0, None) and there[name] != value:
            raise ValueError(f"{name} of {call.if_name} is {there[name]}, not {value}")
    if bool(facts.promiscuity) != conf.promisc:
        raise ValueError(f"promisc of {call.if_name} is not {conf.promisc}")
