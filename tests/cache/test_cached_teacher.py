"""Which caches a run accepts, and which views it reads from them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cmtmae_scale.cache import format as cache_format
from cmtmae_scale.cache.fingerprint import provenance
from cmtmae_scale.cache.format import MANIFEST, SHARDS, manifest_text, read_manifest, shard_path
from cmtmae_scale.cache.teacher import SidecarTeacher, open_cache
from cmtmae_scale.commands.dry_run import dry_run
from cmtmae_scale.config.load import load_config
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.errors import EXIT_STOPPED, CacheError, ConfigError, exit_code_of
from cmtmae_scale.pretraining.build import open_teachers
from cmtmae_scale.runtime.collectives import process_group
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark.training import count_variant
from dataloading.errors import ReadError
from dataloading.index import build_index
from tests.engine.run_case import make_photographs, write_recipe
from tests.pretraining.cached_run_case import (
    COUNT,
    VIEWS,
    cached,
    make_cache,
    make_skeleton,
    open_outside,
    write_manifest,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def good(recipe: Path) -> Path:
    make_cache(recipe, recipe.parent / "good", "int8", invalid=(0,))
    return recipe.parent / "good"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def check(recipe: Path, folder: Path, *overrides: str) -> None:
    config = load_config(recipe, cached(folder, *overrides))
    open_cache(config, make_skeleton(config), build_index(config.data.path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("teacher.feature=ln_post", "teacher.feature: the cache was built with block, the run has"),
        (
            "teacher.depth=2",
            r"teacher.attention_layers: the cache was built with \[5\], the run has \[1\]",
        ),
        ("teacher.image_size=96", "teacher.image_size: the cache was built with 64, the run has 9"),
        ("teacher.model=vit_tiny_patch16_224", "the cache was built with .*, the run has "),
        ("attention.layers=[0]", "teacher.attention_layers: the cache was built with"),
        ("attention.source=mean_query", "attention_source: the cache was built with cls, the run"),
        (
            "views.crop_scale=[0.5, 1.0]",
            r"views.crop_scale: the cache was built with \[0.2, 1.0\], the run",
        ),
        ("views.hflip=false", "views.hflip: the cache was built with True, the run has False"),
        (
            "views.views_per_image=3",
            "views.views_per_image: the cache was built with 2, the run has 3",
        ),
        ("run.seed=4", "teacher.seed: the cache was built with 0, the run has 4"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_field_and_both_values(
    recipe: Path, good: Path, change: str, text: str
) -> None:
    with pytest.raises(CacheError, match=text) as refused:
        check(recipe, good, change)
    assert str(refused.value).startswith(f"cache.dir={good}: ") and refused.value.exit_code == 78
    assert "teacher.mode=online" in str(refused.value)


def test_a_cache_of_other_photographs_is_refused(recipe: Path, good: Path, tmp_path: Path) -> None:
    photographs = make_photographs(tmp_path / "photos", 19)
    with pytest.raises(CacheError, match=r"data.digest: the cache was built with .*, the run has"):
        check(recipe, good, f"data.path={photographs}")


def test_other_weights_of_the_same_name_are_refused_and_absent_ones_are_compared_by_name(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {name: tmp_path / name / "weights.safetensors" for name in ("own", "other", "absent")}
    for name in ("own", "other"):
        files[name].parent.mkdir()
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), files[name])
    config = load_config(recipe, [VIEWS, f"teacher.weights={files['own']}"])
    write_manifest(config, build_index(config.data.path), tmp_path / "cache")
    check(recipe, tmp_path / "cache", f"teacher.weights={files['own']}")
    assert "weights not checked" not in caplog.text
    with pytest.raises(CacheError, match=r"teacher.weights_sha256: the cache was built with"):
        check(recipe, tmp_path / "cache", f"teacher.weights={files['other']}")
    check(recipe, tmp_path / "cache", f"teacher.weights={files['absent']}")
    assert "weights not checked" in caplog.text
    with pytest.raises(CacheError, match=r"teacher.weights: the cache was built with"):
        check(recipe, tmp_path / "cache", f"teacher.weights={tmp_path / 'named.safetensors'}")


@pytest.mark.parametrize("inner", ["", SHARDS, f"{SHARDS}/00000"])
def test_a_folder_that_everyone_may_write_to_is_refused(
    recipe: Path, good: Path, tmp_path: Path, inner: str
) -> None:
    folder = shutil.copytree(good, tmp_path / "cache")
    (folder / inner).chmod(0o777)
    with pytest.raises(CacheError, match=f"run chmod o-w {folder / inner}"):
        check(recipe, folder)


def test_a_symlink_in_place_of_a_shard_is_refused(
    recipe: Path, good: Path, tmp_path: Path, stack: ExitStack
) -> None:
    folder = shutil.copytree(good, tmp_path / "cache")
    path = shard_path(folder, read_manifest(folder), 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    opened = open_outside(recipe, cached(folder, "cache.on_miss=stop"), stack)
    while len(opened.failures) < 2:  # the first is the row that was invalid when built
        opened.teacher.forward_batch(next(opened.stream))
    assert "shard 1: it cannot be read (" in str(opened.failures[1])
    assert "; repair the cache with cmtmae precompute --repair, or" in str(opened.failures[1])


def test_a_row_that_the_store_does_not_give_stops_a_run_that_may_be_launched_again(
    recipe: Path, good: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("cmtmae_scale.cache.reader.ShardFile", fail)
    opened = open_outside(recipe, cached(good, "cache.on_miss=stop"), stack)
    opened.teacher.forward_batch(next(opened.stream))
    (failure,) = opened.failures
    assert isinstance(failure, ReadError) and exit_code_of(failure) == EXIT_STOPPED
    assert "the store fails (Stale file handle); see that the storage works" in str(failure)


def test_a_row_that_was_invalid_when_built_is_a_miss_unless_the_view_is_invalid_too(
    recipe: Path, good: Path, stack: ExitStack
) -> None:
    opened = open_outside(recipe, cached(good, "cache.on_miss=stop"), stack)
    batch = next(opened.stream)  # samples 0 and 1, view 0: rows 0 and 2
    view = opened.teacher.forward_batch(batch._replace(faulty=(0,)))
    assert view.cached and not opened.failures
    assert view.attention is not None and view.attention[0].unique().tolist() == [1 / 16]
    again = open_outside(recipe, cached(good, "cache.on_miss=stop"), stack)
    again.teacher.forward_batch(next(again.stream))
    (failure,) = again.failures
    assert "row 0 (image 0, view 0) of shard 0: its image could not be decoded" in str(failure)
    assert f"; delete {shard_path(good, read_manifest(good), 0)} and complete" in str(failure)
    online = open_outside(recipe, cached(good), stack)
    assert not online.teacher.forward_batch(next(online.stream)).cached
    assert online.teacher.forward_batch(next(online.stream)).cached and not online.failures


def test_without_misses_and_checks_no_image_is_decoded_for_the_teacher(
    recipe: Path, tmp_path: Path, stack: ExitStack
) -> None:
    config = load_config(recipe, [VIEWS, "teacher.image_size=96"])
    write_manifest(config, build_index(config.data.path), tmp_path / "cache")
    large = cached(tmp_path / "cache", "teacher.image_size=96")
    for extra, sides in (("cache.on_miss=stop", [64]), ("cache.on_miss=online", [64, 96])):
        batch = next(open_outside(recipe, [*large, extra], stack).stream)
        assert [image.shape[1] for image in batch.images] == sides


def test_spot_checks_of_a_good_cache_pass_at_the_fraction_asked_for(
    recipe: Path, good: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    overrides = cached(good, "cache.spot_check=0.3", "cache.on_miss=stop")
    opened = open_outside(recipe, overrides, stack)
    next(opened.stream)
    for _ in range(19):
        assert opened.teacher.forward_batch(next(opened.stream)).cached
    lines = [line for line in caplog.messages if "spot check" in line]
    assert not opened.failures and len(lines) == 6
    assert all("standardised cosine 0.999" in line for line in lines), lines


def test_a_view_of_no_data_is_even_and_finite(recipe: Path, good: Path, stack: ExitStack) -> None:
    opened = open_outside(recipe, cached(good, "cache.on_miss=stop"), stack)
    view = opened.teacher.forward_batch(next(opened.stream)._replace(plan=None))
    assert view.attention is not None and view.features is not None
    assert torch.equal(view.attention, torch.full((2, 16), 1 / 16))
    assert bool(view.features.isfinite().all())


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["teacher.mode=cached", VIEWS], "cache.dir must be given"),
        (
            ["teacher.mode=cached", "cache.dir=x"],
            "views.views_per_image is not given; set it to what the",
        ),
        (cached(Path("x"), "mask.sampler=random", "loss.teacher=0"), "set teacher.mode=none"),
        (cached(Path("x"), "cache.spot_check=1.5"), r"cache.spot_check=1.5 must lie in \[0, 1\]"),
    ],
)
def test_settings_that_can_never_work_are_refused(
    recipe: Path, overrides: list[str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(recipe, overrides)


@pytest.mark.slow
def test_a_dry_run_counts_the_teacher_only_if_it_runs(recipe: Path) -> None:
    def totals(*overrides: str) -> tuple[str, float, float]:
        config = load_config(recipe, list(overrides))
        text, _ = dry_run(config, World(0, 1, 0, 1, "none"))
        work, memory_gib = count_variant(config, 1)
        return text.split("parameters, frozen")[1].split("\n")[0], work.teacher, memory_gib

    online = totals()
    assert online[0] == "" and online[1] > 0
    assert totals(*cached(Path("x"))) == (", read from x", 0, online[2])
    checked = totals(*cached(Path("x"), "cache.on_miss=stop", "cache.spot_check=0.25"))
    assert checked == (", read from x", online[1] / 4, online[2])
    bare = totals(*cached(Path("x"), "cache.on_miss=stop"))
    assert bare[:2] == (", read from x and not built", 0) and bare[2] < online[2]


def test_rows_of_every_view_are_where_the_run_reads_them(
    recipe: Path, good: Path, stack: ExitStack
) -> None:
    opened = open_outside(recipe, cached(good, "cache.on_miss=online"), stack)
    assert opened.teacher.online is not None
    for _ in range(20 * COUNT // 2):
        batch = next(opened.stream)
        view = opened.teacher.forward_batch(batch)
        online = opened.teacher.online.forward_batch(batch)
        assert view.attention is not None and online.attention is not None
        # float16 keeps 11 bits.
        assert torch.allclose(view.attention, online.attention, rtol=2**-11, atol=2**-24)


def test_a_cache_of_another_decoder_or_version_is_used_with_a_warning_of_rank_0(
    recipe: Path, tmp_path: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cpu = tmp_path / "cache", torch.device("cpu")
    config = load_config(recipe, cached(folder, "cache.on_miss=stop"))
    index = build_index(config.data.path)
    manifest = write_manifest(config, index, folder)
    built = {**provenance(config, cpu), "torch": "2.0.1", "decode": "dali"}
    (folder / MANIFEST).write_text(manifest_text(replace(manifest, recorded=built)))
    single = World(0, 1, 0, 1, "none")
    stack.enter_context(process_group(single, cpu))
    for world in (single, single._replace(rank=1)):
        open_teachers(config, world, cpu, index, StopRequest(tmp_path), stack)
    assert [line for line in caplog.messages if "built with" in line] == [
        f"cache.dir={folder}: built with decode dali, here is torch",
        f"cache.dir={folder}: built with torch 2.0.1, here is {torch.__version__}",
    ]


def test_a_cache_whose_store_fails_at_the_launch_is_tried_again(
    recipe: Path, good: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cpu = load_config(recipe, cached(good, "cache.on_miss=stop")), torch.device("cpu")
    single = World(0, 1, 0, 1, "none")
    stack.enter_context(process_group(single, cpu))

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(cache_format, "read_regular", fail)
    with pytest.raises(CacheError, match=MANIFEST) as raised:
        index = build_index(config.data.path)
        open_teachers(config, single, cpu, index, StopRequest(tmp_path), stack)
    assert exit_code_of(raised.value) == EXIT_STOPPED


def test_a_store_that_fails_while_a_sidecar_is_searched_ends_no_run(
    recipe: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe, cached(good))
    skeleton, index = make_skeleton(config), build_index(config.data.path)
    absent = load_config(recipe, cached(good.with_name("absent")))
    device, fail = torch.device("cpu"), lambda error: pytest.fail(str(error))
    teacher = SidecarTeacher(absent, skeleton, skeleton, index, device, fail)
    teacher.folder, teacher.next_search, stat = good, 0.0, os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(MANIFEST):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        teacher.search_cache()
    assert teacher.cached is None and 0 < teacher.next_search < float("inf")
