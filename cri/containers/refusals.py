"""Calls that seccomp profiles refused, where the pod asks for them to be counted."""

from __future__ import annotations

import os

from cri.state.layout import Layout
from shim.oci import bundle
from shim.oci.bundle import Refusals


def read(layout: Layout, container_id: str) -> Refusals | None:
    """What has been counted of a container; None where nothing was. The file outlives supervisor and daemon, not the container."""
    try:
        directory = os.open(layout.bundle(container_id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return bundle.read_refusals(directory)
    finally:
        os.close(directory)
