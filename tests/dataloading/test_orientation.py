"""Images that are stored turned train upright, with every decoder and in every layout."""

import io
import struct
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from dataloading.headers import HeaderError, exif_orientation, header_of_file
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from dataloading.one_pass import OnePass
from dataloading.stream import Stream
from tests.dataloading.decoder_case import DECODERS, NO_DALI
from tests.dataloading.tar_case import write_tar
from tests.references.index_digest import folder_digest, tars_digest

FORMS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
Image.init()
if "AVIF" in Image.SAVE:  # Pillow 11.3 or later
    FORMS["AVIF"] = {"speed": 10}
KINDS = [(form, orientation) for orientation in range(1, 9) for form in FORMS]


@pytest.fixture
def turned(tmp_path, picture):
    """Folders of the same images: stored in every orientation, and upright by Pillow."""
    stored, upright = tmp_path / "stored", tmp_path / "upright"
    stored.mkdir()
    upright.mkdir()
    for number, (form, orientation) in enumerate(KINDS):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = io.BytesIO()
        picture(number, 50 + number, 70).save(data, form, exif=exif, **FORMS[form])
        (stored / f"{number:02d}.{form.lower()}").write_bytes(data.getvalue())
        with Image.open(data) as image:  # of a TIFF, Pillow turns the pixels itself
            ImageOps.exif_transpose(image).save(upright / f"{number:02d}.png")
    return stored, upright


def draw(index, decode="torch", **options):
    settings = {"seed": 3, "micro_batch": 20, "sizes": (24, 16), "threads": 2, "decode": decode}
    with Stream(index, **settings, **options) as stream:
        batches = [next(stream) for _ in range(5)]
    assert all(bool(batch.valid.all()) for batch in batches)
    return [torch.cat([batch.images[k] for batch in batches]) for k in (0, 1)]


def tar_of(folder, path):
    return write_tar(path, [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())])


@pytest.mark.parametrize("decode", [*DECODERS, "resident"])
def test_views_are_those_of_the_upright_images(turned, decode):
    stored, upright = (build_index(folder) for folder in turned)
    for column in ("width", "height"):
        assert np.array_equal(stored.entries[column], upright.entries[column])
    how = {"resident": True} if decode == "resident" else {"decode": decode}
    for got, expected in zip(draw(stored, **how), draw(upright), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.dali
@pytest.mark.skipif(NO_DALI, reason="DALI is not installed")
def test_the_graph_of_a_gpu_turns_what_it_has_resized(turned, monkeypatch):
    """Its last steps, on the CPU; turning and resizing differ in the order of roundings."""
    from dataloading.dali import DaliDecoder

    monkeypatch.setattr("dataloading.dali.DaliDecoder", partial(DaliDecoder, resize=True))
    one, two = (draw(build_index(folder), "dali")[0].int() for folder in turned)
    difference = (one - two).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.05


def test_tars_and_centre_crops_are_upright_too(turned, tmp_path):
    stored, upright = turned
    tar = build_index(tar_of(stored, tmp_path / "stored.tar"))
    for got, expected in zip(draw(tar), draw(build_index(upright)), strict=True):
        assert torch.equal(got, expected)
    ids = np.arange(len(KINDS))
    both = []
    for index in (tar, build_index(upright)):
        with OnePass(index, ids, micro_batch=len(ids), size=20, threads=1, decode="torch") as once:
            both.append(next(once).images[0])
    assert torch.equal(*both)


def test_without_the_key_pixels_are_as_stored(turned, tmp_path):
    stored, _ = turned
    as_stored = build_index(stored, exif_orientation=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    for number, file in enumerate(sorted(stored.iterdir())):
        image = Image.open(file)
        if image.format == "TIFF":  # which Pillow turns when it decodes
            image = image.convert("RGB")
            undo = {5: 5, 6: 8, 8: 6}.get(KINDS[number][1], KINDS[number][1])
            image.getexif()[0x0112] = undo
            image = ImageOps.exif_transpose(image)
        image.info.pop("exif", None)
        image.convert("RGB").save(bare / f"{number:02d}.png", exif=b"")
    for got, expected in zip(draw(as_stored), draw(build_index(bare)), strict=True):
        assert torch.equal(got, expected)
    # The orientation is recorded all the same.
    assert (as_stored.entries["flags"] + 1).tolist() == [orientation for _, orientation in KINDS]


def test_the_digest_changes_only_if_an_image_is_turned(turned, tmp_path):
    """So that runs on images that are stored upright resume from older checkpoints."""
    stored, upright = turned
    tar = tar_of(stored, tmp_path / "stored.tar")
    for path in (stored, tar):
        digests = {build_index(path, exif_orientation=key).digest for key in (True, False)}
        assert len(digests) == 2
    for key in (True, False):
        kept = load_or_build(stored, tmp_path / "kept", exif_orientation=key)
        assert kept.digest == build_index(stored, exif_orientation=key).digest
    assert build_index(upright).digest == build_index(upright, exif_orientation=False).digest
    # A turn that keeps width and height counts as well.
    for path, digest in ((stored, folder_digest), (tar, tars_digest)):
        index = build_index(path)
        rows = index.entries.copy()
        more = () if path == stored else ([path.stat().st_size],)
        names = list(index.names) if path == stored else [path.name]
        assert digest(names, *more, rows) == index.digest
        row = next(i for i, kind in enumerate(KINDS) if kind[1] == 3)
        rows["flags"][row] = 0
        assert digest(names, *more, rows) != index.digest


def block(order, orientation, kind=3, before=0):
    """An EXIF block whose first directory has ``before`` other entries."""
    form = {1: "B", 3: "H", 4: "I"}[kind]
    value = struct.pack(f"{order}{form}", orientation).ljust(4, b"\0")
    entries = struct.pack(f"{order}HHI4x", 271, 2, 1) * before
    entries += struct.pack(f"{order}HHI", 274, kind, 1) + value
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", before + 1) + entries


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_of_any_block_is_1_to_8(order):
    for kind in (1, 3, 4):
        assert [exif_orientation(block(order, k, kind)) for k in range(10)] == [1, *range(1, 9), 1]
    whole = block(order, 6, before=3)
    assert exif_orientation(whole) == exif_orientation(whole.removeprefix(b"Exif\0\0")) == 6
    assert {exif_orientation(whole[:cut]) for cut in range(len(whole) - 3)} == {1}
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        assert 1 <= exif_orientation(bytes(damaged)) <= 8


def test_the_text_block_of_imagemagick_is_read(tmp_path, picture):
    data = block("<", 6)
    good = f"\nexif\n{len(data):8}\n{data.hex()}\n"
    for text, expected in ((good, 6), ("no\nnumber\nhere\nzz", 1), (good[:40], 1)):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", text)
        picture(1, 31, 17).save(tmp_path / "a.png", pnginfo=info)
        assert header_of_file(tmp_path / "a.png").orientation == expected


def test_a_block_is_found_behind_other_segments_and_beyond_the_first_read(tmp_path, picture):
    data = io.BytesIO()
    picture(1, 31, 17).save(data, "JPEG")
    rest = data.getvalue()[2:]

    def segment(marker, content):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(3000))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8" + xmp + segment(0xE1, block(">", 8) + bytes(60_000)) + rest)
    assert header_of_file(path) == (31, 17, 8)
    path.write_bytes(b"\xff\xd8" + segment(0xE1, block(">", 8))[:40])
    with pytest.raises(HeaderError):
        header_of_file(path)
