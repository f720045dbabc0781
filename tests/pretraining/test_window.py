"""A run uses the windowed order where the images suit it, and refuses it elsewhere."""

from pathlib import Path

import pytest
import torch

from cmtmae_scale.config.changes import FREE_KEYS, compare_configs
from cmtmae_scale.config.load import config_to_dict, load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.pretraining.build import open_index, open_stream
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.order import window_ids
from tests.engine.run_case import write_recipe

ALONE = World(0, 1, 0, 1, "none")
ALL_FREE = FREE_KEYS + Pretraining.free_keys
WINDOW = ["data.shuffle=window"]
FORCED = [*WINDOW, "data.window_on_sorted=true"]


def config_of(folder: Path, overrides: list[str]) -> Config:
    return load_config(write_recipe(folder), overrides)


def test_class_folders_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"photos: sorted by class.*cmtmae check-data .* --pack OUT"
    ):
        open_index(config_of(tmp_path, WINDOW), tmp_path)


def test_a_forced_run_draws_in_windows(tmp_path: Path) -> None:
    config = config_of(tmp_path, FORCED)
    index = open_index(config, tmp_path)
    with open_stream(config, index, ALONE, torch.device("cpu"), {}, 0) as stream:
        drawn = [draw for _ in range(20) for draw in next(stream).sample_id.tolist()]
    assert drawn == window_ids(20, config.run.seed, range(40))[0].tolist()


def test_forcing_what_is_not_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"window_on_sorted=true belongs to data\.shuffle=window"):
        config_of(tmp_path, ["data.window_on_sorted=true"])


def test_the_order_never_changes_silently_within_a_run(tmp_path: Path) -> None:
    full, window, forced = (
        config_to_dict(config_of(tmp_path, overrides)) for overrides in ([], WINDOW, FORCED)
    )
    with pytest.raises(ConfigError, match=r"data\.shuffle: the checkpoint has full"):
        compare_configs(full, window, [], ("d", "d"), ALL_FREE)
    assert compare_configs(window, forced, [], ("d", "d"), ALL_FREE) == []  # the same draws
