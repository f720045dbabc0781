"""One process, no sharding, float32: the reference of the other backends' tests."""

import torch
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
    Fragment,
    Objective,
    Outcome,
    Terms,
    Work,
    acceptable,
    detached,
)
from cmtmae_scale.config.schema import AdamWSettings
from cmtmae_scale.method.momentum import update_momentum


class Plain:
    """Runs ordinary modules and AdamW.

    Args:
        model: ``CollaborativeMAE`` or ``Classifier``, on its device.
        momentum_encoder: initialised as a copy of ``model.encoder``, or ``None``.
        objective: from predictions to losses, sums over rows.
        optimizer: AdamW's settings.
        loss_scale: factor of the summed loss: one over the rows of a step.
        lr_scale: factor of the learning rate of each parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum_encoder: nn.Module | None,
        objective: Objective,
        optimizer: AdamWSettings,
        loss_scale: float,
        lr_scale: LrScale = unscaled,
    ) -> None:
        self.model = model
        self.momentum_encoder = momentum_encoder
        self.objective = objective
        self.clip = optimizer.grad_clip
        self.loss_scale = loss_scale
        self.optimizer = make_adamw(trainable(model), optimizer, lr_scale)
        start_state(self.optimizer, (parameter for _, parameter in trainable(model)))

    def micro(self, batch: Work, last: bool) -> Terms:
        """See ``Backend.micro``; ``last`` changes nothing in one process."""
        losses = self.objective(self.model(*batch.inputs), batch)
        (losses.total * self.loss_scale).backward()
        return detached(losses)

    def step(self, lr: float, report: Tensor, accept: Accept | None = None) -> Outcome:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        *values, grad_norm = torch.cat([report, norm.reshape(1)]).tolist()
        applied = acceptable(grad_norm, values, accept)
        if applied:
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.discard()
        return Outcome(grad_norm, applied, values)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def momentum_update(self, momentum: float) -> None:
        if self.momentum_encoder is not None:
            encoder = self.model.get_submodule("encoder")
            update_momentum(
                list(self.momentum_encoder.parameters()), list(encoder.parameters()), momentum
            )

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.momentum_encoder is None:
            return None, None
        with torch.no_grad():
            return self.momentum_encoder(images)

    def fragments(self) -> dict[str, Fragment]:
        """See ``Backend.fragments``; every fragment is a whole parameter."""
        found: dict[str, Fragment] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = whole_fragment(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                found[f"{moment}.{name}"] = whole_fragment(self.optimizer.state[parameter][moment])
        if self.momentum_encoder is not None:
            for name, parameter in self.momentum_encoder.named_parameters():
                found[f"momentum.{name}"] = whole_fragment(parameter)
        return found

    def after_load(self, step: int) -> None:
        set_step(self.optimizer, step)

    def close(self) -> None:
        pass


def whole_fragment(tensor: Tensor) -> Fragment:
    """Return the fragment that holds a whole tensor."""
    return Fragment(0, tuple(tensor.shape), tensor.detach().view(-1), True)
