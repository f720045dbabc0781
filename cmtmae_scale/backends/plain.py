"""One process with all weights: the backend of a single rank, and the reference of the tests."""

from typing import cast

import torch
from torch import Tensor, nn

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


class Plain:
    """Runs ordinary modules; the weights that AdamW updates are float32.

    With ``backend.precision=bf16`` the modules hold bf16 copies of them, and gradients are summed
    over micro-steps in float32, which gives the same bits as FSDP2 without its hooks.

    Args:
        model: ``CollaborativeMAE`` or ``Classifier`` on the meta device.
        momentum_encoder: of ``model.encoder``'s shapes, on the meta device, or ``None``.
        objective: from predictions to losses, sums over rows.
        optimizer: AdamW's settings.
        settings: precision and compilation.
        loss_scale: factor of the summed loss: one over the rows of a step.
        device: this rank's device.
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
        lr_scale: LrScale = unscaled,
    ) -> None:
        self.model = materialise(model, device)
        self.objective = objective
        self.clip = optimizer.grad_clip
        self.loss_scale = loss_scale
        self.dtype = compute_dtype(settings)
        weights = dict(model.named_parameters())
        self.computed: list[Tensor] = [one for _, one in trainable(model)]
        if self.dtype != torch.float32:
            weights |= {name: nn.Parameter(one.detach().clone()) for name, one in trainable(model)}
            for parameter in self.computed:
                parameter.data = parameter.data.to(self.dtype)
        self.own = {name: weights[name] for name, _ in trainable(model)}
        compile_blocks(model, settings)
        self.optimizer = make_adamw(self.own.items(), optimizer, lr_scale)
        start_state(self.optimizer, self.own.values())
        self.found = {f"model.{name}": whole_fragment(one) for name, one in weights.items()}
        for name, parameter in self.own.items():
            for moment in MOMENTS:
                state = self.optimizer.state[parameter][moment]
                self.found[f"{moment}.{name}"] = whole_fragment(state)
        self.momentum: GatheredMomentum | None = None
        if momentum_encoder is not None:
            if settings.compile:
                momentum_encoder.compile(dynamic=False)
            names = [name for name, _ in momentum_encoder.named_parameters()]
            self.encoder = [self.found[f"model.encoder.{name}"].local for name in names]
            shards = [Shard(n, 0, one.numel()) for n, one in zip(names, self.encoder, strict=True)]
            module = materialise(momentum_encoder.to(self.dtype), device)
            self.momentum = GatheredMomentum(module, shards, device)
            for name, view in zip(names, self.momentum.views, strict=True):
                whole = self.found[f"model.encoder.{name}"]
                self.found[f"momentum.{name}"] = whole._replace(local=view)

    def micro(self, batch: Work, last: bool) -> Terms:
        """See ``Backend.micro``; ``last`` changes nothing in one process."""
        images, *others = batch.inputs
        losses = self.objective(self.model(images.to(self.dtype), *others), batch)
        (losses["total"] * self.loss_scale).backward()
        if self.dtype != torch.float32:
            self.add_gradients()
        return detached(losses)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of the compute dtype to those of the float32 weights."""
        pairs = zip(self.own.values(), self.computed, strict=True)
        used = [(weight, one) for weight, one in pairs if one.grad is not None]
        gradients = [cast(Tensor, one.grad) for _, one in used]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(wide, gradients)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        sums: list[tuple[Tensor, Tensor]] = []
        for (weight, one), gradient in zip(used, wide, strict=True):
            one.grad = None
            if weight.grad is None:
                weight.grad = gradient
            else:
                sums.append((weight.grad, gradient))
        if sums:
            torch._foreach_add_(*map(list, zip(*sums, strict=True)))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]

    def step(
        self,
        lr: float,
        report: Tensor,
        accept: Accept | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Outcome:
        parameters = list(self.own.values())
        outcome = take_step(self.optimizer, parameters, self.clip, lr, report, accept, meanwhile)
        self.discard()
        if outcome.applied:
            self.renew()
        return outcome

    @torch.no_grad()
    def renew(self) -> None:
        """Copy the float32 weights into the weights that the forward uses."""
        if self.dtype != torch.float32:
            torch._foreach_copy_(self.computed, list(self.own.values()))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.computed:
            parameter.grad = None

    def momentum_update(self, momentum: float) -> None:
        if self.momentum is not None:
            self.momentum.update(self.encoder, momentum)

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.momentum is None else self.momentum.forward(images)

    def fragments(self) -> dict[str, Fragment]:
        """See ``Backend.fragments``; every fragment is a whole tensor."""
        return dict(self.found)

    def after_load(self, step: int) -> None:
        set_step(self.optimizer, step)
        self.renew()
        if self.momentum is not None:
            self.momentum.renew()

    def close(self) -> None:
        pass


def whole_fragment(tensor: Tensor) -> Fragment:
    """Return the fragment that holds a whole tensor."""
    return Fragment(0, tuple(tensor.shape), tensor.detach().view(-1), True)
