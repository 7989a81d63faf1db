from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.containers.logs import container_log_path, core_path
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


@given(st.text(min_size=1), st.sampled_from(["/", "/l", "//l//m/", "/l/m"]))
def test_what_may_lead_over_links_ends_at_the_double_slash(name: str, directory: str) -> None:
    try:
        found = path(directory, name)
    except InvalidArgument:
        return
    core = core_path(found, v1.PodSandboxConfig(log_directory=directory))
    assert core.count("//") == 1 and posixpath.normpath(core.replace("//", "/")) == found
    assert posixpath.normpath(core.partition("//")[0] or "/") == posixpath.normpath("/" + directory.lstrip("/"))
