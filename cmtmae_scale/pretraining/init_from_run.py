"""Starts a new run from a checkpoint of another run, also at another image size.

The other run may have had another number of ranks, backend or sharding. Runs once, before the first
step; a resume reads nothing of the other run.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from cmtmae_scale.backends.adamw import MOMENTS
from cmtmae_scale.backends.base import Backend, Fragment
from cmtmae_scale.backends.initial import MODEL, MOMENTUM, start_momentum
from cmtmae_scale.checkpoint.chunks import ChunkReader, fill_fragments, share_index
from cmtmae_scale.checkpoint.index import Located
from cmtmae_scale.checkpoint.init_weights import summarise_texts
from cmtmae_scale.checkpoint.layout import ENCODER, MANIFEST, read_state
from cmtmae_scale.config.changes import flatten
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.agreement import require_equal_weights
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.evaluation.saved import locate_checkpoint, saved_config
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.pretraining.channels import KEY as CHANNELS
from cmtmae_scale.pretraining.channels import TargetChannels
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.storage import read_inside

logger = logging.getLogger(__name__)

KEY = "student.init_from_run"
PRIOR_STEPS = "prior_steps"
"""Name of ``Task.prior_steps`` in the state of a checkpoint."""
FREE_KEYS = (
    *(KEY, "student.init_weights", "student.init_optimizer"),
    *("decoder.predict_ratio", "decoder.position_grid"),
)
"""Keys of student and decoder that may differ: no weight depends on them, or not on them alone."""
HEADS = r"teachers?\.|target\.|loss\.|collaboration\.alpha_target"
"""Keys on which shapes of the prediction heads depend."""
POSITIONS = f"{MODEL}encoder.pos_embed"
"""The student's one tensor whose shape depends on the image size."""
TARGETS = r"target\.|teachers?\.(\w+\.)?(library|model|weights|depth|feature|norm|layers)$"
"""Keys on which the targets themselves depend."""
NAMED = 6
"""Maximum number of differences that a message names."""


class Source(NamedTuple):
    """The checkpoint that a new run starts from."""

    folder: Path
    state: dict[str, Any]
    """Progress, statistics of the targets."""
    config: Config
    """Settings of its run."""
    tensors: dict[str, Located]
    """Where its tensors are, by name."""


def open_source(
    config: Config, model: CollaborativeMAE, world: World, hashes: bool = True
) -> Source:
    """Find and verify the checkpoint of ``student.init_from_run``. A collective.

    Args:
        config: checked settings of the new run.
        model: of the new run; only names and shapes are read.
        world: place of this process.
        hashes: read all bytes, each once over all ranks; otherwise only compare sizes and read
            small files.

    Raises:
        CheckpointError: no intact checkpoint.
        ConfigError: weights that do not fit the settings, or another checkpoint on another rank.
    """
    place = Path(str(config.student.init_from_run))
    folder = locate_checkpoint(place, world.rank, world.world_size, KEY, hashes)
    state = on_all_ranks(lambda: read_state(folder))
    if state["task"] != "pre-training":
        raise ConfigError(
            f"{KEY}={place} holds checkpoints of {state['task']}; name a run of pre-training"
        )
    manifest = on_all_ranks(lambda: read_inside(folder, folder / MANIFEST))
    require_equal_weights(lambda: {f"digest of {KEY}": hashlib.sha256(manifest).hexdigest()[:12]})
    source = Source(folder, state, saved_config(folder, state), share_index(folder))
    refuse_misfit(config, model, source)
    return source


def refuse_misfit(config: Config, model: CollaborativeMAE, source: Source) -> None:
    """Refuse a source whose student, decoder or heads differ from the configured model.

    Raises:
        ConfigError: names the keys with both values, or the tensors with both shapes.
    """
    found = list_differences(source.config, config, r"student\.|decoder\.")
    there, here = (position_side(one, model) for one in (source.config, config))
    if there != here and config.decoder.type != "none":
        found.append(
            f"decoder.position_grid: that run's positions are those of {there} x {there} patches, "
            f"this one's of {here} x {here}; decoder.position_grid={there} stretches them"
        )
    remedy = "set what that run has"
    if not any(text.startswith("student.") for text in found):
        remedy += (
            ", or start from its encoder alone with "
            f"{KEY}=null student.init_weights={source.folder / ENCODER}"
        )
    if not found:
        tensors = list_misfits(source.tensors, model)
        if not tensors:
            return
        found = [*list_differences(source.config, config, HEADS), *tensors]
    raise ConfigError(
        f"{KEY}={config.student.init_from_run} does not fit: {summarise_texts(found, NAMED)}; "
        f"{remedy}"
    )


def position_side(config: Config, model: CollaborativeMAE) -> int:
    """Return the side, in patches, of the grid of the decoder's positions."""
    return config.decoder.position_grid or config.views.image_size // model.encoder.patch_side


def list_differences(saved: Config, present: Config, pattern: str) -> list[str]:
    """Return the keys that match a pattern and differ, each with both values."""
    old, new = flatten(config_to_dict(saved)), flatten(config_to_dict(present))
    return [
        f"{key}: that run has {old.get(key)}, this one {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if re.match(pattern, key) and key not in FREE_KEYS and old.get(key) != new.get(key)
    ]


def list_misfits(index: dict[str, Located], model: CollaborativeMAE) -> list[str]:
    """Return tensors of student, decoder and heads that one run lacks or that differ in shape."""
    ours = {f"{MODEL}{name}": tuple(one.shape) for name, one in model.named_parameters()}
    theirs = {key: one.shape for key, one in index.items() if key.startswith(MODEL)}
    ours.pop(POSITIONS, None)
    theirs.pop(POSITIONS, None)
    return [
        f"{key.removeprefix(MODEL)}: that run has {list(theirs.get(key, ())) or 'none'}, this one "
        f"{list(ours.get(key, ())) or 'none'}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def load_source(
    config: Config,
    model: CollaborativeMAE,
    backend: Backend,
    channels: TargetChannels,
    source: Source,
) -> int:
    """Fill a backend before its first step from a source, by ranges. A collective.

    Positional embeddings of another grid are resampled by timm's function; rotary positions and
    those of the decoder are not weights. EMA weights that the source lacks start as a copy of the
    student.

    Args:
        config: settings of the new run.
        model: that of the backend; its grid is read.
        backend: before its first step.
        channels: statistics of the targets, before the first step.
        source: from ``open_source``.

    Returns:
        ``Task.prior_steps``.

    Raises:
        CheckpointError: on every rank, for tensors that cannot be read or are not finite, and for
            statistics that do not fit the targets.
    """
    fragments = backend.fragments()
    keeps = config.student.init_optimizer
    kinds = (MODEL, MOMENTUM, *(f"{moment}." for moment in MOMENTS if keeps))
    wanted = {
        key: own
        for key, own in fragments.items()
        if key.startswith(kinds) and key in source.tensors
    }
    here = model.encoder.grid
    there = source.config.views.image_size // model.encoder.patch_side
    resampled = [key for key, own in wanted.items() if source.tensors[key].shape != own.shape]

    def read(key: str, own: Fragment) -> Tensor:
        if key not in resampled:
            return reader.read_range(key, own)
        table = resample_abs_pos_embed(
            reader.read_tensor(key), list(here), [there, there], own.shape[1] - math.prod(here)
        )
        return table.flatten()[own.offset : own.offset + own.local.numel()]

    with ChunkReader(source.folder, source.tensors) as reader:
        found_bad = fill_fragments(wanted, read)
    if found_bad:
        raise CheckpointError(f"{source.folder}: {found_bad}; name an older checkpoint")
    if not any(key.startswith(MOMENTUM) for key in wanted):
        start_momentum(fragments)
    prior_steps = 0
    if keeps:
        prior_steps = source.state.get(PRIOR_STEPS, 0) + source.state["progress"]["applied"]
    backend.after_load(prior_steps)
    channels.restore(source.state)
    statistics = channels.running.keys() & source.state.get(CHANNELS, {}).keys()
    logger.info(
        "%s=%s, step %d: loaded: %s; resampled from %d x %d to %d x %d patches: %s; at initial "
        "values: %s; not used: %s; statistics of targets: %s",
        KEY,
        source.folder,
        source.state["progress"]["step"],
        count_kinds(wanted),
        *(there, there, *here),
        ", ".join(resampled) or "none",
        count_kinds(fragments.keys() - wanted),
        count_kinds(source.tensors.keys() - wanted),
        ", ".join(sorted(statistics)) or "none",
    )
    other = list_differences(source.config, config, TARGETS)
    if other:
        logger.warning("%s: its heads were trained on other targets: %s", KEY, "; ".join(other))
    return prior_steps


def count_kinds(keys: Iterable[str]) -> str:
    """Return the number of tensors of each kind: model, momentum, exp_avg, exp_avg_sq."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items())) or "none"
