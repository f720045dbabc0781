"""FSDP2: weights, moments and EMA weights as float32 shards, computed in bf16 or fp32."""

from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cmtmae_scale.backends.adamw import (
    MOMENTS,
    LrScale,
    make_adamw,
    set_step,
    start_state,
    take_step,
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
    compile_blocks,
    compute_dtype,
    detached,
)
from cmtmae_scale.backends.gathered_momentum import GatheredMomentum, Shard
from cmtmae_scale.backends.initial import materialise
from cmtmae_scale.config.schema import AdamWSettings
from cmtmae_scale.config.schema import Backend as BackendSettings
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.momentum import update_momentum
from cmtmae_scale.runtime.groups import make_grid, world_group

BLOCKS_PER_GROUP = 4
"""Blocks that are gathered and reduced together where weights stay gathered after the forward."""


class Fsdp:
    """FSDP2 over all ranks of the default process group.

    Args:
        model: ``CollaborativeMAE`` or ``Classifier`` on the meta device.
        momentum_encoder: of ``model.encoder``'s shapes, on the meta device, or ``None``.
        objective: from predictions to losses, sums over rows.
        optimizer: AdamW's settings.
        settings: precision, sharding, compilation, activation checkpointing.
        loss_scale: factor of the summed loss: one over the rows of a step.
        device: this rank's device.
        local_world_size: ranks on this node.
        lr_scale: factor of the learning rate of each parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum_encoder: nn.Module | None,
        objective: Objective,
        optimizer: AdamWSettings,
        settings: BackendSettings,
        loss_scale: float,
        device: torch.device,
        local_world_size: int,
        lr_scale: LrScale = unscaled,
    ) -> None:
        self.mesh = make_mesh(settings.sharding, device, local_world_size)
        # Mesh look-ups are slow.
        names = self.mesh.mesh_dim_names or ()
        self.num_shards = self.mesh["shard"].size()
        self.shard_rank = self.mesh.get_local_rank("shard")
        self.writes = "replicate" not in names or self.mesh.get_local_rank("replicate") == 0
        self.copies = self.mesh.get_group("replicate") if "replicate" in names else None
        self.num_copies = self.mesh.size() // self.num_shards
        self.is_full = settings.sharding == "full"
        self.reduces_always = settings.reduce_every_micro_step
        self.model = wrap(model, self.mesh, settings, device)
        self.units = find_units(self.model)
        self.objective = objective
        self.clip = optimizer.grad_clip
        # FSDP2 averages gradients over ranks; the loss is a sum over all of them.
        self.loss_scale = loss_scale * dist.get_world_size()
        # The optimizer updates this rank's shards as plain tensors: with DTensors each of several
        # hundred parameters would need a dispatch of its own while the device waits.
        self.found = {f"model.{n}": self.fragment(p) for n, p in self.model.named_parameters()}
        self.sharded = dict(trainable(self.model))
        self.own = {
            name: nn.Parameter(local_shard(parameter)) for name, parameter in self.sharded.items()
        }
        self.optimizer = make_adamw(self.own.items(), optimizer, lr_scale)
        start_state(self.optimizer, self.own.values())
        for name, parameter in self.own.items():
            for moment in MOMENTS:
                local = self.optimizer.state[parameter][moment].view(-1)
                self.found[f"{moment}.{name}"] = self.found[f"model.{name}"]._replace(local=local)
        self.momentum = None
        if momentum_encoder is not None:
            self.shard_momentum(momentum_encoder, settings, device)

    def shard_momentum(
        self, encoder: nn.Module, settings: BackendSettings, device: torch.device
    ) -> None:
        """Shard the EMA weights in float32 like the student's weights."""
        names = [name for name, _ in encoder.named_parameters()]
        like = [self.found[f"model.encoder.{name}"] for name in names]
        self.encoder = [weights.local for weights in like]
        if settings.sharding == "full":
            self.momentum = ShardedMomentum(encoder, self.mesh, settings, device)
        else:
            if settings.compile:
                encoder.compile(dynamic=False)
            self.momentum = GatheredMomentum(
                materialise(encoder.to(compute_dtype(settings)), device),
                [Shard(n, w.offset, w.local.numel()) for n, w in zip(names, like, strict=True)],
                device,
                self.mesh.get_group("shard"),
            )
        for name, weights, view in zip(names, like, self.momentum.views, strict=True):
            self.found[f"momentum.{name}"] = weights._replace(local=view)

    def micro(self, batch: Work, last: bool) -> Terms:
        """See ``Backend.micro``; communicates gradients at the last micro-step only.

        With ``reduce_every_micro_step`` they are scattered at each, and all-reduced over the copies
        of the shards at the last. Except with ``sharding=full`` weights are gathered once per step.
        """
        reduces = last or self.reduces_always
        for unit in self.units:  # a recursive call would visit every module
            unit.set_requires_gradient_sync(reduces, recurse=False)
            unit.set_requires_all_reduce(last, recurse=False)
            unit.set_reshard_after_backward(last or self.is_full, recurse=False)
        cast(FSDPModule, self.model).set_is_last_backward(reduces)
        losses = self.objective(self.model(*batch.inputs), batch)
        (losses["total"] * self.loss_scale).backward()
        return detached(losses)

    def step(
        self,
        lr: float,
        report: Tensor,
        accept: Accept | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Outcome:
        with torch.no_grad():  # or autograd records to_local()
            for name, parameter in self.sharded.items():
                gradient = cast(DTensor | None, parameter.grad)
                self.own[name].grad = None if gradient is None else gradient.to_local()
        own, copies = list(self.own.values()), self.num_copies
        outcome = take_step(self.optimizer, own, self.clip, lr, report, accept, meanwhile, copies)
        self.discard()
        return outcome

    def discard(self) -> None:
        for name, parameter in self.sharded.items():
            parameter.grad = self.own[name].grad = None

    def momentum_update(self, momentum: float) -> None:
        """See ``Backend.momentum_update``; communicates within the group of shards alone."""
        if self.momentum is not None:
            self.momentum.update(self.encoder, momentum)

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.momentum is None else self.momentum.forward(images)

    def fragments(self) -> dict[str, Fragment]:
        """See ``Backend.fragments``; a fragment is a range of a parameter's first dimension."""
        return dict(self.found)

    def fragment(self, parameter: Tensor) -> Fragment:
        """Locate this rank's shard within the flattened parameter."""
        local = local_shard(parameter).view(-1)
        if not isinstance(parameter, DTensor):
            owner = self.writes and not self.shard_rank
            return Fragment(0, tuple(parameter.shape), local, owner, world_group())
        rows_per_rank = -(-parameter.shape[0] // self.num_shards)
        row_size = parameter.numel() // parameter.shape[0]
        offset = min(self.shard_rank * rows_per_rank, parameter.shape[0]) * row_size
        return Fragment(offset, tuple(parameter.shape), local, self.writes, self.copies)

    def after_load(self, step: int) -> None:
        set_step(self.optimizer, step)
        # After a forward without a backward the gathered weights still have their old values.
        reshard(self.units)
        if self.momentum is not None:
            self.momentum.renew()

    def close(self) -> None:
        pass


class ShardedMomentum:
    """Momentum encoder of ``backend.sharding=full``, gathered block by block in its forward.

    Args:
        encoder: the momentum encoder, on the meta device.
        mesh: the student's mesh.
        settings: precision and compilation.
        device: this rank's device.
    """

    def __init__(
        self, encoder: nn.Module, mesh: DeviceMesh, settings: BackendSettings, device: torch.device
    ) -> None:
        self.module = wrap(encoder, mesh, settings, device)
        self.units = find_units(self.module)
        self.views = [local_shard(one).view(-1) for one in self.module.parameters()]
        """This rank's float32 EMA weights."""

    def update(self, weights: list[Tensor], momentum: float) -> None:
        """Update this rank's shards; no communication."""
        # Only a backward would drop gathered weights, which the next forward would use again.
        self.renew()
        update_momentum(self.views, weights, momentum)

    def renew(self) -> None:
        """Drop gathered weights, so that the next forward gathers them again."""
        reshard(self.units)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(images)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or a whole tensor, without gradient."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def find_units(module: nn.Module) -> list[FSDPModule]:
    """Return the parts of a module that FSDP2 gathers as a whole."""
    return [one for one in module.modules() if isinstance(one, FSDPModule)]


def reshard(units: list[FSDPModule]) -> None:
    """Drop gathered weights."""
    for unit in units:
        unit.reshard()


def ranks_per_shard_group(sharding: str, world_size: int, local_world_size: int) -> int:
    """Return the number of ranks that share one copy of the weights.

    Raises:
        ConfigError: if the nodes of ``hybrid`` do not have the same number of ranks.
    """
    if sharding == "full":
        return world_size
    inner = 1 if sharding == "replicate" else local_world_size
    if world_size % inner:
        raise ConfigError(
            f"backend.sharding=hybrid: {world_size} ranks do not divide into nodes of {inner}; "
            "launch the same number of ranks on each node, or use backend.sharding=full"
        )
    return inner


def make_mesh(sharding: str, device: torch.device, local_world_size: int) -> DeviceMesh:
    """Build the device mesh for ``backend.sharding``.

    ``replicate``: every rank holds all weights; ``hybrid``: sharded within a node, replicated
    across nodes; ``full``: sharded over all ranks.
    """
    world_size = dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    inner = ranks_per_shard_group(sharding, world_size, local_world_size)
    return make_grid(device.type, world_size // inner, inner)


def wrap(
    module: nn.Module, mesh: DeviceMesh, settings: BackendSettings, device: torch.device
) -> nn.Module:
    """Shard groups of blocks of a module, then its other parameters; allocate the shards.

    Blocks are compiled after the model sets up activation checkpointing, and before sharding.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(settings), reduce_dtype=torch.float32, cast_forward_inputs=True
    )
    tokens = replace(policy, cast_forward_inputs=False)  # rotary positions stay float32
    reshard = settings.sharding == "full"
    fixed = fixed_positions(module)
    compile_blocks(module, settings)
    blocks = cast(Blocked, module).transformer_blocks()
    size = 1 if reshard else BLOCKS_PER_GROUP
    for i in range(0, len(blocks), size):
        group = blocks[i : i + size]
        fully_shard(group, mesh=mesh, mp_policy=tokens, reshard_after_forward=reshard)
    fully_shard(
        module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=fixed
    )
    return materialise(module, device)


def fixed_positions(module: nn.Module) -> set[nn.Parameter]:
    """Return the frozen positional embeddings, ``[1, N, D]``, which every rank holds whole.

    FSDP2 shards the first dimension, and would pad them to N x D values per rank.
    """
    return {
        parameter
        for name, parameter in module.named_parameters()
        if name.endswith("pos_embed") and not parameter.requires_grad
    }
