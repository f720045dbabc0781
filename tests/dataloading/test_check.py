"""Every sample that training could not use is found, with its place and reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloading.check import check_samples
from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.sheet import draw_sheet
from dataloading.stream import Stream
from tests.dataloading.tar_case import write_tar

VIEWS = {"scale": (0.2, 1.0), "ratio": (0.75, 1.25), "flip": True, "threads": 2}


@pytest.mark.parametrize("threads", [1, 3])
def test_whole_files_have_no_fault_and_all_are_counted(photographs: Path, threads: int) -> None:
    told: list[int] = []
    assert check_samples(build_index(photographs), threads, told.append)[0] == []
    assert told == sorted(told) and told[-1] == 12


def test_broken_files_are_named_with_their_reason(photographs: Path) -> None:
    data = (photographs / "class0" / "00.jpg").read_bytes()
    (photographs / "class0" / "00.jpg").write_bytes(data[: len(data) // 2])
    index = build_index(photographs)  # its header is whole
    (photographs / "class2" / "11.jpg").write_bytes(b"gone")
    (photographs / "class1" / "04.jpg").unlink()
    faults = check_samples(index, 2, lambda done: None, patience_s=0.1)[0]
    assert [index.names[fault.sample] for fault in faults] == [fault.name for fault in faults]
    reasons = {fault.name: fault.reason for fault in faults}
    assert sorted(reasons) == ["class0/00.jpg", "class1/04.jpg", "class2/11.jpg"]
    assert "truncated" in reasons["class0/00.jpg"]
    assert "No such file" in reasons["class1/04.jpg"]
    assert "4 bytes, the index says" in reasons["class2/11.jpg"]


def test_broken_members_are_named_by_tar_and_offset(photographs: Path, tmp_path: Path) -> None:
    whole = (photographs / "class0" / "00.jpg").read_bytes()
    list_members = [("a.jpg", whole), ("b.jpg", whole[: len(whole) // 2]), ("c.jpg", whole)]
    tar = write_tar(tmp_path / "tars" / "x.tar", list_members, "ustar")
    (fault,) = check_samples(build_index(tar), 1, lambda done: None)[0]
    offset = 512 + -(-len(whole) // 512) * 512 + 512
    assert (fault.sample, fault.name) == (1, f"byte {offset} of x.tar")


def test_the_checker_and_training_agree_on_what_is_bad(photographs: Path) -> None:
    for number, name in enumerate(["class0/00.jpg", "class1/01.jpg", "class2/05.jpg"]):
        data = (photographs / name).read_bytes()
        cut = [data[:-2], data[: len(data) // 2], data[:-400] + b"\0" * 400][number]
        (photographs / name).write_bytes(cut)
    index = build_index(photographs)
    found = {fault.sample for fault in check_samples(index, 2, lambda done: None)[0]}
    with Stream(
        index, seed=0, micro_batch=12, sizes=(16,), shuffle="none", decode="torch"
    ) as stream:
        batch = next(stream)
    assert found == set(batch.sample_id[~batch.valid].tolist())
    assert found


def test_the_sheet_shows_the_first_views_of_a_run(photographs: Path, tmp_path: Path) -> None:
    index = build_index(photographs)
    path = tmp_path / "new" / "sheet.png"
    draw_sheet(index, path, seed=5, **VIEWS)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 132 + 4, 10 * 132 + 4, 3)  # ten and two
    with Stream(index, seed=5, micro_batch=12, sizes=(128,), decode="torch", **VIEWS) as stream:
        views = next(stream).images[0].numpy()
    assert np.array_equal(sheet[4:132, 4:132], views[0])
    assert np.array_equal(sheet[136:264, 136:264], views[11])
    assert (sheet[136:, 268:] == 255).all()


def test_a_sheet_that_cannot_be_written_says_so(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"the contact sheet cannot be written .*name another file"):
        draw_sheet(build_index(photographs), tmp_path / "file" / "sheet.png", seed=0, **VIEWS)
