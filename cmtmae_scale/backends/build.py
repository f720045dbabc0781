"""The backend that a config names."""

import os
from importlib.util import find_spec

import torch

from cmtmae_scale.backends.base import Backend, Objective
from cmtmae_scale.backends.fsdp import Fsdp
from cmtmae_scale.config.deepspeed import deepspeed_config
from cmtmae_scale.config.derive import batch_plan
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumStudent
from cmtmae_scale.runtime.launch import World


def make_backend(
    config: Config,
    world: World,
    device: torch.device,
    model: CollaborativeMAE,
    momentum_student: MomentumStudent | None,
    objective: Objective,
) -> Backend:
    """Hand student and momentum student to FSDP2 or ZeRO.

    Args:
        config: checked settings.
        world: this process's place.
        device: this rank's device.
        model: on the CPU, the same values on every rank.
        momentum_student: started as a copy of ``model.encoder``, or ``None``.
        objective: from predictions to losses.

    Raises:
        ConfigError: if the backend is not installed or cannot be laid out over the ranks.
    """
    # One over the constant number of rows of a step.
    loss_scale = 1.0 / (config.train.global_batch * config.mask.masks_per_view)
    if config.backend.name == "fsdp":
        return Fsdp(
            model,
            momentum_student,
            objective,
            config.optimizer,
            config.backend,
            loss_scale,
            device,
            world.local_world_size,
        )
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "backend.name=zero, but DeepSpeed is not installed; install the extra deepspeed, or "
            "set backend.name=fsdp"
        )
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for one and warn
    from cmtmae_scale.backends.zero import Zero  # takes seconds, and is not always there

    return Zero(
        model,
        momentum_student,
        objective,
        config.optimizer,
        config.backend,
        deepspeed_config(config, batch_plan(config, world.world_size).accumulation),
        loss_scale,
        device,
    )
