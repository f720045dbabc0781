"""Members of a tar file, found by reading its headers only.

Several times faster than the standard library's ``tarfile``. Damage is returned, not raised, so
that the members before the damage can be used.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dataloading.files import Readable, read_at
from dataloading.headers import explain_other_file

BLOCK = 512
_PIECE = 1 << 20  # bytes of the padding that are read at once
_ZEROS = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_FOLDERS = frozenset((b"5", b"D", b"V"))  # folders, their lists in GNU's backups, volume labels
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # links, devices, folders, pipes
NOT_A_FILE = "a link or a device"
"""Fault of a member without data of its own."""
_EXTENDED = frozenset((b"L", b"K", b"x", b"g"))  # long name, long link, pax records
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """A regular file in a tar, or a damaged place.

    Attributes:
        name: as stored, never used as a path; empty where a fault concerns no member.
        offset: first byte of the data; of the header that cannot be read, for a fault of it.
        size: bytes.
        fault: why the member, or the tar from here on, cannot be read.
    """

    name: bytes
    offset: int
    size: int
    fault: str | None = None


class _DamageError(Exception):
    """A header cannot be trusted; the message has the reason."""


def find_tar_problem(file: int | Readable, size: int) -> str | None:
    """Return what is wrong with the start of an open file of ``size`` bytes; ``None`` for a tar.

    Raises:
        OSError: if the file cannot be read.
    """
    block = read_at(file, BLOCK, 0)
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            return f"is compressed ({name}) and cannot be read in place; decompress it"
    other = explain_other_file(block)
    if other:
        return f"is not a tar{other}"
    if size < BLOCK:
        return f"has {size} bytes, a tar has at least {BLOCK}"
    try:
        if block != _ZEROS:
            _check(block)
    except _DamageError as damage:
        return f"is not a tar ({damage} at byte 0)"
    return None


def list_members(file: int | Readable, size: int) -> Iterator[Member]:
    """Walk the headers of a tar: ustar, GNU, pax and the old format without a magic.

    Folders are skipped; links, devices and unknown kinds have the fault ``NOT_A_FILE``. At damage a
    last ``Member`` with a fault is yielded; only the data of extended headers are read. ``size`` is
    that of the open file, in bytes.

    Raises:
        OSError: if the file cannot be read.
    """
    at = 0
    extensions = _Extensions()
    while at < size:
        block = read_at(file, BLOCK, at)
        if block == _ZEROS:
            if not _is_zero(file, at, size):
                yield Member(b"", at, 0, "data after the end of the archive are excluded")
            return
        start = at + BLOCK
        try:
            _check(block)
            kind = block[156:157]
            length = _number(block[124:136], "size")
            if kind in _EXTENDED:
                extensions.add(kind, _read_extended(file, start, length))
                at = start + _padded(length)
                continue
            name, length, is_sparse = extensions.apply(block, length)
        except _DamageError as damage:
            yield Member(b"", at, 0, f"{damage}; the rest of this tar is excluded")
            return
        if kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith(b"/")):
            if kind not in _FOLDERS and kind != b"\0":
                yield Member(name, at, 0, NOT_A_FILE)
            at = start
            continue
        if kind == b"S":
            is_sparse, start = True, _end_of_map(file, block, start)
        missing = start + length - size
        if missing > 0:
            yield Member(name, start, length, f"the tar is cut short: {missing} bytes are missing")
            return
        if is_sparse:
            yield Member(name, start, length, "stored sparse; write the tar without --sparse")
        elif kind in _REGULAR:
            yield Member(name, start, length)
        elif kind not in _FOLDERS:
            yield Member(name, start, length, NOT_A_FILE)
        at = start + _padded(length)
    yield Member(b"", size, 0, "no end-of-archive mark: the tar may be cut short")


class _Extensions:
    """Long names and pax records, which precede the header that they extend."""

    def __init__(self) -> None:
        self._shared: dict[bytes, bytes] = {}  # for all members that follow
        self._own: dict[bytes, bytes] = {}  # for the next member
        self._long_name = b""

    def add(self, kind: bytes, content: bytes) -> None:
        """Take the content of an extended header."""
        if kind == b"L":
            self._long_name = content.split(b"\0", 1)[0]
        elif kind == b"x":
            _add_pax(self._own, content)
        elif kind == b"g":
            _add_pax(self._shared, content)

    def apply(self, block: bytes, length: int) -> tuple[bytes, int, bool]:
        """Return name, size and whether it is sparse, of the member with this header and size."""
        name, is_sparse = self._long_name or _header_name(block), False
        if self._own or self._shared:
            pax = self._shared | self._own
            name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or name
            is_sparse = any(key.startswith(b"GNU.sparse.") for key in pax)
            if b"size" in pax:
                length = _pax_size(pax[b"size"])
        self._own, self._long_name = {}, b""
        return name, length, is_sparse


def _is_zero(file: int | Readable, at: int, end: int) -> bool:
    """Return whether all bytes of a range are zero, read in pieces up to the first that is not.

    The padding of a tar has no largest size: ``tar -b`` sets it.
    """
    while at < end:
        data = read_at(file, min(_PIECE, end - at), at)
        if not data:  # cut since it was opened
            break
        if data.strip(b"\0"):
            return False
        at += len(data)
    return True


def _end_of_map(file: int | Readable, block: bytes, start: int) -> int:
    """Skip the blocks that continue the header of a sparse member."""
    more = block[482:483]
    while more not in (b"", b"\0"):
        more = read_at(file, BLOCK, start)[504:505]
        start += BLOCK
    return start


def _check(block: bytes) -> None:
    if len(block) < BLOCK:
        raise _DamageError("the tar is cut short within a header")
    stored = _number(block[148:156], "checksum")
    rest = block[:148] + b" " * 8 + block[156:]
    if stored != sum(rest):
        signed = sum(rest) - 256 * sum(byte > 127 for byte in rest)  # by some old programs
        if stored != signed:
            raise _DamageError("damaged header: its checksum is wrong")


def _number(field: bytes, what: str) -> int:
    """Read an octal or base-256 number."""
    if field[0] & 0x80:
        if field[0] == 0xFF:
            raise _DamageError(f"damaged header: its {what} is negative")
        return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    if not text.isdigit():
        raise _DamageError(f"damaged header: its {what} is {text!r}")
    try:
        return int(text, 8)
    except ValueError:
        raise _DamageError(f"damaged header: its {what} is {text!r}") from None


def _padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK


def _header_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # GNU has other fields in place of the prefix
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            return prefix + b"/" + name
    return name


def _read_extended(file: int | Readable, start: int, length: int) -> bytes:
    if length > _MAX_EXTENDED:
        raise _DamageError(f"extended header of {length} bytes, expected at most {_MAX_EXTENDED}")
    content = read_at(file, length, start)
    if len(content) < length:
        raise _DamageError("the tar is cut short within an extended header")
    return content


def _add_pax(records: dict[bytes, bytes], content: bytes) -> None:
    """Add records ``length key=value`` and a line end; an empty value removes a record."""
    at = 0
    while at < len(content) and content[at]:
        digits = content[at : at + 8].split(b" ", 1)[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if end <= at or end > len(content) or content[end - 1] != 0x0A or not equals:
            raise _DamageError("damaged pax header")
        if value:
            records[key] = value
        else:
            records.pop(key, None)
        at = end


def _pax_size(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _DamageError(f"damaged pax header: size is {text[:30]!r}")
    return int(text)
