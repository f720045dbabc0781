import io
import os
import tarfile

import pytest

from dataloading.tars import NOT_A_FILE, list_members
from tests.dataloading.tar_case import FORMATS, reference, write_tar


def walked(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(list_members(descriptor, path.stat().st_size))
    finally:
        os.close(descriptor)


def plain(path):
    return [(m.name.decode(), m.offset, m.size) for m in walked(path) if m.fault is None]


@pytest.mark.parametrize("form", FORMATS)
def test_members_lie_where_the_standard_library_finds_them(tmp_path, form):
    deep = "/".join(["d" * 40] * 4) + "/" + "n" * 36 + ".jpg"
    assert len(deep) == 204
    content = [("a.jpg", b"1" * 700), (deep, b"22"), ("b.txt", b""), ("d/e.cls", b"3" * 512)]
    if form != "ustar":
        content += [("x" * 200 + ".jpg", b"4" * 5), ("gr\u00f6\u00dfe/\u00e9.jpg", b"5")]
    path = write_tar(tmp_path / "a.tar", content, form)
    assert plain(path) == reference(path)
    assert len(plain(path)) == len(content) == len(walked(path))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_a_file_is_passed_over(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, kind in [("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "t" * (90 if form == "ustar" else 150)
            tar.addfile(info)
        for name, kind in [("h.jpg", tarfile.LNKTYPE), ("p.jpg", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert plain(path) == reference(path) == [("a.jpg", path.read_bytes().index(b"abc"), 3)]
    others = [(m.name, m.fault) for m in walked(path) if m.fault is not None]
    assert others == [(name, NOT_A_FILE) for name in (b"l.jpg", b"h.jpg", b"p.jpg")]


def test_global_pax_records_and_own_sizes_count(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2")], pax_headers={"comment": "x"}
    )
    assert plain(path) == reference(path)
    record = b"12 size=600\n"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        tar.addfile(info, io.BytesIO(record))
        info = tarfile.TarInfo("a.jpg")  # its own header has 0 bytes
        tar.addfile(info)
        tar.fileobj.write(b"1" * 600 + bytes(424))
        tar.offset += 1024
        info = tarfile.TarInfo("b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"2"))
    assert plain(path) == reference(path) == [("a.jpg", 1536, 600), ("b.jpg", 3072, 1)]


def test_old_tars_without_magic_and_binary_sizes_are_read(tmp_path):
    def header(name, size, kind):
        block = bytearray(512)
        block[: len(name)] = name
        block[124:136] = size
        block[156:157] = kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    path = tmp_path / "a.tar"
    binary = b"\x80" + (5).to_bytes(11, "big")
    path.write_bytes(
        header(b"folder/", b"00000000000\0", b"\0")
        + header(b"a.jpg", b"        3 \0 ", b"\0")
        + b"abc".ljust(512, b"\0")
        + header(b"b.jpg", binary, b"0")
        + b"12345".ljust(512, b"\0")
        + bytes(1024)
    )
    assert plain(path) == reference(path) == [("a.jpg", 1024, 3), ("b.jpg", 2048, 5)]


def test_reading_ends_at_the_first_piece_that_is_no_padding():
    class Recorded:
        """A file in a store that is mostly another archive."""

        def __init__(self, data):
            self.data, self.bytes = data, 0

        def read(self, size, offset):
            self.bytes += size
            return self.data[offset : offset + size]

    data = bytes(3 << 20) + b"x" * (9 << 20)
    file = Recorded(data)
    (fault,) = list_members(file, len(data))
    assert fault.fault == "data after the end of the archive are excluded"
    assert file.bytes <= 512 + (4 << 20)
