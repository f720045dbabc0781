"""Initial values are written into shards alone, and do not depend on the sharding."""

import pytest
import torch
from torch import Tensor, nn

from cmtmae_scale.backends.initial import initialise_backend, materialise
from cmtmae_scale.method import initialisation
from cmtmae_scale.method.initialisation import initial_values, initialise, write_range
from cmtmae_scale.tools.benchmark.collectives import fake_group
from tests.backends import backend_case as case
from tests.tools.plan.live_bytes import LiveBytes

CPU = torch.device("cpu")


def reference(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Matrices and tokens as torch's own functions draw them, whole, one after another."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            whole = torch.empty(part.weight.shape)
            nn.init.xavier_uniform_(whole.flatten(1), generator=generator)
            found[f"{name}.weight"] = whole
        for token in ("cls_token", "mask_token"):
            if token in part._parameters:
                whole = torch.empty(part.get_parameter(token).shape)
                found[f"{name}.{token}"] = whole.normal_(std=0.02, generator=generator)
    return found


def test_values_of_any_ranges_are_those_of_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = case.make_models(case.make_config())
    expected = reference(model, 3)
    initialise(model, 3)
    whole = dict(model.named_parameters())
    assert expected.keys() == {n for n in whole if n in expected}
    for name, value in expected.items():
        assert torch.equal(whole[name], value), name
    monkeypatch.setattr(initialisation, "PIECE", 1000)
    for offset in (0, 1, 999, 1500):
        for name, pieces in initial_values(model.to("meta"), 3):
            flat = whole[name].detach().flatten()[offset : offset + 2100]
            local = torch.full_like(flat, torch.nan)
            write_range(pieces, offset, local)
            assert torch.equal(local, flat), name


def test_a_rank_allocates_little_more_than_its_shards() -> None:
    config = case.make_config()
    with fake_group(8), LiveBytes([]) as counted:
        model, momentum = (one.to("meta") for one in case.make_models(config))
        values = initial_values(model, 0)
        config.backend.sharding = "full"
        counted.live = counted.peak = 0
        shared = (model, momentum, None, config.optimizer, config.backend)
        backend = case.Fsdp(*shared, 1.0, CPU, 8)  # pyright: ignore
        initialise_backend(backend, values)
    shards = sum(own.local.nbytes for own in backend.fragments().values())
    assert shards < counted.peak < 1.5 * shards


def test_what_has_no_rule_is_refused() -> None:
    backend = case.make_backend(case.make_config(), "plain")
    with pytest.raises(ValueError, match=r"for \d+ parameters, first model\.decoder\.blocks\.0\."):
        initialise_backend(backend, [])
    with pytest.raises(TypeError, match=r"no rule to compute running_mean, .* of 0"):
        materialise(nn.Sequential(nn.BatchNorm1d(2)), CPU)
