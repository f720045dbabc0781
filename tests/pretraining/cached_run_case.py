"""Teacher caches of a tiny run, and runs that read them."""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from cmtmae_scale.cache.codecs import (
    Calibration,
    calibrate,
    calibration_path,
    encode,
    save_calibration,
)
from cmtmae_scale.cache.fingerprint import cache_fingerprint
from cmtmae_scale.cache.format import MANIFEST, Manifest, manifest_text, write_shard
from cmtmae_scale.cache.teacher import CachedTeacher, open_cache
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError
from cmtmae_scale.teachers.base import TeacherView, view_sizes
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton
from cmtmae_scale.teachers.online import OnlineTeacher
from dataloading.errors import ReadError
from dataloading.index import Index, build_index
from dataloading.stream import Stream
from tests.engine.run_case import run

COUNT = 2
VIEWS = f"views.views_per_image={COUNT}"
FORWARD = OnlineTeacher.forward_batch


def cached(folder: Path, *more: str) -> list[str]:
    """Overrides of a run that reads a cache."""
    return [VIEWS, "teacher.mode=cached", f"cache.dir={folder}", *more]


def rounded(teacher: OnlineTeacher, batch: Any) -> TeacherView:
    """Forward the online teacher, and round its view as a bf16 cache does."""
    attention, features, _ = FORWARD(teacher, batch)
    assert attention is not None and features is not None
    return TeacherView(attention.half().float(), features.bfloat16())


def open_views(config: Config, index: Index, teacher: Any, **options: Any) -> Stream:
    """Views of the run, two per batch as in the run."""
    views = config.views
    sizes = view_sizes(views.image_size, {"": teacher})
    options = {"micro_batch": 2, "sizes": sizes, "shuffle": "none"} | options
    plan = {
        "scale": views.crop_scale,
        "ratio": views.aspect_ratio,
        "flip": views.hflip,
        "count": views.views_per_image,
    }
    return Stream(index, seed=config.run.seed, **plan, **options)


def make_skeleton(config: Config) -> OnlineTeacher:
    with torch.device("meta"):
        return build_teacher_skeleton(config).to("meta", torch.float32)


def write_manifest(
    config: Config, index: Index, folder: Path, rows_per_shard: int = 7, codec: Any = "bf16"
) -> Manifest:
    """A cache that holds no rows yet; int8 has a calibration of zeros and ones."""
    folder.mkdir(parents=True, exist_ok=True)
    skeleton = make_skeleton(config)
    patches = skeleton.grid[0] * skeleton.grid[1]
    file = None
    if codec == "int8":
        ones = torch.ones(skeleton.width)
        file = save_calibration(folder, Calibration(0 * ones, ones))
    manifest = Manifest(
        fingerprint=cache_fingerprint(config, skeleton.fingerprint(), index, "views"),
        recorded={},
        codec=codec,
        num_rows=len(index) * COUNT,
        rows_per_shard=rows_per_shard,
        patches=patches,
        tokens=patches + skeleton.has_cls,
        width=skeleton.width,
        calibration_sha256=file,
    )
    (folder / MANIFEST).write_text(manifest_text(manifest))
    return manifest


def make_cache(
    recipe: Path,
    folder: Path,
    codec: Any = "bf16",
    rows_per_shard: int = 7,
    rows_of: tuple[str, ...] = (),
    invalid: tuple[int, ...] = (),
) -> Manifest:
    """Write a whole cache.

    Args:
        rows_of: overrides of the teacher that computes the rows; the manifest ignores them.
        invalid: rows whose images could not be decoded.
    """
    config = load_config(recipe, [VIEWS])
    index = build_index(config.data.path)
    teacher = build_teacher(load_config(recipe, [VIEWS, *rows_of]), "cpu", torch.float32)
    assert teacher is not None
    num_rows = len(index) * COUNT
    attention_rows, feature_rows = {}, {}
    with open_views(config, index, teacher) as stream:
        for _ in range(num_rows // 2):
            batch = next(stream)
            view = teacher.forward_batch(batch)
            assert view.attention is not None and view.features is not None
            for k, (sample, number) in enumerate(zip(batch.sample_id, batch.view, strict=True)):
                row = int(sample) * COUNT + int(number)
                attention_rows[row] = view.attention[k].half()
                feature_rows[row] = view.features[k]
    attention = torch.stack([attention_rows[row] for row in range(num_rows)])
    features = torch.stack([feature_rows[row] for row in range(num_rows)])
    manifest = write_manifest(config, index, folder, rows_per_shard, codec)
    calibration = None
    if codec == "int8":
        calibration = calibrate([features])
        calibration_path(folder, str(manifest.calibration_sha256)).unlink()
        manifest = replace(manifest, calibration_sha256=save_calibration(folder, calibration))
        (folder / MANIFEST).write_text(manifest_text(manifest))
    write_rows(folder, manifest, attention, features, calibration, invalid)
    return manifest


def write_rows(
    folder: Path,
    manifest: Manifest,
    attention: torch.Tensor,
    features: torch.Tensor,
    calibration: Calibration | None,
    invalid: tuple[int, ...],
) -> None:
    stored = encode(features, manifest.codec, calibration)
    fields = {"attention": attention, "features": stored.values}
    fields["valid"] = torch.ones(manifest.num_rows, dtype=torch.uint8)
    fields["valid"][list(invalid)] = 0
    if stored.scales is not None:
        fields["scales"] = stored.scales
    for shard in range(manifest.num_shards):
        rows = manifest.shard_rows(shard)
        cut = {name: one[rows.start : rows.stop] for name, one in fields.items()}
        write_shard(folder, manifest, shard, cut)


class Opened(NamedTuple):
    """A cached teacher outside a run."""

    teacher: CachedTeacher
    stream: Stream
    failures: list[CacheError | ReadError]


def open_outside(recipe: Path, overrides: list[str], stack: ExitStack) -> Opened:
    """Open the cache of a run, and its views in index order."""
    config = load_config(recipe, overrides)
    index = build_index(config.data.path)
    skeleton = make_skeleton(config)
    online = None
    if config.cache.on_miss == "online" or config.cache.spot_check:
        online = build_teacher(config, "cpu", torch.float32)
    failures: list[CacheError | ReadError] = []
    device = torch.device("cpu")
    opened = open_cache(config, skeleton, index)
    teacher = CachedTeacher(config, *opened, skeleton, online, device, failures.append)
    stack.callback(teacher.close)
    stream = stack.enter_context(open_views(config, index, teacher, watch=teacher.submit))
    return Opened(teacher, stream, failures)


class Seen(NamedTuple):
    """Outcome and log of a run."""

    reason: str | None
    error: str
    masks: str
    """Digest of the visible patches of all micro-batches."""
    log: list[dict[str, float]]


def observe(recipe: Path, run_dir: Path, overrides: list[str], how: str = "") -> Seen:
    """Run; ``how``: "rounded" as by a bf16 cache, "alone" without an online teacher."""
    from cmtmae_scale.pretraining import task

    digest, prepare = hashlib.sha256(), task.prepare

    def add_masks(*arguments: Any) -> Any:
        micro_batch, observed = prepare(*arguments)
        digest.update(micro_batch.choice.ids_keep.numpy().tobytes())
        return micro_batch, observed

    reason, error = None, ""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(task, "prepare", add_masks))
        if how == "rounded":
            stack.enter_context(mock.patch.object(OnlineTeacher, "forward_batch", rounded))
        if how == "alone":
            none = mock.Mock(side_effect=AssertionError("a teacher is built"))
            stack.enter_context(mock.patch("cmtmae_scale.pretraining.build.build_teacher", none))
        try:
            reason = run(recipe, [f"run.output_dir={run_dir}", *overrides])
        except CacheError as failed:
            error = f"{failed.exit_code} {failed}"
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return Seen(reason, error, digest.hexdigest(), [json.loads(line) for line in lines])


def observe_each(recipe: Path, ways: list[tuple[Path, list[str], str]]) -> list[Seen]:
    """Several runs one after the other in the same processes."""
    return [observe(recipe, *way) for way in ways]
