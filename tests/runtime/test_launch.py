import pytest

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.launch import find_world

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
}


def test_nothing_set_is_one_process() -> None:
    assert find_world({}) == (0, 1, 0, 1, "alone")


def test_torchrun() -> None:
    assert find_world(TORCHRUN) == (3, 4, 1, 2, "torchrun")


def test_deepspeed_names_the_local_size_differently() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    assert find_world(given) == (0, 2, 0, 2, "deepspeed")


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_incomplete_environment_is_named(absent: str) -> None:
    given = {key: value for key, value in TORCHRUN.items() if key != absent}
    with pytest.raises(ConfigError, match="start with torchrun or unset RANK"):
        find_world(given)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        find_world(TORCHRUN | {"LOCAL_RANK": "2"})
