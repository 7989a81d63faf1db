"""Mount options sorted into attributes, propagation and file system data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shim.linux import mount as m
from shim.oci.spec import IDMapping
from shim.rootfs import idmap
from shim.rootfs.options import parse


def test_data_keeps_order_and_flags() -> None:
    assert list(parse(("mode=755", "newinstance", "size=64k", "defaults")).data.items()) == [
        ("mode", "755"),
        ("newinstance", None),
        ("size", "64k"),
    ]


def test_the_last_word_counts() -> None:
    options = parse(("ro", "noexec", "rw", "exec", "private", "rshared"))
    assert options.set == 0
    assert options.clear == m.MOUNT_ATTR_RDONLY | m.MOUNT_ATTR_NOEXEC
    assert options.propagation == m.MS_SHARED


def test_recursive_attributes_are_apart() -> None:
    options = parse(("rro", "rnosuid", "ro"))
    assert (options.set, options.recursive_set) == (m.MOUNT_ATTR_RDONLY, m.MOUNT_ATTR_RDONLY | m.MOUNT_ATTR_NOSUID)


@given(st.lists(st.sampled_from(["ro", "rw", "suid", "nosuid", "noatime", "relatime", "strictatime", "rro", "rrw", "dev", "nodev"])))
def test_nothing_is_set_and_cleared_at_once(words: list[str]) -> None:
    options = parse(tuple(words))
    assert not options.set & options.clear & ~m.MOUNT_ATTR_ATIME
    assert not options.recursive_set & options.recursive_clear & ~m.MOUNT_ATTR_ATIME


def test_id_map_text() -> None:
    assert idmap.id_map((IDMapping(0, 100000, 65536), IDMapping(65536, 7, 1))) == b"0 100000 65536\n65536 7 1\n"
