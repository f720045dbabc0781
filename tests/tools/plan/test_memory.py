"""The estimate of the memory is compared with the bytes that tensors hold in a real step."""

from pathlib import Path

import pytest
import torch

from cmtmae_scale.api import pretrain
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.config.load import load_config
from cmtmae_scale.method.attend import attention_of_a_gpu
from cmtmae_scale.method.initialisation import initial_values
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark.collectives import REPORT
from cmtmae_scale.tools.estimate import build_meta_networks, make_synthetic_work, memory_bytes
from tests.engine.run_case import write_recipe
from tests.tools.plan.live_bytes import LiveBytes


def test_live_bytes_counts_each_storage_once_until_it_is_freed() -> None:
    held = torch.zeros(100)
    with LiveBytes([held]) as counted:
        product = held * 2.0
        view = product.view(10, 10)
        assert counted.live == 800
        del product
        assert counted.live == 800  # the view keeps the storage
        del view
        assert counted.live == 400 and counted.peak == 800


@pytest.mark.parametrize("changes", [["backend.precision=fp32"], ["backend.precision=bf16"]])
def test_the_estimate_is_the_measured_peak(changes: list[str], tmp_path: Path) -> None:
    views = 24
    recipe = write_recipe(tmp_path)
    batch = [f"train.micro_batch_size={views}", f"train.global_batch_size={2 * views}"]
    config = load_config(recipe, [*changes, *batch])
    networks = build_meta_networks(config)
    assert networks.teachers
    parts = memory_bytes(config, 1, networks)
    expected = sum(parts.values()) - parts["teacher"] - parts["input images"]
    model, momentum, _ = networks
    values = initial_values(model, 0)
    work, objective = make_synthetic_work(config, model, views)
    inputs = [work.valid, work.inputs[0], *work.inputs[1]]
    assert momentum is not None
    meta = [one for net in (model, momentum) for one in (*net.parameters(), *net.buffers())]
    with attention_of_a_gpu(), LiveBytes([], [*inputs, *meta]) as counted:
        world, cpu = World(0, 1, 0, 1, "none"), torch.device("cpu")
        backend = make_backend(config, world, cpu, model, momentum, objective, 2 * views)
        initialise_backend(backend, values)
        counted.peak = counted.live
        for last in (False, True):
            backend.micro(work, last)
        backend.step(1e-3, torch.zeros(REPORT))
        backend.momentum_update(0.9)
    assert expected == pytest.approx(counted.peak, rel=0.07)


def test_a_launch_models_the_memory_of_its_own_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``backend.sharding=hybrid`` shares the states among the ranks of a node, here 4 of 8."""
    batch = ["train.global_batch_size=16", "train.micro_batch_size=2"]
    config = load_config(write_recipe(tmp_path), ["backend.sharding=hybrid", *batch])
    networks = build_meta_networks(config)
    parts = {size: memory_bytes(config, 8, networks, size) for size in (4, 8)}
    assert parts[4]["weights, moments"] == 2 * parts[8]["weights, moments"]
    modelled: list[float] = []
    monkeypatch.setattr(pretrain, "run_task", lambda *given: modelled.append(given[-1]()) or 0)
    pretrain.train_rank(config, World(0, 8, 0, 4, "none"), "", [])
    assert modelled == [sum(parts[4].values())]
