"""The command names faults, and its exit code shows whether the data set is usable."""

import io
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cmtmae_scale.commands.check_data import check_data, parse_options
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.tools.init.survey import survey_images
from dataloading import progress as bars
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from dataloading.mixing import require_mixed
from tests.dataloading.store_case import RangeServer
from tests.dataloading.tar_case import write_tar
from tests.engine.run_case import make_photographs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photos")


def test_a_whole_folder_is_usable(photos: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "new" / "report.json"
    sheet = tmp_path / "sheet.png"
    line = [str(photos), "--threads", "2", "--report", str(report), "--sheet", str(sheet)]
    assert check_data(line) == EXIT_DONE
    text = capsys.readouterr().out
    for piece in (
        "photos: folder, 20 images",
        "undecodable: 0\nsuspect values: 0\nexact duplicates: 0\n",
        "orientation: 0 of 20 images turned upright",
        "labels: 3; images per label: 6 to 7, median 7; without a label: 0",
        "order: sorted by class: 4 neighbours have",
        "data.shuffle=window: refused, pack the images first",
        "verdict: usable: 0 of 20 images are bad (0.00%, at most 0.10% may be)",
    ):
        assert piece in text
    assert ["width", "80", "120", "152", "156"] in [line.split() for line in text.splitlines()]
    record = json.loads(report.read_text())
    assert record["is_usable"] and record["images"] == 20 and record["mixing"]["is_sorted"]
    assert record["sizes"]["height"] == {"min": 72, "median": 92, "p95": 108, "max": 110}
    assert sheet.stat().st_size > 1000


def test_bad_images_are_counted_and_named(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "class0" / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "text.png"):
        (photos / "class1" / name).write_bytes(b"not an image")
    path = photos / "class2" / "002.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    report = tmp_path / "report.json"
    assert check_data([str(photos), "--report", str(report)]) == EXIT_CONFIG
    text = capsys.readouterr().out
    assert "excluded by their headers: 3" in text
    assert "  2: class1/text.jpg (not an image" in text
    assert "  1: class0/empty.jpg (empty file)" in text
    assert "undecodable: 1\n  class2/002.jpg: cannot be decoded" in text
    assert "verdict: unusable: 4 of 23 images are bad (17.39%, at most 0.10% may be)" in text
    record = json.loads(report.read_text())
    assert [fault["name"] for fault in record["undecodable"]] == ["class2/002.jpg"]
    assert check_data([str(photos), "--max-bad-fraction", "0.2"]) == EXIT_DONE


def test_turned_suspect_and_repeated_images_are_warned_of(photos, tmp_path, capsys) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos / "class0" / "000.jpg") as image:
        image.save(photos / "class1" / "phone.jpg", exif=exif)
    copy = (photos / "class2" / "002.jpg").read_bytes()
    (photos / "class1" / "copy.jpg").write_bytes(copy)
    Image.new("L", (30, 20), 0).save(photos / "class1" / "black.png")
    Image.new("I;16", (30, 20), 300).save(photos / "class1" / "dark.png")
    report = tmp_path / "report.json"
    assert check_data([str(photos), "--report", str(report)]) == EXIT_DONE
    text = capsys.readouterr().out
    for piece in (
        "warning: suspect values: 2\n  2: class1/black.png (constant: every pixel is (0, 0, 0))",
        "warning: exact duplicates: 1\n  class1/copy.jpg = class2/002.jpg\n",
        "scaled to 8 bits: 1; of b bits, 0 becomes 0 and 2^b - 1 becomes 255",
        "orientation: 1 of 24 images turned upright (EXIF)\n",
    ):
        assert piece in text
    record = json.loads(report.read_text())
    assert (record["turned"], record["orientation_not_applied"], record["scaled"]) == (1, 0, 1)
    assert record["duplicates"] == [["class1/copy.jpg", "class2/002.jpg"]]
    assert [line["name"] for line in record["suspect"]] == ["class1/black.png", "class1/dark.png"]
    assert check_data([str(photos), "--no-exif-orientation"]) == EXIT_DONE
    assert (
        "0 of 24 images turned upright (EXIF); the EXIF orientation of 1 image is"
        in capsys.readouterr().out
    )


def test_passed_over_files_are_in_the_report(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "class0" / "a.HEIC").write_bytes(b"x")
    report = tmp_path / "report.json"
    assert check_data([str(photos), "--report", str(report)]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "1 file passed over: 1 .heic; class0/a.HEIC: this format is not read" in text
    assert "at most 0.10% may be); not taken as images: 1 more file" in text
    (passed,) = json.loads(report.read_text())["passed_over"]
    assert passed["extension"] == ".heic" and passed["number"] == 1
    for i in range(30):
        (photos / f"{i}.heic").write_bytes(b"x")
    assert check_data([str(photos)]) == EXIT_CONFIG
    assert "more than half of the files, 31 of 51" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_printed_with_escapes(photos: Path, capsys) -> None:
    odd = photos.rename(photos.parent / os.fsdecode(b"photos \xe9\x1b[2J"))
    assert check_data([str(odd)]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "20 images" in text and "\x1b" not in text and "photos " in text


def test_no_decodable_image_is_unusable_at_any_fraction(tmp_path: Path, capsys) -> None:
    photos = make_photographs(tmp_path / "photos", 2)
    for path in photos.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    assert check_data([str(photos), "--max-bad-fraction", "1"]) == EXIT_CONFIG
    assert "verdict: unusable: no image can be decoded" in capsys.readouterr().out


def write_tars(photos: Path, folder: Path) -> Path:
    files = sorted(photos.rglob("*.jpg"))
    for shard, part in enumerate((files[:10], files[10:])):
        members: list[tuple[str, bytes]] = []
        for path in part:
            members.append((f"{path.stem}.cls", path.parent.name.encode()))
            members.append((path.name, path.read_bytes()))
        write_tar(folder / f"{shard}.tar", members, "ustar")
    return folder


def test_tars_are_reported_as_sorted_or_shuffled(photos: Path, tmp_path: Path, capsys) -> None:
    tars = write_tars(photos, tmp_path / "tars")
    assert check_data([str(tars)]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "tars: 2 tars, 20 images" in text
    assert "labels per tar: 2 to 2, median 2; 3.0 in a full shuffle" in text
    assert "order: sorted by class" in text


def test_labels_that_cannot_be_used_make_no_image_bad(photos, tmp_path, capsys) -> None:
    files = sorted(photos.rglob("*.jpg"))
    members = [(path.name.replace("0", path.parent.name, 1), path.read_bytes()) for path in files]
    texts = [b"a", b"a", b" ", b"x" * 300, *(b"a" for _ in files[4:])]
    keys = [name.removesuffix(".jpg") for name, _ in members]
    members += [(f"{key}.cls", text) for key, text in zip(keys, texts, strict=True)]
    write_tar(tmp_path / "a.tar", [*members, (f"{keys[0]}.cls", b"b")])
    report = tmp_path / "report.json"
    assert check_data([str(tmp_path / "a.tar"), "--report", str(report)]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "excluded by their headers: 0\nwarning: labels that cannot be used: 3\n" in text
    assert "without a label: 2" in text and "usable: 0 of 20 images are bad" in text
    found = json.loads(report.read_text())
    assert found["excluded"] == [] and len(found["label_faults"]) == 3
    assert survey_images(str(tmp_path / "a.tar")).excluded == ()


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 7000])
def test_a_tar_cut_short_is_unusable_at_any_fraction(photos, tmp_path, capsys, cut: int) -> None:
    path = write_tars(photos, tmp_path / "tars") / "1.tar"
    used = path.read_bytes().rstrip(b"\0")
    path.write_bytes(used[: len(used) - cut])
    assert check_data([str(tmp_path / "tars"), "--max-bad-fraction", "1"]) == EXIT_CONFIG
    text = capsys.readouterr().out
    assert "verdict: unusable: 1 tar damaged or cut short" in text and "of 1.tar" in text


def test_a_pack_is_written_and_may_be_read_by_windows(photos, tmp_path, capsys) -> None:
    path = photos / "class2" / "002.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    out = tmp_path / "out"
    line = [str(photos), "--pack", str(out), "--max-bad-fraction", "0.1", "--seed", "1"]
    assert check_data(line) == EXIT_DONE
    text = capsys.readouterr().out
    assert "packed and read back: 19 images in 1 tar, 1 excluded; shuffled: 4 neighbours" in text
    assert f"data.path={out} data.shuffle=window data.expected_images=19" in text
    require_mixed(build_index(out), on_sorted=False)
    assert check_data(line) == EXIT_DONE  # finished: verified, not decoded again
    captured = capsys.readouterr()
    assert "undecodable: 1\n  class2/002.jpg" in captured.out
    assert "all images were decoded before" in captured.err and "decoding:" not in captured.err


def test_the_index_is_kept_and_published(photos, tmp_path, capsys, monkeypatch) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert check_data([str(photos), "--write-index"]) == EXIT_CONFIG
    captured = capsys.readouterr()
    assert "beside tars only; keep it for data.index" in captured.err and not captured.out
    line = [str(photos), "--index", str(kept), "--pack", str(out), "--write-index"]
    assert check_data(line) == EXIT_DONE
    assert f"the index is kept there; data.index={kept}" in capsys.readouterr().err
    tars = write_tars(photos, tmp_path / "tars")
    assert check_data([str(tars), "--write-index", str(tmp_path / "new")]) == EXIT_DONE
    (path,) = (tmp_path / "new").iterdir()
    path.rename(tars / path.name)
    expected = [build_index(place).digest for place in (photos, out, tars)]
    monkeypatch.delattr("dataloading.index.build_parts")  # no header is read
    found = [load_or_build(photos, kept)]
    found += [load_or_build(place, tmp_path / place.name / "index") for place in (out, tars)]
    assert [index.digest for index in found] == expected


@pytest.mark.parametrize("settings", [{"exif_orientation": False}, {"max_pixels": 10**6}])
def test_the_index_of_a_pack_has_the_settings_of_the_command(
    photos, tmp_path, monkeypatch, settings
) -> None:
    out = tmp_path / "out"
    given = ["--max-pixels", "1000000"] if "max_pixels" in settings else ["--no-exif-orientation"]
    assert check_data([str(photos), *given, "--pack", str(out), "--write-index"]) == EXIT_DONE
    monkeypatch.delattr("dataloading.index.build_parts")  # no header is read
    assert len(load_or_build(out, tmp_path / "index", **settings)) == 20


def test_too_bad_data_are_not_packed(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "class0" / "empty.jpg").write_bytes(b"")
    assert check_data([str(photos), "--pack", str(tmp_path / "out")]) == EXIT_CONFIG
    assert not list((tmp_path / "out").glob("*.tar"))
    assert "packed" not in capsys.readouterr().out


def test_a_pack_into_its_source_is_refused(photos: Path, capsys) -> None:
    assert check_data([str(photos), "--pack", str(photos)]) == EXIT_CONFIG
    assert "holds class0 and no pack.json; name an empty or a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: does not exist"),
        (["EMPTY"], "no image files"),
        (["x-{0..3.tar"], "cannot be read"),
        (["PHOTOS", "--report", "PHOTOS"], "cannot be written (Is a directory)"),
        (["PHOTOS", "--sheet", "PHOTOS/class0/000.jpg/x.png"], "cannot be written"),
        (["PHOTOS", "--pack", "PHOTOS/class0/000.jpg"], "cannot be written"),
    ],
)
def test_bad_paths_give_one_line(photos, tmp_path, capsys, arguments, message) -> None:
    (tmp_path / "empty").mkdir()
    places = {"PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        arguments = [text.replace(name, place) for text in arguments]
    assert check_data(arguments) == EXIT_CONFIG
    errors = [line for line in capsys.readouterr().err.splitlines() if " ERROR " in line]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: path"),
        (["a-0.tar", "a-1.tar"], "2 paths (a-0.tar ...), expected one; put a pattern in quotes"),
        (["x", "--threads", "0"], "0 must be at least 1"),
        (["x", "--max-bad-fraction", "2"], "2 must lie in [0, 1]"),
        (["x", "--sheet", "x.tiff"], "x.tiff must end in .jpg or .png"),
        (["x", "--source", "zip"], "invalid choice"),
    ],
)
def test_usage_errors_exit_with_code_78(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(arguments)
    assert stop.value.code == EXIT_CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--pack", "OUT"]])
def test_an_interrupt_ends_cleanly(photos, tmp_path, capsys, monkeypatch, extra) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt  # a background job may have inherited an ignored SIGINT

    monkeypatch.setattr(
        "cmtmae_scale.commands.check_data.progress_bar", lambda *_: nullcontext(interrupt)
    )
    extra = [text.replace("OUT", str(tmp_path / "out")) for text in extra]
    assert check_data([str(photos), *extra]) == EXIT_STOPPED
    assert "the same command may be repeated" in capsys.readouterr().err
    monkeypatch.undo()
    assert check_data([str(photos), *extra]) == EXIT_DONE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_lines_at_intervals_on_a_plain_stream(caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    now = iter([0.0, 1.0, 9.9, 10.0, 12.0, 40.0])
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with bars.progress_bar("decoding", 4000, "images") as progress:
        for done in (100, 990, 1000, 1200, 4000):
            progress(done)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("decoding:  25%") and "1000/4000 [00:10<00:30, 100.00images/s]" in first
    assert last.startswith("decoding: 100%") and "4000/4000 [00:40<00:00" in last


def test_progress_is_a_bar_on_a_terminal(caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with bars.progress_bar("packing", 72_000, "images") as progress:
        progress(36_000)
    first, *_, last, end = stream.getvalue().split("\r")[1:]
    assert first.startswith("packing:   0%") and "0/72000" in first
    assert last.isspace() and not end  # a finished bar is erased: the log has the result
    assert not caplog.records


def test_tars_of_a_web_server_are_checked_and_nothing_is_written_to_one(
    photos: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("obstore", reason="the extra stores is not installed")
    write_tar(tmp_path / "a.tar", [(f"{p.stem}.jpg", p.read_bytes()) for p in photos.rglob("*.*")])
    server = RangeServer(tmp_path)
    assert check_data([f"{server.url}/a.tar", "--threads", "2"]) == EXIT_DONE
    server.stop()
    assert f"{server.url}/a.tar: 1 tar, 20 images" in capsys.readouterr().out
    assert len(server.data_requests()) < 10
    with pytest.raises(SystemExit, match="78"):
        check_data([str(photos), "--pack", "s3://id:hush@bucket/out"])
    with pytest.raises(SystemExit, match="78"):
        check_data([str(photos), "--pck=s3://id:hush@bucket/out"])
    error = capsys.readouterr().err
    assert "pack is an address; only tars" in error and "hush" not in error
    assert "unrecognized arguments: --pck=s3://bucket/out" in error
