"""The same training as ``backend_case`` in the plainest torch: one whole batch, own optimizer."""

import copy
from typing import Any

import torch
import torch.nn.functional as F


def adamw(params: Any, state: dict, lr: float, t: int, decay: dict) -> None:
    for name, p in params:
        if p.grad is None:
            continue
        m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m.mul_(0.9).add_(p.grad, alpha=0.1)
        v.mul_(0.95).add_(p.grad * p.grad, alpha=0.05)
        p.mul_(1 - lr * decay[name])
        p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))


def train(
    model: Any,
    average: Any,
    views: Any,
    choose: Any,
    steps: int,
    batch: int,
    masks: int,
    alpha: float,
) -> tuple[list[tuple[float, float]], dict, dict]:
    """``views(positions)`` gives inputs, ``choose(attention, positions)`` the masks."""
    model, average = copy.deepcopy(model), copy.deepcopy(average)
    state: dict = {}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = {n: 0.05 if p.ndim >= 2 and not n.endswith("_token") else 0.0 for n, p in named}
    curve = []
    for step in range(steps):
        positions = list(range(step * batch, (step + 1) * batch))
        images, attention, features, valid = views(positions)
        with torch.no_grad():
            own_features, own_attention = average(images)
        mixed = 0.5 * attention / attention.sum(1, keepdim=True) + 0.5 * own_attention
        choice = choose(mixed, positions)
        prediction = model(images, choice)
        total = torch.zeros(())
        for row in range(batch * masks):
            view = row // masks
            if not valid[view]:
                continue
            order = [0] + [1 + int(i) for i in (*choice.ids_keep[row], *choice.ids_hidden[row])]
            teacher = F.normalize(features[view, order], dim=-1)
            own = F.layer_norm(own_features[view, order], own_features.shape[-1:], eps=1e-6)
            one = 2 - 2 * F.cosine_similarity(prediction["teacher"][row], teacher, dim=-1)
            two = 2 - 2 * F.cosine_similarity(prediction["student"][row], own, dim=-1)
            total = total + alpha * one.mean() + (1 - alpha) * two.mean()
        loss = total / (batch * masks)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for _, p in named if p.grad is not None))
        with torch.no_grad():
            for _, p in named:
                if p.grad is not None:
                    p.grad.mul_(min(1.0, 0.3 / (float(norm) + 1e-6)))
            adamw(named, state, 2e-3 * min(1.0, (step + 1) / 4), step + 1, decay)
            for a, p in zip(average.parameters(), model.encoder.parameters(), strict=True):
                a.copy_(0.9 * a + 0.1 * p)
        for _, p in named:
            p.grad = None
        curve.append((float(loss.detach()), float(norm)))
    return curve, dict(model.named_parameters()), dict(average.named_parameters())
