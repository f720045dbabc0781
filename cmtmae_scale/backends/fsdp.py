"""FSDP2: weights, moments and EMA weights as float32 shards, computed in bf16 or fp32."""

from collections.abc import Iterator
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
    Objective,
    Outcome,
    Terms,
    Work,
    acceptable,
    detached,
)
from cmtmae_scale.config.schema import AdamWSettings
from cmtmae_scale.config.schema import Backend as BackendSettings
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.momentum import update_momentum


class Fsdp:
    """FSDP2 over all ranks of the default process group.

    Args:
        model: ``CollaborativeMAE`` or ``Classifier`` on the CPU, the same values on every rank.
        momentum_encoder: initialised as a copy of ``model.encoder``, or ``None``.
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
        self.model = wrap(model, self.mesh, settings)
        self.momentum_encoder = momentum_encoder
        if momentum_encoder is not None:
            self.momentum_encoder = wrap(momentum_encoder, self.mesh, settings)
        self.objective = objective
        self.clip = optimizer.grad_clip
        # FSDP2 averages gradients over ranks; the loss is a sum over all of them.
        self.loss_scale = loss_scale * dist.get_world_size()
        # The optimizer updates this rank's shards as plain tensors: with DTensors each of some
        # hundred parameters would cost a dispatch of its own while the device waits.
        self.own = {
            name: nn.Parameter(cast(DTensor, one).to_local().detach())
            for name, one in trainable(self.model)
        }
        # Mesh look-ups are slow, and fragments() would repeat them for every tensor.
        names = self.mesh.mesh_dim_names or ()
        self.num_shards = self.mesh["shard"].size()
        self.shard_rank = self.mesh.get_local_rank("shard")
        self.writes = "replicate" not in names or self.mesh.get_local_rank("replicate") == 0
        self.num_copies = self.mesh.size() // self.num_shards
        self.optimizer = make_adamw(self.own.items(), optimizer, lr_scale)
        start_state(self.optimizer, self.own.values())

    def micro(self, batch: Work, last: bool) -> Terms:
        """See ``Backend.micro``; communicates gradients at the last micro-step only."""
        module = cast(FSDPModule, self.model)
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
        losses = self.objective(self.model(*batch.inputs), batch)
        (losses.total * self.loss_scale).backward()
        return detached(losses)

    def step(self, lr: float, report: Tensor, accept: Accept | None = None) -> Outcome:
        for name, parameter in trainable(self.model):
            gradient = cast(DTensor | None, parameter.grad)
            self.own[name].grad = None if gradient is None else gradient.to_local()
        norm = nn.utils.get_total_norm([p.grad for p in self.own.values() if p.grad is not None])
        # One collective and one host read: replicas hold the same gradients, each counted once.
        packed = torch.cat([report, norm.square().reshape(1) / self.num_copies])
        dist.all_reduce(packed)
        *values, squared = packed.tolist()
        grad_norm = squared**0.5
        applied = acceptable(grad_norm, values, accept)
        if applied:
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(self.own.values(), self.clip, packed[-1].sqrt())
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.discard()
        return Outcome(grad_norm, applied, values)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def momentum_update(self, momentum: float) -> None:
        """See ``Backend.momentum_update``; local shards only, no communication."""
        if self.momentum_encoder is not None:
            # Only a backward would drop the gathered weights, which hide the shards: without this
            # line the next forward would still use the old EMA weights.
            self.reshard_momentum()
            encoder = self.model.get_submodule("encoder")
            update_momentum(list(shards(self.momentum_encoder)), list(shards(encoder)), momentum)

    def reshard_momentum(self) -> None:
        """Drop the momentum encoder's gathered weights, so that its next forward gathers anew."""
        if self.momentum_encoder is not None:
            for module in self.momentum_encoder.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.momentum_encoder is None:
            return None, None
        with torch.no_grad():
            return self.momentum_encoder(images)

    def fragments(self) -> dict[str, Fragment]:
        """See ``Backend.fragments``; a fragment is a range of a parameter's first dimension."""
        # After a forward without a backward the parameters are still the gathered weights.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.reshard_momentum()
        found: dict[str, Fragment] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = self.fragment(parameter)
            for moment in MOMENTS if name in self.own else ():
                state = self.optimizer.state[self.own[name]][moment]
                found[f"{moment}.{name}"] = self.fragment(parameter)._replace(local=state.view(-1))
        if self.momentum_encoder is not None:
            for name, parameter in self.momentum_encoder.named_parameters():
                found[f"momentum.{name}"] = self.fragment(parameter)
        return found

    def fragment(self, parameter: Tensor) -> Fragment:
        """Locate this rank's shard within the flattened parameter."""
        if not isinstance(parameter, DTensor):
            raise TypeError("a parameter was not sharded; please report this")
        rows_per_rank = -(-parameter.shape[0] // self.num_shards)
        row_size = parameter.numel() // parameter.shape[0]
        offset = min(self.shard_rank * rows_per_rank, parameter.shape[0]) * row_size
        local = parameter.to_local().detach().view(-1)
        return Fragment(offset, tuple(parameter.shape), local, self.writes)

    def after_load(self, step: int) -> None:
        set_step(self.optimizer, step)
        self.reshard_momentum()

    def close(self) -> None:
        pass


def shards(module: nn.Module) -> Iterator[Tensor]:
    """Return this rank's shard of every parameter."""
    return (cast(DTensor, parameter).to_local() for parameter in module.parameters())


def ranks_per_shard_group(sharding: str, world_size: int, local_world_size: int) -> int:
    """Return the number of ranks that share one copy of the weights.

    Raises:
        ConfigError: if the nodes of ``hybrid`` do not have equally many ranks.
    """
    if sharding == "full":
        return world_size
    inner = 1 if sharding == "replicate" else local_world_size
    if world_size % inner:
        raise ConfigError(
            f"backend.sharding=hybrid: {world_size} ranks do not divide into nodes of {inner}; "
            "launch equally many ranks on each node, or use backend.sharding=full"
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
    return init_device_mesh(
        device.type, (world_size // inner, inner), mesh_dim_names=("replicate", "shard")
    )


def wrap(module: nn.Module, mesh: DeviceMesh, settings: BackendSettings) -> nn.Module:
    """Shard each block of a module, then its other parameters.

    Compilation comes after activation checkpointing, which is the model's own, and before sharding.
    """
    compute = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=True
    )
    reshard = settings.sharding == "full"
    for block in cast(Blocked, module).transformer_blocks():
        if settings.compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return cast(
        nn.Module, fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    )
