"""``--dry-run``: batch, parameters, FLOPs, memory and resumption of a run, without running it.

Counts come from meta tensors; no memory is allocated and no image is read.
"""

from pathlib import Path

import yaml
from torch import nn

from cmtmae_scale.checkpoint import layout as checkpoints
from cmtmae_scale.config.derive import (
    batch_plan,
    builds_teacher,
    cache_folder,
    peak_lr,
    reads_cache,
    total_steps,
)
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.resume import FREE_KEYS, compare_configs
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.tools.estimate import build_meta_networks, count_flops, count_shards, memory_bytes
from dataloading.errors import DataError
from dataloading.index import load_or_build

GIB = 2**30


def render_dry_run(config: Config, world_size: int) -> str:
    """Return the text of ``--dry-run``.

    Raises:
        ConfigError: settings that cannot work.
    """
    plan = batch_plan(config, world_size)
    images, origin = count_images(config)
    networks = build_meta_networks(config)
    model, _, teacher = networks
    flops = count_flops(config, networks)
    lines = [yaml.safe_dump(config_to_dict(config), sort_keys=False)]
    lines.append(f"images          {images if images is not None else 'unknown'} ({origin})")
    if images is not None or config.train.steps is not None:
        lines.append(f"steps           {total_steps(config, images or 1)}")
    lines.append(f"batch           {plan}")
    lines.append(
        f"learning rate   {peak_lr(config):.3g} = {config.optimizer.base_lr:g} base x "
        f"{config.train.global_batch_size} views / 256"
    )
    lines.append(f"encoder         {format_millions(model.encoder)} parameters")
    lines.append(f"decoder         {format_millions(model.decoder)} parameters")
    lines.append(f"heads           {format_millions(model.heads)} parameters")
    if teacher is not None:
        origin = f", read from {cache_folder(config)}" if reads_cache(config) else ""
        origin += "" if builds_teacher(config) else " and not built"
        lines.append(f"teacher         {format_millions(teacher.model)} parameters, frozen{origin}")
    lines.append(
        f"GFLOP per view  student {flops.student / 1e9:.1f} (forward and backward), "
        f"momentum {flops.momentum / 1e9:.1f}, teacher {flops.teacher / 1e9:.1f} (2 per MAC)"
    )
    memory = memory_bytes(config, world_size, networks)
    lines += [f"memory per GPU  {name:<17}{size / GIB:8.2f} GiB" for name, size in memory.items()]
    shards = count_shards(config, world_size).states
    lines.append(
        f"memory per GPU  {'at the peak':<17}{sum(memory.values()) / GIB:8.2f} GiB (modelled, "
        f"{shards} shards; states exact, activations of the eager student)"
    )
    lines.append(f"would resume    {resumed_checkpoint(config)}")
    return "\n".join(lines)


def count_images(config: Config) -> tuple[int | None, str]:
    """Return the number of images from an existing index or from the recipe, and its source."""
    folder = Path(config.data.index) if config.data.index else Path(config.run.output_dir) / "index"
    if folder.is_dir():
        try:
            data = config.data
            index = load_or_build(
                data.path, folder, data.source, data.max_pixels, data.exif_orientation
            )
        except DataError as error:
            if config.data.expected_images is None:
                return None, str(error)
        else:
            return len(index), f"counted in {config.data.path}"
    if config.data.expected_images is not None:
        return config.data.expected_images, "data.expected_images; not counted"
    return None, f"{config.data.path} has no index yet and data.expected_images is not given"


def resumed_checkpoint(config: Config) -> str:
    """Name the checkpoint that the run would resume, or the reason for a new run.

    Files are compared by size only, and images are not compared.
    """
    for folder in checkpoints.list_checkpoints(Path(config.run.output_dir) / "checkpoints"):
        if checkpoints.find_damage(folder, (-1, 1)) is None:
            state = checkpoints.read_state(folder)
            name = f"{folder} (step {state['progress']['step']})"
            free, allowed = FREE_KEYS + Pretraining.free_keys, config.run.allow_change
            try:
                compare_configs(state["config"], config_to_dict(config), allowed, ("", ""), free)
            except ConfigError as error:
                return f"nothing: {name} would be refused: {error}"
            return name
    return "nothing: a new run"


def format_millions(module: nn.Module) -> str:
    """Format the number of parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
