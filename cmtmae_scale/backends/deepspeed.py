"""DeepSpeed ZeRO, stages 1 to 3, behind the same protocol as FSDP2.

The trainer's own AdamW updates ZeRO's flat float32 tensors; ``deepspeed_internals.py`` locates each
parameter within them.
"""

import io
import logging
import os
from contextlib import redirect_stdout
from typing import Any, cast

import deepspeed
import deepspeed.utils
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.backends.adamw import (
    MOMENTS,
    LrScale,
    make_adamw,
    set_lr,
    set_step,
    start_state,
    trainable,
    unscaled,
)
from cmtmae_scale.backends.base import (
    Accept,
    Blocked,
    Fragment,
    Meanwhile,
    Objective,
    Outcome,
    Terms,
    Work,
    acceptable,
    compile_blocks,
    detached,
    start_read,
)
from cmtmae_scale.backends.blockwise_momentum import BlockwiseMomentum
from cmtmae_scale.backends.deepspeed_internals import (
    flat_tensors,
    force_skipped_steps,
    locate_shards,
    renew_compute_copies,
)
from cmtmae_scale.backends.gathered_momentum import GatheredMomentum, Shard
from cmtmae_scale.backends.initial import ENCODER, materialise
from cmtmae_scale.config.schema import AdamWSettings
from cmtmae_scale.config.schema import Backend as BackendSettings
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.runtime.groups import world_group

TESTED = "0.19"
"""Minor version of DeepSpeed whose private names ``deepspeed_internals.py`` reads."""


class Zero:
    """ZeRO over all ranks of the default process group.

    Args:
        model: ``CollaborativeMAE`` or ``Classifier`` on the meta device.
        momentum_encoder: of ``model.encoder``'s shapes, on the meta device, or ``None``.
        objective: from predictions to losses, sums over rows.
        optimizer: AdamW's settings.
        settings: stage, precision, compilation.
        engine_config: DeepSpeed's config, from ``config/deepspeed.py``.
        loss_scale: factor of the summed loss: one over the rows of a step.
        device: this rank's device.
        lr_scale: factor of the learning rate of each parameter.

    Raises:
        ConfigError: if the installed version of DeepSpeed is not the tested version.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum_encoder: MomentumEncoder | None,
        objective: Objective,
        optimizer: AdamWSettings,
        settings: BackendSettings,
        engine_config: dict[str, Any],
        loss_scale: float,
        device: torch.device,
        lr_scale: LrScale = unscaled,
    ) -> None:
        check_version()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            # Otherwise the first launch compiles a shared-memory collective, which takes minutes.
            cast(Any, deepspeed.ops).__compatible_ops__ = {}
        # DeepSpeed reads the local rank from this variable only.
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        self.stage = settings.zero_stage
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.objective = objective
        # ZeRO averages gradients over ranks; the loss is a sum over all of them.
        self.loss_scale = loss_scale * dist.get_world_size()
        self.model = model
        self.shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
        compile_blocks(model, settings)
        if settings.compile and momentum_encoder is not None:
            momentum_encoder.compile(dynamic=False)
        for parameter in model.parameters():  # on the meta device; buffers keep their dtype
            parameter.data = parameter.data.to(self.dtype)
        if self.stage == 3:
            partition(model, device, engine_config)
            gather_by_block(model)
        else:
            materialise(model, device)
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use several times
            self.engine, self.optimizer, *_ = cast(
                tuple[Any, ...],
                deepspeed.initialize(
                    model=model,
                    optimizer=make_adamw(trainable(model), optimizer, lr_scale),
                    config=engine_config,
                    dist_init_required=False,
                ),
            )
        self.adamw = cast(torch.optim.AdamW, self.engine.basic_optimizer)
        start_state(self.adamw, flat_tensors(self.optimizer, self.stage))
        self.shards = locate_shards(self.optimizer, self.stage, trainable(model), dist.get_rank())
        # ZeRO keeps no float32 values of frozen parameters.
        self.frozen = {
            name: torch.zeros(shape, device=device)
            for name, shape in self.shapes.items()
            if name not in self.shards
        }
        self.has_gradients = False
        self.momentum = None
        if momentum_encoder is not None:
            self.shard_momentum(momentum_encoder, device)

    def shard_momentum(self, momentum_encoder: MomentumEncoder, device: torch.device) -> None:
        """Shard the EMA weights in float32 like the student's weights."""
        names = [name for name, _ in momentum_encoder.named_parameters()]
        self.averaged = [n for n in names if ENCODER + n in self.shards]
        frozen = [n for n in names if ENCODER + n in self.frozen]
        self.unaveraged = {n: self.frozen[ENCODER + n].clone() for n in frozen}
        ranges = {n: self.shards[ENCODER + n] for n in self.averaged}
        shards = [Shard(n, own.offset, own.length) for n, own in ranges.items()]
        ema_device = ranges[self.averaged[0]].flat.device
        encoder = momentum_encoder.to(self.dtype)
        if self.stage == 3:
            self.momentum = BlockwiseMomentum(encoder, shards, device, ema_device)
        else:
            self.momentum = GatheredMomentum(materialise(encoder, device), shards, ema_device)

    def micro(self, batch: Work, last: bool) -> Terms:
        """See ``Backend.micro``; stages 2 and 3 reduce gradients at every micro-step."""
        self.engine.set_gradient_accumulation_boundary(last)
        images, *others = batch.inputs
        predictions = self.engine(images.to(self.dtype), *others)
        losses = self.objective(predictions, batch)
        self.engine.backward(losses["total"] * self.loss_scale, scale_wrt_gas=False)
        self.has_gradients = True
        return detached(losses)

    def step(
        self,
        lr: float,
        report: Tensor,
        accept: Accept | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Outcome:
        """See ``Backend.step``; ZeRO needs a second host read, of the norm."""
        packed = report.clone()
        dist.all_reduce(packed)
        read_sums = start_read(packed)
        if meanwhile is not None:
            meanwhile()
        values = read_sums()
        if not acceptable(0.0, values, accept):
            return Outcome(self.drop_gradients(), False, values)
        set_lr(self.optimizer, lr)
        self.engine.step()
        self.has_gradients = False
        grad_norm = float(self.engine.get_global_grad_norm())
        return Outcome(grad_norm, self.engine.was_step_applied(), values)

    def discard(self) -> None:
        """See ``Backend.discard``; with gradients, call it only after the last micro-step."""
        if self.has_gradients:
            self.drop_gradients()

    def drop_gradients(self) -> float:
        """Let DeepSpeed skip a step; return the norm of the dropped gradients."""
        with force_skipped_steps(self.optimizer, self.stage) as norms:
            self.engine.step()
        self.has_gradients = False
        return float(norms[0]) if norms else float("inf")

    def momentum_update(self, momentum: float) -> None:
        """See ``Backend.momentum_update``; at stages 1 and 2 an all-gather in the compute dtype."""
        if self.momentum is not None:
            shards = (self.shards[ENCODER + name] for name in self.averaged)
            self.momentum.update([shard.view(shard.flat) for shard in shards], momentum)

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.momentum is None else self.momentum.forward(images)

    def fragments(self) -> dict[str, Fragment]:
        found: dict[str, Fragment] = {}
        for name, shape in self.shapes.items():
            shard = self.shards.get(name)
            if shard is None:
                found[f"model.{name}"] = self.replicated(self.frozen[name])
                continue
            state = self.adamw.state[shard.flat]
            tensors = {"model": shard.flat} | {moment: state[moment] for moment in MOMENTS}
            for kind, tensor in tensors.items():
                found[f"{kind}.{name}"] = Fragment(shard.offset, shape, shard.view(tensor), True)
        if self.momentum is not None:
            for name, view in zip(self.averaged, self.momentum.views, strict=True):
                found[f"momentum.{name}"] = found[f"model.{ENCODER}{name}"]._replace(local=view)
            for name, tensor in self.unaveraged.items():
                found[f"momentum.{name}"] = self.replicated(tensor)
        return found

    def replicated(self, tensor: Tensor) -> Fragment:
        """Return the fragment of a tensor that every rank holds and rank 0 writes."""
        is_first = dist.get_rank() == 0
        return Fragment(0, tuple(tensor.shape), tensor.view(-1), is_first, world_group())

    def after_load(self, step: int) -> None:
        set_step(self.adamw, step)
        self.engine.global_steps = step
        renew_compute_copies(self.optimizer, self.stage)
        self.renew_frozen()
        if self.momentum is not None:
            self.momentum.renew()

    @torch.no_grad()
    def renew_frozen(self) -> None:
        """Copy the frozen parameters into the modules."""
        for name, parameter in self.model.named_parameters():
            if name in self.frozen:
                shards = [parameter] if self.stage == 3 else []
                with deepspeed.zero.GatheredParameters(shards, modifier_rank=0):
                    parameter.copy_(self.frozen[name])
        if self.momentum is not None:
            for name, tensor in self.unaveraged.items():
                self.momentum.module.get_parameter(name).copy_(tensor)

    def close(self) -> None:
        self.engine.destroy()


def check_version() -> None:
    """Refuse a version of DeepSpeed whose private names were not tested.

    Raises:
        ConfigError: names both versions.
    """
    found = deepspeed.__version__
    if not found.startswith(f"{TESTED}."):
        raise ConfigError(
            f"backend.name=deepspeed: DeepSpeed {found} is installed, but weights are read through "
            f"private names of {TESTED}.*; install the extra deepspeed "
            "(pip install 'cmtmae-scale[deepspeed]'), or set backend.name=fsdp"
        )


def partition(model: nn.Module, device: torch.device, engine_config: dict[str, Any]) -> None:
    """Allocate a model of the meta device module by module, and keep stage 3's shards of each."""
    deepspeed.init_distributed(dist_init_required=False)
    for module in reversed(list(model.modules())):  # inner modules first
        materialise(module, device, recurse=False)
        if next(module.parameters(recurse=False), None) is not None:
            deepspeed.zero.Init(module=module, config_dict_or_path=engine_config)


def gather_by_block(model: nn.Module) -> None:
    """Make stage 3 gather each block as a whole and the other parameters with the model.

    Some parameters are used in the forward of another module than their own, which ZeRO does not
    detect.
    """
    within: set[int] = set()
    for block in cast(Blocked, model).transformer_blocks():
        deepspeed.utils.set_z3_leaf_module(block, True)
        within.update(id(parameter) for parameter in block.parameters())
    for parameter in model.parameters():
        if id(parameter) not in within:
            deepspeed.zero.register_external_parameter(model, parameter)
