"""bridge's ``macspoofchk``: frames that come from the pod with another MAC than its own are dropped. In nftables, as the plugin has it."""

from __future__ import annotations

import json

from cri.errors import Unavailable
from cri.network.native.call import Call
from cri.network.native.rules import run


def _names(call: Call) -> tuple[str, str, str]:
    """The chain of the link, that of its MAC, and the comment of their rules."""
    own = f"{call.container_id}-{call.if_name}"
    return f"cni-br-iface-{own}", f"cni-br-iface-{own}-mac", f"macspoofchk-{own}"


async def _nft(*argv: str, script: str = "") -> str:
    code, output, errors = await run(("nft", *argv), script.encode())
    if code != 0:
        raise Unavailable(f"nft failed: {errors}")
    return output


async def add(call: Call, link: str, mac: str) -> None:
    by_link, by_mac, comment = _names(call)
    rules = f"""table bridge nat {{
  chain PREROUTING {{ type filter hook prerouting priority -300; policy accept; }}
  chain {by_link} {{ }}
  chain {by_mac} {{ }}
}}
flush chain bridge nat {by_link}
flush chain bridge nat {by_mac}
add rule bridge nat PREROUTING iifname "{link}" jump {by_link} comment "{comment}"
add rule bridge nat {by_link} jump {by_mac} comment "{comment}"
add rule bridge nat {by_mac} ether saddr {mac} return comment "{comment}"
add rule bridge nat {by_mac} drop comment "{comment}"
"""
    await _nft("-f", "-", script=rules)


async def delete(call: Call) -> None:
    """Whatever of it is there."""
    by_link, by_mac, comment = _names(call)
    ruleset = json.loads(await _nft("-j", "list", "ruleset", "bridge"))["nftables"]
    script = ""
    for item in ruleset:
        rule = item.get("rule", {})
        if rule.get("table") == "nat" and rule.get("chain") == "PREROUTING" and rule.get("comment") == comment:
            script += f"delete rule bridge nat PREROUTING handle {rule['handle']}\n"
    chains = {item["chain"]["name"] for item in ruleset if item.get("chain", {}).get("table") == "nat"}
    for name in (by_link, by_mac):
        if name in chains:
            script += f"flush chain bridge nat {name}\n"
    script += "".join(f"delete chain bridge nat {name}\n" for name in (by_link, by_mac) if name in chains)
    if script:
        await _nft("-f", "-", script=script)
