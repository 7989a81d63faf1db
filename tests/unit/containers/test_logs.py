from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.containers.logs import container_log_path
from cri.errors import InvalidArgument
from protos.runtime.v1 import api_pb2 as v1


def path(directory: str, name: str) -> str:
    return container_log_path(v1.PodSandboxConfig(log_directory=directory), v1.ContainerConfig(log_path=name))


def test_below_the_log_directory() -> None:
    assert path("/var/log/pods/x", "c/0.log") == "/var/log/pods/x/c/0.log"
    assert path("/var/log/pods/x/", "/c//0.log") == "/var/log/pods/x/c/0.log"


@pytest.mark.parametrize("directory, name", [("", "c.log"), ("/var/log", ""), ("", "")])
def test_no_log_unless_both_are_given(directory: str, name: str) -> None:
    assert path(directory, name) == ""


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "a/..", "x\0y", ".", "/"])
def test_paths_that_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="log_path"):
        path("/var/log/pods/x", name)


@given(st.text(min_size=1))
def test_whatever_is_accepted_is_below(name: str) -> None:
    try:
        found = path("/var/log/p", name)
    except InvalidArgument:
        return
    assert found.startswith("/var/log/p/")
    assert posixpath.normpath(found) == found
