"""A streaming reader for layer archives: ustar, PAX and GNU tar with long names and sparse files. Stdlib only; runs confined.

Not ``tarfile``: names here are bytes, every allocation an archive can ask for is bounded (``tarfile`` reads a PAX header of any
size into memory), nothing is kept per member, and a member costs a fifth of the time. File data is handed out as views of one
buffer, never copied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_BUFFER = 1 << 17  # a multiple of BLOCK, so that a header never straddles two fills
_SPECIAL_LIMIT = 1 << 20  # bytes of one PAX header, long name or sparse map (CVE-2025-58183)
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_MAX_TIME = 2**34 * 10**9  # ns; beyond any file system's last second
_MAX_ID = 2**32 - 2  # -1 means "leave alone" to chown
_ADLER = 65521  # adler32's modulus; its low half is 1 + the sum of the bytes, and costs a fiftieth of summing them here
_SEEN = 4096  # number fields that are remembered: modes, owners and times repeat

REGULAR, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE, _CONTIGUOUS = b"x", b"g", b"L", b"K", b"S", b"7"
_KINDS = frozenset({REGULAR, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO})
_XATTR = b"SCHILY.xattr."


class BadArchive(ValueError):
    """The stream is not a tar archive this reader takes; the message says what and near which byte."""


class Entry(NamedTuple):
    """One member. ``size`` is the file's; with ``sparse`` the archive holds only those (offset, length) pieces of it."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int  # ns
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes]
    sparse: tuple[tuple[int, int], ...] | None


class Reader:
    """Iterate for entries; call ``data`` before the next one to get a regular file's content."""

    def __init__(self, readinto: Callable[[memoryview], int], filled: Callable[[memoryview], None] = lambda view: None) -> None:
        """``readinto`` fills a buffer like io.RawIOBase's, 0 at the end; ``filled`` sees every byte once, in order."""
        self._readinto, self._filled = readinto, filled
        self._view = memoryview(bytearray(_BUFFER))
        self._position = self._end = 0
        self._passed = 0  # bytes before the buffer
        self._seen: dict[bytes, int] = {}
        self._remaining = self._padding = 0  # of the current member's data

    @property
    def offset(self) -> int:
        return self._passed + self._position

    def __iter__(self) -> Iterator[Entry]:
        pax: dict[bytes, bytes] = {}
        sparse_pairs: list[int] = []
        name = link = None
        while True:
            self._skip()
            header = self._block()
            if header is None:
                return
            fields = _HEADER.unpack(header)
            kind = fields[7]
            if kind == b"\0" and not any(header):
                return  # one zero block ends the archive; the second may be missing (as Go and GNU tar accept)
            self._check(header, fields[6])
            size = self._number(fields[4], "size")
            if kind in (_PAX, _LONG_NAME, _LONG_LINK):
                content = self._special(size)
                if kind == _PAX:
                    pax, sparse_pairs = self._records(content)
                elif kind == _LONG_NAME:
                    name = content.rstrip(b"\0")
                else:
                    link = content.rstrip(b"\0")
                continue
            if kind == _PAX_GLOBAL:  # git archive's comment; giving it meaning would let one member change all others
                self._expect(size)
                continue
            yield self._entry(fields, kind, size, pax, sparse_pairs, name, link)
            pax, sparse_pairs, name, link = {}, [], None, None

    def data(self) -> Iterator[memoryview]:
        """The current member's data as it lies in the archive, in pieces valid until the next."""
        while self._remaining:
            if self._position == self._end and not self._fill():
                raise BadArchive(f"ends inside a file at byte {self.offset}")
            piece = self._view[self._position : min(self._end, self._position + self._remaining)]
            self._position += len(piece)
            self._remaining -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read to the end of the stream, so that ``filled`` has seen all of it."""
        while self._fill():
            pass

    def _entry(
        self,
        fields: tuple[bytes, ...],
        kind: bytes,
        size: int,
        pax: dict[bytes, bytes],
        pairs: list[int],
        name: bytes | None,
        link: bytes | None,
    ) -> Entry:
        path = pax.get(b"path") or name or _name(fields)
        target = pax.get(b"linkpath") or link or _text(fields[8])
        if b"size" in pax:
            size = self._decimal(pax[b"size"], "size")
        if kind in (b"\0", _CONTIGUOUS):
            kind = DIRECTORY if kind == b"\0" and path.endswith(b"/") else REGULAR
        sparse = None
        if kind == _SPARSE:
            kind = REGULAR
            self._expect(size)  # the extension blocks follow the header, before the data
            sparse, real = self._gnu_sparse(size)
        elif kind == REGULAR and any(k.startswith(b"GNU.sparse.") for k in pax):
            self._expect(size)
            sparse, real, path = self._pax_sparse(pax, pairs, path)
        elif kind in _KINDS:
            # Only regular files have data; some writers put a size on links (POSIX lets them).
            self._expect(size if kind == REGULAR else 0)
            real = size if kind == REGULAR else 0
        else:
            raise BadArchive(f"member type {kind!r} at byte {self.offset}")
        uid = self._decimal(pax[b"uid"], "uid") if b"uid" in pax else self._number(fields[2], "uid")
        gid = self._decimal(pax[b"gid"], "gid") if b"gid" in pax else self._number(fields[3], "gid")
        if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
            raise BadArchive(f"owner {uid}:{gid} out of range at byte {self.offset}")
        mtime = _nanoseconds(pax[b"mtime"]) if b"mtime" in pax else self._number(fields[5], "mtime", signed=True) * 1_000_000_000
        device = kind in (CHAR, BLOCKDEV)
        return Entry(
            path,
            kind,
            self._number(fields[1], "mode") & 0o7777,
            uid,
            gid,
            real,
            max(-_MAX_TIME, min(mtime, _MAX_TIME)),
            target,
            self._number(fields[13], "device") if device else 0,
            self._number(fields[14], "device") if device else 0,
            {k[len(_XATTR) :]: v for k, v in pax.items() if k.startswith(_XATTR)} if pax else {},
            sparse,
        )

    # -- blocks -------------------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Replace the used-up buffer with the next bytes of the stream; False at its end."""
        self._passed += self._end
        self._position = self._end = 0
        while self._end < _BUFFER:
            count = self._readinto(self._view[self._end :])
            if not count:
                break
            self._end += count
        self._filled(self._view[: self._end])
        return self._end > 0

    def _block(self) -> memoryview | None:
        if self._position == self._end and not self._fill():
            return None
        if self._end - self._position < BLOCK:
            raise BadArchive(f"ends inside a header at byte {self.offset}")
        block = self._view[self._position : self._position + BLOCK]
        self._position += BLOCK
        return block

    def _expect(self, size: int) -> None:
        if size < 0:
            raise BadArchive(f"negative size at byte {self.offset}")
        self._remaining, self._padding = size, -size % BLOCK

    def _skip(self) -> None:
        for count in (self._remaining, self._padding):
            while count:
                if self._position == self._end and not self._fill():
                    raise BadArchive(f"ends inside a file at byte {self.offset}")
                step = min(count, self._end - self._position)
                self._position += step
                count -= step
        self._remaining = self._padding = 0

    def _special(self, size: int) -> bytes:
        if size > _SPECIAL_LIMIT:
            raise BadArchive(f"extended header of {size} bytes at byte {self.offset}, limit {_SPECIAL_LIMIT}")
        self._expect(size)
        return b"".join(bytes(piece) for piece in self.data())

    def _check(self, header: memoryview, field: bytes) -> None:
        found = self._number(field, "checksum")
        total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(field) & 0xFFFF) + 8 * 32
        if (found - total) % _ADLER == 0:
            return
        signed = sum(b - 256 if b > 127 else b for b in header) - sum(b - 256 if b > 127 else b for b in field) + 8 * 32
        if found != signed:  # old writers summed signed chars
            raise BadArchive(f"not a tar header at byte {self.offset - BLOCK}: wrong checksum")

    # -- fields -------------------------------------------------------------------------------------------------------------

    def _number(self, field: bytes, what: str, *, signed: bool = False) -> int:
        known = self._seen.get(field)
        if known is not None:
            return known
        value = self._parse(field, what, signed)
        if value >= 0 and len(self._seen) < _SEEN:
            self._seen[field] = value
        return value

    def _parse(self, field: bytes, what: str, signed: bool) -> int:
        if field[0] & 0x80:  # GNU base-256
            value = int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
            if field[0] & 0x40:
                value -= 1 << (8 * len(field) - 1)
        else:
            text = field.partition(b"\0")[0].strip()
            try:
                value = int(text, 8) if text else 0
            except ValueError:
                raise BadArchive(f"{what} {field!r} is not octal at byte {self.offset}") from None
        if value < 0 and not signed:
            raise BadArchive(f"negative {what} at byte {self.offset}")
        return value

    def _decimal(self, text: bytes, what: str) -> int:
        if not text.isdigit() or len(text) > 20:
            raise BadArchive(f"{what} {text[:24]!r} is not a number at byte {self.offset}")
        return int(text)

    def _records(self, content: bytes) -> tuple[dict[bytes, bytes], list[int]]:
        """PAX records "length key=value\\n"; the pairs of the oldest sparse format are repeated keys and come apart."""
        records: dict[bytes, bytes] = {}
        pairs: list[int] = []
        position = 0
        while position < len(content):
            space = content.find(b" ", position, position + 12)
            digits = content[position:space]
            end = position + int(digits) if space > 0 and digits.isdigit() else 0
            if end <= space + 1 or end > len(content) or content[end - 1] != 10:
                raise BadArchive(f"malformed extended header before byte {self.offset}")
            key, equals, value = content[space + 1 : end - 1].partition(b"=")
            if not equals or not key:
                raise BadArchive(f"malformed extended header before byte {self.offset}")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                pairs.append(self._decimal(value, "sparse map"))
            records[key] = value
            position = end
        return records, pairs

    # -- sparse files -------------------------------------------------------------------------------------------------------

    def _gnu_sparse(self, stored: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """Old GNU format: four entries in the header, then blocks of 21; the real size at byte 483."""
        header = bytes(self._view[self._position - BLOCK : self._position])
        numbers = [self._number(header[i : i + 12], "sparse map") for i in range(386, 482, 12) if header[i : i + 12].strip(b"\0 ")]
        real = self._number(header[483:495], "size")
        more, read = header[482], 0
        while more:
            block = self._block()
            read += BLOCK
            if block is None or read > _SPECIAL_LIMIT:
                raise BadArchive(f"sparse map too long at byte {self.offset}")
            raw = bytes(block)
            numbers += [self._number(raw[i : i + 12], "sparse map") for i in range(0, 504, 12) if raw[i : i + 12].strip(b"\0 ")]
            more = raw[504]
        return self._pieces(numbers, stored, real), real

    def _pax_sparse(self, pax: dict[bytes, bytes], pairs: list[int], path: bytes) -> tuple[tuple[tuple[int, int], ...], int, bytes]:
        """PAX formats 0.0 (repeated keys), 0.1 (one list) and 1.0 (a map in front of the data)."""
        real = self._decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size") or b"", "size")
        path = pax.get(b"GNU.sparse.name") or path
        if pax.get(b"GNU.sparse.major") == b"1":
            numbers = self._map_in_data()
        elif b"GNU.sparse.map" in pax:
            numbers = [self._decimal(n, "sparse map") for n in pax[b"GNU.sparse.map"].split(b",") if n]
        else:
            numbers = pairs
        return self._pieces(numbers, self._remaining, real), real, path

    def _map_in_data(self) -> list[int]:
        text, lines, wanted = b"", 0, 1
        while lines < wanted:
            if self._remaining < BLOCK or len(text) > _SPECIAL_LIMIT:
                raise BadArchive(f"sparse map too long at byte {self.offset}")
            block = self._block()
            if block is None:
                raise BadArchive(f"ends inside a sparse map at byte {self.offset}")
            self._remaining -= BLOCK
            lines += bytes(block).count(b"\n")
            text += bytes(block)
            if wanted == 1 and lines:
                wanted = 1 + 2 * self._decimal(text.partition(b"\n")[0], "sparse map")
        return [self._decimal(n, "sparse map") for n in text.split(b"\n")[1:wanted]]

    def _pieces(self, numbers: list[int], stored: int, real: int) -> tuple[tuple[int, int], ...]:
        pieces = tuple(zip(numbers[::2], numbers[1::2], strict=False))
        end = total = 0
        for offset, length in pieces:
            if offset < end:
                raise BadArchive(f"sparse map overlaps at byte {self.offset}")
            end, total = offset + length, total + length
        if len(numbers) % 2 or end > real or total != stored:
            raise BadArchive(f"sparse map does not fit the file at byte {self.offset}")
        return pieces


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _name(fields: tuple[bytes, ...]) -> bytes:
    name = _text(fields[0])
    # In GNU headers (magic "ustar ") that space holds times, not a prefix.
    prefix = _text(fields[15]) if fields[9] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _nanoseconds(text: bytes) -> int:
    """A PAX time: decimal seconds with any number of fraction digits, possibly negative."""
    whole, _, fraction = text.partition(b".")
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 20 or (fraction and not fraction.isdigit()):
        raise BadArchive(f"time {text[:32]!r} is not a number")
    value = int(digits) * 1_000_000_000 + int((fraction + b"000000000")[:9])
    return -value if whole.startswith(b"-") else value
