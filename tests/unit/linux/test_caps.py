"""Capability names, masks, and what dropping them leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.linux import caps, libc


def test_last_cap_is_the_kernels() -> None:
    assert caps.last_cap() == int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def test_numbers() -> None:
    assert caps.NUMBERS["CAP_CHOWN"] == 0
    assert caps.NUMBERS["CAP_SYS_ADMIN"] == 21
    assert caps.NUMBERS["CAP_SETFCAP"] == 31
    assert caps.NUMBERS["CAP_CHECKPOINT_RESTORE"] == 40


@given(st.sets(st.sampled_from(caps.NAMES[:38])))
def test_masks_and_names_are_inverse(names: set[str]) -> None:
    assert set(caps.names(caps.mask(names))) == names


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="CAP_WHATEVER"):
        caps.mask(["CAP_WHATEVER"])
    with pytest.raises(ValueError, match="chown"):
        caps.mask(["chown"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_drop_everything_but_two() -> None:
    keep = caps.mask(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"])
    read, write = os.pipe()
    pid, _ = libc.clone3(0)
    if pid == 0:
        try:
            caps.drop_bounding(keep)
            caps.keepcaps(True)
            os.setresuid(1000, 1000, 1000)
            caps.keepcaps(False)
            caps.set_caps(keep, keep, keep)
            caps.set_ambient(caps.mask(["CAP_NET_BIND_SERVICE"]))
            lines = Path("/proc/self/status").read_text().splitlines()
            os.write(write, " ".join(line.split()[1] for line in lines if line.startswith("Cap")).encode())
        finally:
            os._exit(0)
    os.close(write)
    inheritable, permitted, effective, bounding, ambient = (int(v, 16) for v in os.read(read, 200).split())
    os.close(read)
    os.waitpid(pid, 0)
    assert inheritable == permitted == effective == bounding == keep
    assert ambient == 1 << caps.NUMBERS["CAP_NET_BIND_SERVICE"]
