"""Every case of the corpus, with either decoder, has the outcome in ``docs/bad_data.md``."""

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dataloading.errors import DataError, ReadError
from dataloading.headers import size_of_bytes
from dataloading.index import Index, build_index
from dataloading.reading import GREY as GREY_LEVEL
from dataloading.stream import Stream
from tests.dataloading import bad_data_case as cases
from tests.dataloading.bad_data_case import (
    FOLDER,
    GREY,
    LEFT_OUT,
    PASSED,
    PNG,
    REFUSED,
    RIGHT,
    SOME,
    STOPS,
    Case,
)
from tests.dataloading.bad_tar_case import TARS
from tests.dataloading.decoder_case import DECODERS as ON_CPU
from tests.dataloading.decoder_case import NO_DALI
from tests.dataloading.tar_case import write_tar

ROOT = Path(__file__).parents[2]
SIZE = 40
DECODERS = [
    *ON_CPU,
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.dali,
            pytest.mark.gpu,
            pytest.mark.skipif(
                NO_DALI or not torch.cuda.is_available(), reason="needs DALI and a GPU"
            ),
        ],
    ),
]
Image.init()
ONLY_NEWER = set() if "AVIF" in Image.OPEN else {"colour.avif"}


class View(NamedTuple):
    """Result of a stream for a sample."""

    pixels: torch.Tensor
    valid: bool
    line: dict | None  # of the quarantine


class Seen(NamedTuple):
    """A data set of the corpus, and the views of two starts."""

    index: Index
    first: list[View]
    second: list[View]


@pytest.fixture(scope="module", autouse=True)
def permissions() -> Iterator[None]:
    """Apply the modes of files to the superuser, whom no permission stops."""
    real = os.open

    def opened(path, flags, *rest, **named):
        if not named and os.path.isfile(path) and not os.stat(path).st_mode & stat.S_IRUSR:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        yield


def settings(decode: str) -> dict[str, Any]:
    """Decoder and device of a name in ``DECODERS``."""
    if decode == "gpu":
        return {"decode": "dali", "device": "cuda", "worker_type": "thread"}  # faults are ours
    return {"decode": decode}


def views(index: Index, decode: str, quarantine: Path) -> list[View]:
    """Whole images, not mirrored, of all samples."""
    count = 8
    with Stream(
        index,
        seed=0,
        micro_batch=count,
        sizes=(SIZE,),
        scale=(1.0, 1.0),
        ratio=(1e-3, 1e3),
        flip=False,
        shuffle="none",
        threads=2,
        quarantine=quarantine,
        **settings(decode),
    ) as stream:
        batches = [next(stream) for _ in range(-(-len(index) // count))]
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert len({line["sample_id"] for line in lines}) == len(lines)
    by_id = {line["sample_id"]: line for line in lines}
    pixels = torch.cat([batch.images[0] for batch in batches]).cpu()
    valid = torch.cat([batch.valid for batch in batches]).cpu()
    assert torch.cat([batch.position for batch in batches]).tolist() == list(range(len(pixels)))
    return [View(pixels[i], bool(valid[i]), by_id.get(i)) for i in range(len(index))]


def see(root: Path, corpus: list[Case], decode: str) -> Seen:
    root.mkdir()
    kept = [case for case in corpus if case.outcome not in (STOPS, REFUSED)]
    for case in kept:
        case.make(root / case.name)
    index = build_index(root)
    for case in kept:
        if case.change is not None:
            case.change(root / case.name)
    first = views(index, decode, root.parent / "quarantine.jsonl")
    return Seen(index, first, views(index, decode, root.parent / "quarantine.jsonl"))


@pytest.fixture(scope="module", params=DECODERS)
def folder(request, tmp_path_factory) -> Seen:
    return see(tmp_path_factory.mktemp("corpus") / "data", FOLDER, request.param)


@pytest.fixture(scope="module", params=DECODERS)
def tars(request, tmp_path_factory) -> Seen:
    return see(tmp_path_factory.mktemp("corpus") / "tars", TARS, request.param)


def those(corpus: list[Case], *outcomes: str) -> list:
    return [pytest.param(case, id=case.name) for case in corpus if case.outcome in outcomes]


def check(view: View, case: Case, expected: np.ndarray | None, index: Index, i: int) -> None:
    """Return whether a view is as the case expects."""
    if case.outcome == GREY:
        assert not view.valid and (view.pixels == GREY_LEVEL).all()
        path, offset = index.where(i)
        assert case.detail in view.line["reason"]
        assert view.line["path"] == str(path) and view.line["offset"] == offset
        assert view.line["name"] == index.names[i]
        return
    assert view.valid == (view.line is None)
    if expected is not None:
        assert view.valid, view.line
        image = Image.fromarray(np.asarray(expected, dtype=np.uint8))
        wanted = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        assert abs(view.pixels.numpy() - wanted).mean() <= case.tolerance


@pytest.mark.parametrize("case", those(FOLDER, RIGHT, GREY, SOME))
def test_a_file_becomes_what_the_table_says(folder: Seen, case: Case) -> None:
    if case.name in ONLY_NEWER:
        pytest.skip("this Pillow knows no AVIF")
    i = list(folder.index.names).index(f"{case.name}/{case.inside}".rstrip("/"))
    check(folder.first[i], case, case.expected, folder.index, i)


@pytest.mark.parametrize("case", those(FOLDER, LEFT_OUT, PASSED))
def test_a_file_is_excluded_as_the_table_says(folder: Seen, case: Case) -> None:
    assert case.name not in folder.index.names
    excluded = dict(folder.index.excluded)
    assert (case.name in excluded) == (case.outcome == LEFT_OUT)
    assert case.detail in excluded.get(case.name, "")


def test_what_is_in_a_folder_named_as_a_picture_is_used(folder: Seen) -> None:
    assert "folder.jpg/a.png" in folder.index.names


@pytest.mark.parametrize("case", those(TARS, RIGHT, GREY, LEFT_OUT, PASSED))
def test_a_tar_becomes_what_the_table_says(tars: Seen, case: Case) -> None:
    index = tars.index
    rows = [i for i in range(len(index)) if index.where(i)[0].name == case.name]
    reasons = [reason for name, reason in index.excluded if case.name in name]
    if case.outcome == PASSED:
        assert not rows and not reasons
        return
    if case.outcome == LEFT_OUT:
        assert len(reasons) == 1 and case.detail in reasons[0]
    else:
        assert not reasons and len(rows) > 1
    good, *others = rows
    check(tars.first[good], case._replace(outcome=RIGHT), cases.COLOUR, index, good)
    for i in others:
        check(tars.first[i], case, case.expected, index, i)


def same(seen: Seen) -> bool:
    return all(
        torch.equal(one.pixels, two.pixels) and (one.valid, one.line) == (two.valid, two.line)
        for one, two in zip(seen.first, seen.second, strict=True)
    )


def test_a_second_start_sees_the_same_folder_and_reports_nothing_again(folder: Seen) -> None:
    assert same(folder)


def test_a_second_start_sees_the_same_tars_and_reports_nothing_again(tars: Seen) -> None:
    assert same(tars)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("case", those([*FOLDER, *TARS], STOPS))
def test_what_cannot_be_read_stops_and_decides_nothing(
    tmp_path: Path, case: Case, decode: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    case.make(root / case.name)
    index = build_index(root)
    case.change(root / case.name)
    quarantine = tmp_path / "quarantine.jsonl"
    with (
        Stream(
            index,
            seed=0,
            micro_batch=2,
            sizes=(SIZE,),
            threads=2,
            quarantine=quarantine,
            patience_s=0.05,
            **settings(decode),
        ) as stream,
        pytest.raises(ReadError, match=re.escape(str(root / case.name))) as caught,
    ):
        next(stream)
    assert case.detail in str(caught.value) and "then launch again" in str(caught.value)
    assert caught.value.exit_code == 75 and not quarantine.exists()


@pytest.mark.parametrize("case", those([*FOLDER, *TARS], REFUSED))
def test_what_is_no_data_set_is_refused(tmp_path: Path, case: Case) -> None:
    case.make(tmp_path / case.name)
    with pytest.raises(DataError, match=re.escape(case.detail)) as caught:
        build_index(tmp_path)
    assert str(tmp_path / case.name) in str(caught.value) and caught.value.exit_code == 78


def test_indexing_decodes_nothing(tmp_path: Path, monkeypatch) -> None:
    def decoded(*_):
        raise MemoryError("an image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    for case in cases.FILES:
        case.make(tmp_path / case.name)
    assert len(build_index(tmp_path)) > 20


@pytest.mark.parametrize("decode", DECODERS)
def test_no_decoder_sees_a_picture_larger_than_its_header_said(
    tmp_path: Path, decode: str, monkeypatch
) -> None:
    """Bombs that are written after indexing, with the length of the files that they replace."""
    seen: list[tuple[int, int]] = []
    if decode in ("dali", "gpu"):
        import dataloading.dali as module

        fetch = module.DaliDecoder._fetch

        def spy(*arguments):
            view = fetch(*arguments)
            seen.append(size_of_bytes(view.data.tobytes()))
            return view

        monkeypatch.setattr(module.DaliDecoder, "_fetch", spy)
    else:
        import dataloading.torch_decode as module

        make = module.make_decode

        def spy_maker(codec):
            inner = make(codec)
            return lambda data, size: seen.append(size_of_bytes(data)) or inner(data, size)

        monkeypatch.setattr(module, "make_decode", spy_maker)
    bomb, small = cases.black(14_000, 14_000), cases.JPEG.ljust(40_000, b"\0")
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(PNG.ljust(max(len(bomb), len(PNG)), b"\0"))
    (root / "c.jpg").write_bytes(small)
    index = build_index(root)
    (root / "a.png").write_bytes(bomb.ljust(len(PNG), b"\0"))
    (root / "c.jpg").write_bytes(cases.with_size(small, 65535, 65535))
    a, b, c = views(index, decode, tmp_path / "quarantine.jsonl")
    assert (a.valid, b.valid, c.valid) == (False, True, False)
    assert (80, 64) in seen and max(width * height for width, height in seen) == 80 * 64


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF
@pytest.mark.parametrize("decode", DECODERS)
def test_any_damage_ends_in_a_picture_or_a_reason(tmp_path: Path, decode: str) -> None:
    """Cuts and wrong bytes all over files of every format, at which libraries have crashed."""
    generator = np.random.default_rng(11)
    root = tmp_path / "data"
    root.mkdir()
    for name, data in cases.FORMATS.items():
        for number in range(12):
            broken = bytearray(data)
            for at in generator.integers(0, len(data), (1, 3, 20)[number % 3]):
                broken[at] = generator.integers(256)
            if number < 6:
                broken = broken[: generator.integers(1, len(data))]
            (root / f"{number:02d}-{name}").write_bytes(broken)
    index = build_index(root, max_pixels=1_000_000)
    assert len(index) + len(index.excluded) == 12 * len(cases.FORMATS)
    first, second = (views(index, decode, tmp_path / "quarantine.jsonl") for _ in range(2))
    assert same(Seen(index, first, second))
    assert all(view.valid == (view.line is None) for view in first)
    assert 10 < sum(view.valid for view in first) < len(index)


def test_sixteen_bit_pictures_are_scaled_by_every_decoder() -> None:
    """Pillow alone would saturate: it decodes where the others refuse."""
    from dataloading.torch_decode import with_pillow

    data = next(case for case in FOLDER if case.name == "grey16.png")
    buffer = io.BytesIO()
    Image.fromarray(cases.COLOUR[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    got = with_pillow(buffer.getvalue()).permute(1, 2, 0).numpy()
    assert np.array_equal(got, data.expected)


def test_links_to_one_folder_from_two_places_are_two_classes_and_no_loop(tmp_path: Path) -> None:
    """As links to files: each name is a sample, as it would be with copies."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.png").write_bytes(PNG)
    root = tmp_path / "data"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(root)
    index = build_index(root)
    assert list(index.names) == ["one/a.png", "two/a.png"]
    loop = "a link to a folder above it"
    assert index.excluded == (("one/back", loop), ("two/back", loop))


def test_keys_of_two_tars_do_not_concern_each_other(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [("0.png", PNG)])
    index = build_index(tmp_path)
    assert len(index) == 2 and not index.excluded


def test_the_documented_table_is_this_corpus() -> None:
    text = (ROOT / "docs" / "bad_data.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+?) \| ([^|]*?) ?\|$", text, re.MULTILINE)
    assert rows == [(case.name, case.outcome, case.detail) for case in [*FOLDER, *TARS]]
