"""The client of the system bus against sockets that are none, and the process that keeps a scope."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.cgroups import manager
from shim.cgroups.bus import Bus
from shim.cgroups.holder import Holder, image
from shim.cgroups.layout import Layout
from shim.errors import Failure


def test_a_bus_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
    with pytest.raises(Failure, match=r"create cgroup: connect to the system bus .*/bus: ENOENT.*hint: .*dbus"):
        Bus("create cgroup")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "tcp:host=localhost,port=1")
    with pytest.raises(Failure, match="not supported"):
        Bus("create cgroup")


@pytest.mark.parametrize("words", [b"", b"REJECTED EXTERNAL\r\n", b"nonsense" * 2000])
def test_a_bus_that_says_nothing_or_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/bus")
        listener.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
        began = time.monotonic()
        process = os.fork() if words else 0
        if words and process == 0:
            with listener.accept()[0] as peer:
                peer.recv(100)
                peer.sendall(words)
            os._exit(0)
        with pytest.raises(Failure, match="connect to the system bus"):
            Bus("create cgroup", 0.3)
        assert time.monotonic() - began < 5
        if process:
            os.waitpid(process, 0)


def test_looking_whether_a_connection_lives_waits_for_nothing() -> None:
    ours, theirs = socket.socketpair()
    bus = Bus.__new__(Bus)
    bus._socket = ours
    ours.settimeout(30)  # as it is left by a call
    began = time.monotonic()
    assert bus.alive()
    theirs.sendall(b"signal")
    assert bus.alive()
    assert ours.recv(6) == b"signal"
    theirs.close()
    assert not bus.alive()
    assert time.monotonic() - began < 5
    bus.close()


def test_the_other_driver_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_systemd", None)
    with pytest.raises(Failure, match="cgroupfs driver is in use"):
        manager.begin(Layout(2, "/c", {}), "a.slice:cri-shim:x")


def test_the_holder_waits_until_it_is_released() -> None:
    holder = Holder()
    assert not holder.ourselves
    deadline = time.monotonic() + 5
    while Path(f"/proc/{holder.pid}/cmdline").read_bytes() != b"cri-shim: holder\0":  # vfork lets us go a moment before
        assert time.monotonic() < deadline
    holder.release()
    assert not Path(f"/proc/{holder.pid}").exists()
    holder.release()


def test_the_holder_ends_with_who_holds_it() -> None:
    code = "import os\nfrom shim.cgroups.holder import Holder\nprint(Holder().pid, flush=True)\nos.kill(os.getpid(), 9)"
    root = Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + 5
    while (pid := Path(f"/proc/{done.stdout.strip()}")).exists() and (pid / "cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_holder_is_a_program_on_both_machines() -> None:
    assert len(image("x86_64")) < 200
    assert len(image("aarch64")) < 200
