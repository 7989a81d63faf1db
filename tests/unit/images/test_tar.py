"""The layer reader against Python's and GNU's writers, and against noise."""

import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.images import tar
from cri.images.tar import BadArchive, Entry, Reader


def read(data: bytes, step: int = 1 << 20) -> list[tuple[Entry, bytes]]:
    """All entries with their stored data; the stream hands out at most ``step`` bytes at a time."""
    source = io.BytesIO(data)
    seen = bytearray()
    reader = Reader(lambda view: source.readinto(view[:step]), lambda view: seen.extend(view))
    found = [(entry, b"".join(bytes(p) for p in reader.data()) if entry.kind == tar.REGULAR else b"") for entry in reader]
    reader.drain()
    assert bytes(seen) == data, "every byte counts for the diff id, once"
    return found


def archive(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as out:
        for info, data in members:
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **facts: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in facts.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_every_kind(format: int, step: int) -> None:
    data = archive(
        (member("dir/", tarfile.DIRTYPE, mode=0o1755, mtime=5), b""),
        (member("dir/file", mode=0o4755, uid=1000, gid=2000, mtime=1_700_000_000), b"content" * 1000),
        (member("hard", tarfile.LNKTYPE, linkname="dir/file"), b""),
        (member("soft", tarfile.SYMTYPE, linkname="dir/file"), b""),
        (member("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("sda", tarfile.BLKTYPE, devmajor=8, devminor=0), b""),
        (member("pipe", tarfile.FIFOTYPE), b""),
        (member("empty"), b""),
        format=format,
    )
    found = {e.name: (e, content) for e, content in read(data, step)}
    assert [n.rstrip(b"/") for n in found] == [b"dir", b"dir/file", b"hard", b"soft", b"null", b"sda", b"pipe", b"empty"]
    entry, content = found[b"dir/file"]
    assert (entry.mode, entry.uid, entry.gid, entry.size, entry.mtime) == (0o4755, 1000, 2000, 7000, 1_700_000_000 * 10**9)
    assert content == b"content" * 1000
    assert found[b"hard"][0].link == found[b"soft"][0].link == b"dir/file"
    assert (found[b"null"][0].kind, found[b"null"][0].major, found[b"null"][0].minor) == (tar.CHAR, 1, 3)


names = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=300).filter(
    lambda s: s.strip("/") and not s.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=3000), st.integers(0, 2**31), st.integers(0, 2**33)), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(100, 5000),
)
def test_what_tarfile_writes_is_read(members: list[tuple[str, bytes, int, int]], format: int, step: int) -> None:
    data = archive(*((member(n, uid=u, mtime=t), d) for n, d, u, t in members), format=format)
    found = read(data, step)
    assert [(e.name, d, e.uid, e.mtime) for e, d in found] == [(n.encode(), d, u, t * 10**9) for n, d, u, t in members]


def test_attributes_and_fractions() -> None:
    headers = {"SCHILY.xattr.user.key": "välue", "SCHILY.xattr.security.capability": "\x01\x00", "mtime": "-1.5", "comment": "x"}
    ((entry, _),) = read(archive((member("f", pax_headers=headers), b"")))
    assert entry.xattrs == {b"user.key": "välue".encode(), b"security.capability": b"\x01\0"}
    assert entry.mtime == -1_500_000_000


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    data = subprocess.run(["tar", "-C", str(tmp_path), "-cf", "-", "."], check=True, capture_output=True).stdout
    assert b"./caf\xe9" in [e.name for e, _ in read(data)]


@pytest.mark.parametrize(
    "format",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, format: list[str]) -> None:
    expected = {}
    for name, pieces in (("one", 1), ("many", 60)):
        with (tmp_path / name).open("wb") as file:
            for i in range(pieces):
                file.seek(i * (1 << 20) + 4096)
                file.write(b"%04d" % i * 1024)
            file.truncate(pieces * (1 << 20) + 12345)
        expected[name.encode()] = (tmp_path / name).read_bytes()
    data = subprocess.run(
        ["tar", "-C", str(tmp_path), "--sparse", *format, "-cf", "-", *sorted(os.listdir(tmp_path))], check=True, capture_output=True
    ).stdout
    assert len(data) < 1 << 20
    for entry, stored in read(data):
        content = bytearray(entry.size)
        position = 0
        for offset, length in entry.sparse or ():
            content[offset : offset + length] = stored[position : position + length]
            position += length
        assert entry.sparse is not None and bytes(content) == expected[entry.name]


def header(name: bytes, kind: bytes, size: int, **fields: bytes) -> bytes:
    raw = bytearray(512)
    raw[: len(name)] = name
    raw[100:108], raw[108:116], raw[116:124] = fields.get("mode", b"0000644\0"), fields.get("uid", b"0000000\0"), b"0000000\0"
    raw[124:136], raw[136:148] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big"), b"00000000000\0"
    raw[156:157], raw[257:263], raw[148:156] = kind, b"ustar\0", b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    "data, message",
    [
        (header(b"x", b"x", 1 << 40), "extended header of"),
        (header(b"x", b"L", 2 << 30), "extended header of"),
        (header(b"x", b"x", 30) + b"9" * 30 + bytes(482), "malformed"),
        (header(b"x", b"x", 12) + b"12 path=a\0b\n".ljust(512, b"\0"), None),
        (header(b"x", b"x", 7) + b"5 a=b\n\0".ljust(512, b"\0"), "malformed"),
        (header(b"x", b"0", 10), "ends inside a file"),
        (header(b"x", b"0", 10)[:300], "ends inside a header"),
        (header(b"x", b"Z", 0), "member type"),
        (header(b"x", b"0", 0, uid=b"\xff" * 8), "negative uid"),
        (header(b"x", b"0", 0, mode=b"abcdefg\0"), "not octal"),
        (header(b"x", b"x", 14) + b"14 uid=999999\n".ljust(512, b"\0") + header(b"y", b"0", 0), None),
        (header(b"x", b"x", 18) + b"18 uid=4294967295\n".ljust(512, b"\0") + header(b"y", b"0", 0), "out of range"),
        (b"\x01" * 512, "checksum"),
    ],
)
def test_malformed(data: bytes, message: str | None) -> None:
    if message is None:
        read(data)
        return
    with pytest.raises(BadArchive, match=message):
        read(data)


def test_a_sparse_map_is_bounded_and_must_fit() -> None:
    endless = b"\n".join([b"99999999999"] + [b"1"] * 300_000)
    data = archive((member("f", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}), endless * 8))
    with pytest.raises(BadArchive, match="sparse map"):
        read(data)
    overlap = archive((member("f", pax_headers={"GNU.sparse.map": "0,4,2,4", "GNU.sparse.size": "10"}), b"12345678"))
    with pytest.raises(BadArchive, match="overlaps"):
        read(overlap)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_damaged_archives_end_in_an_error_or_in_entries(seed: int, count: int) -> None:
    rng = random.Random(seed)
    data = bytearray(
        archive(
            (member("a" * 120, pax_headers={"SCHILY.xattr.user.a": "b"}), b"x" * 700), (member("b", tarfile.SYMTYPE, linkname="c"), b"")
        )
    )
    for _ in range(count):
        data[rng.randrange(len(data))] = rng.randrange(256)
    # Keep checksums right half of the time, so that the damage gets past them.
    if seed % 2:
        for at in range(0, len(data), 512):
            if data[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    try:
        read(bytes(data))
    except BadArchive:
        pass
