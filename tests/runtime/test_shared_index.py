"""Which files a rank has, as the ranks compare them before they open an index."""

import errno
import os
from pathlib import Path

import pytest

from cmtmae_scale.runtime.shared_index import identify_place, open_on_all_ranks
from dataloading.data_set import Request
from tests.dataloading.bad_data_case import PNG
from tests.dataloading.tar_case import write_tar


def test_a_long_list_in_braces_is_opened_as_a_pattern(tmp_path: Path) -> None:
    names = [f"train-{number:06d}" for number in range(40)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [("a.png", PNG)])
    pattern = tmp_path / f"{{{','.join(names)}}}.tar"
    assert len(pattern.name) > 255
    assert len(open_on_all_ranks(Request(pattern), tmp_path / "index", "changed")) == 40


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_path_that_cannot_be_looked_up_has_the_place_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected, stat = identify_place(tmp_path), os.stat

    def look_up(path, *arguments, **options):
        if str(path).startswith(f"{tmp_path}/"):
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", look_up)
    assert identify_place(tmp_path / "photos") == expected
