"""Any number of processes build a cache and may be killed; only intact shards are trusted."""

import errno
import json
import os
import re
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cmtmae_scale.cache import build, claim
from cmtmae_scale.cache import format as cache_format
from cmtmae_scale.cache.claim import compute_once, create_claim
from cmtmae_scale.cache.codecs import Encoded, decode
from cmtmae_scale.cache.format import (
    ABANDONED_S,
    MANIFEST,
    missing_shards,
    old_seal_path,
    read_manifest,
    shard_path,
)
from cmtmae_scale.cache.reader import UNDECODED, ShardFile
from cmtmae_scale.cache.verify import choose_rows, compare_rows, damaged_shards
from cmtmae_scale.commands import precompute
from cmtmae_scale.config.images import open_images
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import CacheError, ConfigError, TeacherError
from cmtmae_scale.pretraining.build import open_index
from cmtmae_scale.runtime.storage import digest
from cmtmae_scale.teachers.base import TeacherView
from dataloading import folders
from tests.cache import cache_case as case
from tests.processes import CONTEXT, run_ranks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write_cache_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    folder = recipe.parent / "whole"
    case.build_cache(recipe, folder)
    return folder


def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def test_rows_are_the_teachers_outputs(recipe: Path, whole: Path) -> None:
    """Row by row, from views that are cut and forwarded one at a time."""
    builder = case.make_builder(recipe)
    manifest = builder.join_cache(whole, "int8")
    calibration = builder.calibration
    assert calibration is not None
    assert manifest.num_rows == case.PHOTOGRAPHS * case.VIEWS
    for row in range(manifest.num_rows):
        plan = builder.planner.cut(
            np.array([0]), np.array([row // case.VIEWS]), np.array([row % case.VIEWS])
        )
        (online,) = builder.forward_plans([plan])
        into = manifest.empty_rows(1)
        shard = ShardFile(whole, manifest, row // case.ROWS_PER_SHARD)
        assert shard.read_rows([row], into, [0]) == [None]
        shard.close()
        assert torch.equal(into["attention"], online.attention.half())
        features = decode(Encoded(into["features"], into["scales"]), calibration)
        # half a level of int8, of the largest of the token's standardised channels
        bound = 0.6 * into["scales"].float().unsqueeze(-1) * calibration.std + 1e-5
        assert bool(((features - online.features).abs() <= bound).all())
    builder.close()


@pytest.mark.dali
def test_rows_are_the_same_where_dali_decodes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Calibration, two shards with an incomplete micro-batch each, and rows computed again.

    On a CPU DALI's pixels of these images are those of the other decoder, so the rows are equal.
    """
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    folder, builder = tmp_path / "cache", case.make_builder(recipe, ["data.decode=dali"])
    try:
        manifest = builder.begin_cache(folder, "int8", case.ROWS_PER_SHARD)
        build.build_shards(builder, folder, manifest, [0, 1])
        comparison = compare_rows(builder, folder, manifest, [0, 1], 1.0)
    finally:
        builder.close()
    assert comparison.rows == 2 * case.ROWS_PER_SHARD and comparison.validity == 0
    before = read_manifest(whole)
    for shard in (0, 1):
        ours, theirs = (
            load_file(shard_path(*place, shard)) for place in ((folder, manifest), (whole, before))
        )
        for name in ("attention", "features", "scales", "valid"):
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.gloo
def test_killed_and_finished_by_two_the_bytes_are_the_same(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    child = CONTEXT.Process(target=case.build_until_killed, args=(recipe, folder))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -9
    assert len(missing_shards(folder, read_manifest(folder))) in (2, 3)
    for share in ((0, 2), (1, 2)):
        case.build_cache(recipe, folder, share=share)
    assert case.content(folder) == case.content(whole)


@pytest.mark.gloo
def test_processes_that_begin_together_calibrate_once(recipe: Path, tmp_path: Path) -> None:
    counts = run_ranks(3, case.begin_and_count, recipe, tmp_path / "cache")
    assert sum(counts) == 1


def test_a_claim_that_a_full_disk_refuses_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("socket.gethostname", refuse)
        create_claim(tmp_path / "claim")
    assert create_claim(tmp_path / "claim") and not create_claim(tmp_path / "claim")


def test_work_of_a_process_that_died_is_taken_over(tmp_path: Path) -> None:
    claim = tmp_path / "claim"
    claim.write_text("somebody")
    assert compute_once(claim, lambda: None, lambda keep_alive: 7, stale_s=0.2, pause_s=0.01) == 7
    assert not claim.exists()


def test_a_result_that_appears_ends_the_waiting(tmp_path: Path) -> None:
    claim = tmp_path / "claim"
    claim.write_text("somebody")
    answers = iter([None, None, 3])
    assert compute_once(claim, lambda: next(answers), lambda keep_alive: 7, pause_s=0.01) == 3


def run(recipe: Path, folder: Path, *arguments: str) -> int:
    size = f"--rows-per-shard={case.ROWS_PER_SHARD}"
    return precompute.precompute_teacher(
        ["--config", str(recipe), size, f"cache.dir={folder}", *arguments]
    )


def test_what_a_killed_process_was_writing_is_deleted_once_it_is_old(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    folder = copy(whole, tmp_path)
    shard = shard_path(folder, read_manifest(folder), 1)
    names = (f".{shard.name}.0123abcd.tmp", f".{shard.name}.89abcdef.tmp", ".mine.0123abcd.tmp")
    old, recent, foreign = (shard.with_name(name) for name in names)
    for path in (old, recent, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (1, time.time() - ABANDONED_S - 1))
    assert run(recipe, folder) == 0
    assert not old.exists() and recent.exists() and foreign.exists() and shard.exists()


def test_a_flipped_bit_is_found_named_and_repaired(
    recipe: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(whole, tmp_path)
    assert run(recipe, folder, "--verify", "1") == 0
    assert "verdict: good" in capsys.readouterr().out
    path = shard_path(folder, read_manifest(folder), 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert run(recipe, folder, "--verify") == 78
    out = capsys.readouterr().out
    assert re.search(r"shard 1: it differs from its SHA-256, at rows \d+", out)
    assert "verdict: not good" in out
    assert run(recipe, folder, "--repair") == 0
    assert case.content(folder) == case.content(whole) | {
        name: data for name, data in case.content(folder).items() if name.startswith("index/")
    }


def test_missing_and_foreign_shards_are_named(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    manifest = read_manifest(folder)
    paths = [shard_path(folder, manifest, shard) for shard in range(3)]
    paths[0].unlink()
    shutil.copy(paths[1], paths[2])
    found = dict(damaged_shards(folder, manifest, range(manifest.num_shards)))
    assert found[0] == "it is missing"
    assert found[2].startswith("rows 12, 13, 14, 15, 16, ... differ")
    assert set(found) == {0, 2}


def test_a_cache_of_format_1_is_continued_verified_repaired_and_read(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, make = tmp_path / "cache", build.Builder.make_manifest
    with monkeypatch.context() as patched:
        patched.setattr(
            build.Builder, "make_manifest", lambda *given: replace(make(*given), format=1)
        )
        case.build_cache(recipe, folder, share=(0, 2))
    manifest = read_manifest(folder)
    first = shard_path(folder, manifest, 0)
    assert first == folder / "parts" / "00000000.safetensors"
    save_file(load_file(first), first)  # version 0.1 wrote no digest in the header
    seal = {"size": first.stat().st_size, "sha256": digest(first)}
    old_seal_path(first).write_text(json.dumps(seal))
    case.build_cache(recipe, folder)
    shards = range(manifest.num_shards)
    assert not dict(damaged_shards(folder, manifest, shards))
    assert [path.suffix for path in sorted((folder / "parts").iterdir())] == [
        ".json",
        ".safetensors",
    ] * manifest.num_shards
    data = bytearray(first.read_bytes())
    data[-1] ^= 4
    first.write_bytes(data)
    old_seal_path(shard_path(folder, manifest, 1)).unlink()
    found = dict(damaged_shards(folder, manifest, shards))
    assert found[0].startswith("it differs from its SHA-256")
    assert found[1].startswith("its seal cannot be read") and set(found) == {0, 1}
    assert missing_shards(folder, manifest) == [1]
    assert run(recipe, folder, "--repair") == 0
    assert not dict(damaged_shards(folder, manifest, shards))
    new = read_manifest(whole)
    for shard in shards:
        old_rows, new_rows = (
            load_file(shard_path(folder, manifest, shard)),
            load_file(shard_path(whole, new, shard)),
        )
        for name in ("attention", "features", "scales", "valid"):
            assert torch.equal(old_rows[name], new_rows[name])


@pytest.mark.parametrize(
    ("views", "row_bytes", "rows", "shards"),
    [
        (10_000, 152_091, 1024, 10),
        (1_281_167 * 4, 152_091, 1024, 5005),
        (14_197_122 * 4, 152_091, 4096, 13_865),  # 8,192 rows would have 1.2 GiB
        (1_000_000_000, 401, 131_072, 7630),
        (1_000_000_000, 2_000_000, 1024, 976_563),
    ],
)
def test_large_caches_have_larger_shards(
    views: int, row_bytes: int, rows: int, shards: int
) -> None:
    assert build.choose_shard_rows(views, row_bytes) == rows
    assert -(-views // rows) == shards


def test_a_cache_that_was_begun_keeps_the_size_of_its_shards(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = case.make_builder(recipe)
    assert builder.begin_cache(whole, "int8").rows_per_shard == case.ROWS_PER_SHARD
    with pytest.raises(CacheError, match="was begun with rows_per_shard=6, now it is 7"):
        builder.begin_cache(whole, "int8", 7)
    monkeypatch.setattr(build, "SHARD_ROWS", 2)
    monkeypatch.setattr(build, "MAX_SHARDS", 5)
    assert builder.make_manifest("int8").rows_per_shard == 4
    builder.keyed = "positions"
    assert builder.make_manifest("int8").rows_per_shard == 2
    builder.close()


def test_a_cache_and_its_run_keep_the_images_that_the_cache_began_with(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that can be read by now is taken by a cache that begins, and by its run."""
    cache, index = tmp_path / "cache", tmp_path / "index"
    changes = [f"cache.dir={cache}", f"data.index={index}", "teacher.mode=cached"]
    config = load_config(recipe, changes)
    locked, read = min(Path(config.data.path).rglob("*.jpg")), folders.header_of_file

    def refuse(path: Path) -> Any:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    def counts() -> list[int]:
        opened = build.open_or_build_index(config, index), open_index(config, tmp_path / "run")
        return [len(one) for one in opened]

    with monkeypatch.context() as patch:
        patch.setattr(folders, "header_of_file", refuse)
        assert counts() == [case.PHOTOGRAPHS - 1] * 2
    cache.mkdir()
    (cache / cache_format.MANIFEST).touch()
    assert counts() == [case.PHOTOGRAPHS - 1] * 2
    (cache / cache_format.MANIFEST).unlink()
    assert counts() == [case.PHOTOGRAPHS] * 2


def test_a_sidecar_does_not_build_the_index_of_its_run_again(recipe: Path, tmp_path: Path) -> None:
    """Its machine may have a copy of the images with other times."""
    photos, folder = case.make_photographs(tmp_path / "photos", 4), tmp_path / "index"
    config = load_config(recipe, [f"data.path={photos}"])
    digest = build.open_or_build_index(config, folder).digest
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    os.utime(min(photos.rglob("*.jpg")), (1, 1))
    assert build.open_or_build_index(config, folder, "positions").digest == digest
    assert {file.name: file.stat().st_ino for file in folder.iterdir()} == before


def test_rows_that_are_computed_again_are_those_of_the_intact_shards(whole: Path) -> None:
    manifest = read_manifest(whole)  # 20 rows, 6 per shard
    assert choose_rows(manifest, [1, 3], 1.0, 1).tolist() == [6, 7, 8, 9, 10, 11, 18, 19]
    some = choose_rows(manifest, [0, 2], 0.25, 2).tolist()
    assert len(set(some)) == 3 and set(some) <= {*range(6), *range(12, 18)} and some == sorted(some)
    assert choose_rows(manifest, [], 0.5, 4).tolist() == []


def test_another_run_is_refused_with_the_field(recipe: Path, whole: Path) -> None:
    with pytest.raises(
        CacheError, match=r"views\.crop_scale: the cache was built with \[0.2, 1.0\]"
    ):
        case.build_cache(recipe, whole, ["views.crop_scale=[0.3, 1.0]"])


def test_other_images_are_refused(recipe: Path, whole: Path, tmp_path: Path) -> None:
    photos = case.make_photographs(tmp_path / "photos", case.PHOTOGRAPHS + 1)
    with pytest.raises(CacheError, match=r"data\.digest: the cache was built with"):
        case.build_cache(recipe, whole, [f"data.path={photos}"])


def test_another_codec_is_refused(recipe: Path, whole: Path) -> None:
    with pytest.raises(CacheError, match="was begun with codec=int8, now it is bf16"):
        case.build_cache(recipe, whole, ["cache.codec=bf16"])


@pytest.mark.parametrize("codec", ["bf16", "attention"])
def test_other_codecs_verify(
    recipe: Path, tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    assert run(recipe, folder, f"cache.codec={codec}") == 0
    assert run(recipe, folder, f"cache.codec={codec}", "--verify", "1") == 0
    out = capsys.readouterr().out
    assert ("features, cosine" in out) == (codec == "bf16")
    if codec == "attention":
        assert read_manifest(folder).row_bytes() == 2 * 16 + 1 + 8


def test_a_full_disk_says_what_is_missing_and_the_rest_follows(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    real = build.write_shard

    def full(folder: Path, manifest, shard: int, fields) -> None:
        if shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, manifest, shard, fields)

    monkeypatch.setattr(build, "write_shard", full)
    with pytest.raises(
        CacheError, match=r"is full .* 2 of 4 shards are complete, the others need 0"
    ):
        case.build_cache(recipe, folder)
    monkeypatch.undo()
    case.build_cache(recipe, folder)
    assert case.content(folder) == case.content(whole)


def test_a_command_on_a_full_disk_can_be_tried_again(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cache_format, "save_file", full)
    assert run(recipe, tmp_path / "cache") == 75
    assert "is full ([Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--verify", "--repair"])
def test_a_store_that_fails_makes_no_shard_a_damaged_one(
    recipe: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    folder, opened = copy(whole, tmp_path), os.open
    path = shard_path(folder, read_manifest(folder), 1)

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert run(recipe, folder, option) == 75
    assert path.exists()
    text = f"{path}: cannot be read (Stale file handle); see that the storage works and try the "
    assert text in capsys.readouterr().err


def test_no_cache_is_begun_with_an_incomplete_copy_of_the_images(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    assert run(recipe, folder, f"data.expected_images={case.PHOTOGRAPHS + 1}") == 78
    text = "has 10 usable images, data.expected_images=11; correct one of them"
    assert text in capsys.readouterr().err
    assert not (folder / MANIFEST).exists()


def test_a_cache_without_a_view_to_calibrate_with_is_refused(recipe: Path, tmp_path: Path) -> None:
    photos = case.make_photographs(tmp_path / "photos", 2)
    for victim in photos.rglob("*.jpg"):
        victim.write_bytes(victim.read_bytes()[:-300])
    with pytest.raises(CacheError, match=r"none of the first \d+ views can be decoded"):
        case.build_cache(recipe, tmp_path / "cache", [f"data.path={photos}"])


def test_features_beyond_the_range_of_the_calibration_are_refused(
    recipe: Path, whole: Path
) -> None:
    builder = case.make_builder(recipe)
    manifest = builder.join_cache(whole, "int8")
    features = torch.zeros(2, manifest.tokens, manifest.width)
    features[1, 0, 0] = 1e12
    found = build.TeacherRows(np.arange(2), None, features, torch.tensor([True, True]))
    with pytest.raises(CacheError, match=r"rows 0 to 1 are beyond the range .* cache.codec=bf16"):
        builder.encode_rows(manifest, found)


def test_an_image_that_cannot_be_decoded_is_an_invalid_row(recipe: Path, tmp_path: Path) -> None:
    photos = case.make_photographs(tmp_path / "photos", case.PHOTOGRAPHS)
    victim = sorted(photos.rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:-300])
    manifest = case.build_cache(recipe, tmp_path / "cache", [f"data.path={photos}"])
    rows = 3 * case.VIEWS + torch.arange(case.VIEWS)
    into = manifest.empty_rows(1)
    for row in rows.tolist():
        shard = ShardFile(tmp_path / "cache", manifest, row // case.ROWS_PER_SHARD)
        assert shard.read_rows([row], into, [0]) == [UNDECODED]
        shard.close()


def test_a_cache_needs_fixed_views(recipe: Path) -> None:
    with pytest.raises(CacheError, match=r"views\.views_per_image is not set"):
        case.make_builder(recipe, ["views.views_per_image=null"])


def test_a_folder_that_everyone_may_write_is_refused(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    folder = copy(whole, tmp_path)
    folder.chmod(0o777)
    with pytest.raises(CacheError, match="everyone may write to it"):
        case.build_cache(recipe, folder)


def test_what_is_no_folder_of_shards_and_no_shard_is_named(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    manifest = read_manifest(folder)
    path = shard_path(folder, manifest, 1)
    path.unlink()
    path.mkdir()
    assert list(damaged_shards(folder, manifest, range(4))) == [(1, "Is a directory")]
    with pytest.raises(
        CacheError, match=r"1\.safetensors: cannot be deleted .* delete it yourself"
    ):
        precompute.delete_shard(path)
    shutil.rmtree(folder / "parts")
    assert missing_shards(folder, manifest) == [0, 1, 2, 3]
    (folder / "parts").touch()
    with pytest.raises(CacheError, match=r"parts cannot be listed \(Not a directory\); correct"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shard", "8/8"],
        ["--shard", "a/b"],
        ["--rows-per-shard", "0"],
        ["--verify", "2"],
        ["--verify", "--repair"],
        ["--verify", "--shard", "0/8"],
        ["--plan", "--shard", "0/8"],
        ["--ahead", "4"],
    ],
)
def test_illegal_arguments_exit_with_78(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        precompute.parse_precompute_options(["--config", "x", *arguments])
    assert stop.value.code == 78


def test_a_place_that_cannot_be_written_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, recipe / "cache") == 78
    assert "recipe.yaml/cache/index: cannot be written" in capsys.readouterr().err


def array_task(task: int, first: int, last: int, count: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


def test_a_slurm_array_task_has_its_share() -> None:
    assert precompute.find_share(None, array_task(5, 2, 5, 4)) == (3, 4)
    assert precompute.find_share(None, array_task(3, 3, 3, 1)) == (0, 1)  # one task submitted again
    assert precompute.find_share(None, {}) == (0, 1)


@pytest.mark.parametrize("task", [array_task(1, 1, 5, 2), array_task(0, 0, 20, 3)])
def test_a_slurm_array_with_gaps_is_refused_unless_the_share_is_given(task: dict[str, str]) -> None:
    count = task["SLURM_ARRAY_TASK_COUNT"]
    with pytest.raises(ConfigError, match=rf"leave shards without a task.* --shard i/{count}"):
        precompute.find_share(None, task)
    assert precompute.find_share((1, 2), task) == (1, 2)


@pytest.mark.parametrize("change", [{"SLURM_ARRAY_TASK_MAX": None}, {"SLURM_ARRAY_TASK_MIN": "x"}])
def test_a_slurm_array_with_incomplete_variables_is_refused(change: dict[str, str | None]) -> None:
    task = {k: v for k, v in (array_task(0, 0, 3, 4) | change).items() if v is not None}
    with pytest.raises(ConfigError, match=r"SLURM_ARRAY_TASK_M.*or give the share with --shard"):
        precompute.find_share(None, task)


def test_a_task_of_an_array_with_gaps_exits_with_78(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in array_task(5, 1, 5, 2).items():
        monkeypatch.setenv(name, value)
    assert run(recipe, tmp_path / "cache") == 78
    assert "SLURM array: 2 tasks with numbers from 1 to 5" in capsys.readouterr().err
    assert run(recipe, tmp_path / "cache", "--shard", "1/2") == 0


def test_an_output_that_is_not_finite_ends_the_build_and_names_the_image(
    recipe: Path, tmp_path: Path
) -> None:
    """A row that is stored as undecodable would blame the image, and would not be counted."""
    builder = case.make_builder(recipe)
    manifest = builder.begin_cache(tmp_path / "cache", "int8", case.ROWS_PER_SHARD)
    teacher = builder.teacher

    def failing(images: torch.Tensor) -> TeacherView:
        view = teacher(images)
        assert view.features is not None
        view.features[1, 2, 3] = float("nan")
        return view

    builder.teacher = failing  # pyright: ignore
    expected = (
        r"^the output of teacher.model=test_vit is not finite for 1 of 4 views, first: view 1 of "
        r"image 0 \(class0/000.jpg\), which was decoded; set backend.precision=fp32"
    )
    with pytest.raises(TeacherError, match=expected):
        builder.compute_shard(manifest, 0)
    builder.close()


def test_attention_that_is_not_finite_ends_the_build_without_features_too(
    recipe: Path, tmp_path: Path
) -> None:
    """The features, which would show it, are not computed for a cache of attention maps."""
    builder = case.make_builder(recipe, ["cache.codec=attention"])
    manifest = builder.begin_cache(tmp_path / "cache", "attention", case.ROWS_PER_SHARD)
    block: Any = builder.teacher.tower.blocks[-1]
    block.attn.qkv.weight.data[0] = torch.nan
    with pytest.raises(TeacherError, match="is not finite for 4 of 4 views"):
        builder.compute_shard(manifest, 0)
    builder.close()


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_verifying_keeps_no_features_of_the_rows_that_it_has_compared(
    recipe: Path, tmp_path: Path, codec: str
) -> None:
    """A hundredth of ImageNet-1K with four views is 21 GB of them, and as much stored."""
    folder, overrides = tmp_path / "cache", [f"cache.codec={codec}"]
    manifest = case.build_cache(recipe, folder, overrides)
    builder = case.make_builder(recipe, overrides)
    builder.join_cache(folder, builder.config.cache.codec)
    forward, seen = builder.forward_next, []

    def counted(plan: Any) -> Any:
        assert sum(one() is not None for one in seen) <= 1
        found = forward(plan)
        seen.append(weakref.ref(found.features))
        return found

    builder.forward_next = counted  # pyright: ignore
    found = compare_rows(builder, folder, manifest, range(manifest.num_shards), 1.0)
    builder.close()
    assert len(seen) == 5 and found.rows == manifest.num_rows and found.good
    assert found.features is not None and found.attention_error is not None
    assert found.features.standardised[2] > (0.9998 if codec == "int8" else 0.999)
    assert 0 < found.attention_error < 1e-3 and (found.agreement or 0) > 0.99


def test_processes_wait_for_an_index_however_long_it_takes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all of them begin to read the headers of a large set once the first is at work."""
    config, builds = load_config(recipe), []

    def open_slowly(data: Any, folder: Path, recheck_excluded: bool) -> Any:
        if not (folder / "index.json").exists():
            builds.append(folder)
            time.sleep(1.0)
        return open_images(data, folder, recheck_excluded=recheck_excluded)

    monkeypatch.setattr(build, "open_images", open_slowly)
    monkeypatch.setattr(build, "compute_once", partial(compute_once, stale_s=0.4, pause_s=0.02))
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    with ThreadPoolExecutor(3) as pool:
        opened = [pool.submit(build.open_or_build_index, config, tmp_path) for _ in range(3)]
    assert len({one.result().digest for one in opened}) == 1
    assert builds == [tmp_path]
