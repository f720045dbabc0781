"""Build the backend that the config names."""

import os
from importlib.util import find_spec

import torch
from torch import nn

from cmtmae_scale.backends.adamw import LrScale, unscaled
from cmtmae_scale.backends.base import Backend, Objective
from cmtmae_scale.backends.fsdp import Fsdp
from cmtmae_scale.backends.plain import Plain
from cmtmae_scale.backends.traffic import warn_of_latency
from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.deepspeed import deepspeed_config
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.runtime.launch import World


def make_backend(
    config: Trained,
    world: World,
    device: torch.device,
    model: nn.Module,
    momentum_encoder: MomentumEncoder | None,
    objective: Objective,
    rows: int,
    lr_scale: LrScale = unscaled,
) -> Backend:
    """Build FSDP2 or DeepSpeed ZeRO around a model and its momentum encoder.

    With one rank ``backend.name=fsdp`` has nothing to shard or to reduce, and uses plain modules.

    Args:
        config: checked settings.
        world: this process's rank and world size.
        device: this rank's device.
        model: ``Blocked``, on the meta device.
        momentum_encoder: of ``model.encoder``'s shapes, on the meta device, or ``None``.
        objective: from predictions to losses, sums over rows.
        rows: constant number of rows per step, over all ranks.
        lr_scale: factor of the learning rate of each parameter.

    Returns:
        A backend whose weights have no values yet: ``initialise_backend``, or a checkpoint with
        ``after_load``, sets them.

    Raises:
        ConfigError: if the backend is not installed, or the ranks do not fit its sharding.
    """
    loss_scale = 1.0 / rows
    if config.backend.name == "fsdp" and world.world_size == 1:
        return Plain(
            model,
            momentum_encoder,
            objective,
            config.optimizer,
            config.backend,
            loss_scale,
            device,
            lr_scale,
        )
    if world.rank == 0:
        warn_of_latency(config, model, momentum_encoder, world.world_size)
    if config.backend.name == "fsdp":
        return Fsdp(
            model,
            momentum_encoder,
            objective,
            config.optimizer,
            config.backend,
            loss_scale,
            device,
            world.local_world_size,
            lr_scale,
        )
    refuse_missing_deepspeed()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it finds none
    from cmtmae_scale.backends.deepspeed import Zero  # an optional package, slow to import

    plan = batch_plan(config, world.world_size)
    return Zero(
        model,
        momentum_encoder,
        objective,
        config.optimizer,
        config.backend,
        deepspeed_config(config, plan.accumulation, plan.micro_batch_size),
        loss_scale,
        device,
        lr_scale,
    )


def refuse_missing_deepspeed() -> None:
    """Refuse ``backend.name=deepspeed`` where DeepSpeed is not installed.

    Raises:
        ConfigError: names the extra.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "backend.name=deepspeed, but DeepSpeed is not installed; install the extra deepspeed "
            "(pip install 'cmtmae-scale[deepspeed]'), or set backend.name=fsdp"
        )
