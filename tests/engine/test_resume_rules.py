"""What may change when a run is resumed, what may with permission, and what never may."""

import copy
from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.changes import FREE_KEYS, compare_configs, flatten
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.load import config_to_dict, load_config
from cmtmae_scale.engine.progress import resumed_progress
from cmtmae_scale.engine.resume import compare_run, refuse_other_pairs, steps_left
from cmtmae_scale.errors import EXIT_CONFIG, ConfigError
from cmtmae_scale.pretraining.task import Pretraining
from tests.engine.run_case import STEPS, resume_each, write_recipe
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]
TREE = config_to_dict(load_config(ROOT / "configs" / "vit_base.yaml"))
KEYS = sorted(flatten(TREE))
SAME = ("digest", "digest")
ALL_FREE = FREE_KEYS + Pretraining.free_keys

# docs/checkpoints.md has the same list in words.
FREE = {
    *("run.name", "run.output_dir", "run.time_limit_s", "run.allow_change", "teacher.mode"),
    "run.deterministic",
    *("checkpoint.every", "checkpoint.keep", "checkpoint.background"),
    *(key for key in KEYS if key.startswith(("backend.", "cache.", "eval.", "guard.", "log."))),
    *("train.micro_batch_size", "train.stop_after"),
    *(
        "data.decode",
        "data.workers",
        "data.worker_type",
        "data.path",
        "data.index",
        "data.store_cache",
        "data.verify_index",
        "data.source",
        "data.resident",
    ),
    *("data.expected_images", "data.max_bad_fraction", "data.window_on_sorted"),
}
NEVER = {
    "run.seed",
    "views.image_size",
    "views.crop_scale",
    "views.aspect_ratio",
    "views.hflip",
    "views.views_per_image",
    "data.exif_orientation",
}


def changed(key: str, value: Any = "another") -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    *groups, name = key.split(".")
    owner = tree
    for group in groups:
        owner = owner[group]
    assert name in owner
    owner[name] = value
    return tree


def test_every_key_named_here_exists() -> None:
    assert set(KEYS) >= FREE | NEVER
    assert compare_configs(TREE, copy.deepcopy(TREE), [], SAME, ALL_FREE) == []


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_is_free_or_needs_permission_or_is_refused(key: str) -> None:
    tree = changed(key)
    before = flatten(TREE)[key]
    if key in FREE:
        assert compare_configs(TREE, tree, [], SAME, ALL_FREE) == []
        return
    with pytest.raises(ConfigError) as raised:
        compare_configs(TREE, tree, [], SAME, ALL_FREE)
    assert str(raised.value).startswith(f"{key}: the checkpoint has {before}, the config another; ")
    assert raised.value.exit_code == EXIT_CONFIG
    if key in NEVER:
        with pytest.raises(
            ConfigError, match=r"never changes within a run: use another run\.output_dir"
        ):
            compare_configs(TREE, tree, [key], SAME, ALL_FREE)
        return
    (line,) = compare_configs(TREE, tree, [key], SAME, ALL_FREE)
    assert (
        line
        == f"{key}: the checkpoint has {before}, the config another; from here on another applies"
    )


def test_other_images_are_refused_whatever_is_allowed() -> None:
    with pytest.raises(ConfigError, match="the images differ from the checkpoint's"):
        compare_configs(TREE, TREE, KEYS, ("a" * 64, "b" * 64), ALL_FREE)


def test_the_run_to_start_from_is_where_it_is_now() -> None:
    """A copied run's checkpoints name the folder of the machine that wrote them."""
    here = changed("run.output_dir", "/copied/run")
    with pytest.raises(ConfigError, match=r"student\.init_from_run=/copied/run to continue"):
        compare_configs(TREE, here, [], ("a" * 64, "b" * 64), ALL_FREE)


def test_a_checkpoint_without_the_orientation_key_resumes_unless_an_image_is_turned() -> None:
    older, other = copy.deepcopy(TREE), ("a" * 64, "b" * 64)
    del older["data"]["exif_orientation"]
    for value in (True, False):
        present = changed("data.exif_orientation", value)
        assert compare_configs(older, present, [], SAME, ALL_FREE) == []
        with pytest.raises(ConfigError, match="images differ from the checkpoint's") as raised:
            compare_configs(older, present, [], other, ALL_FREE)
        assert ("data.exif_orientation=false" in str(raised.value)) == value
    # The key that explains the other digest is named, not the images.
    with pytest.raises(ConfigError, match=r"^data\.exif_orientation: .*never changes"):
        compare_configs(TREE, changed("data.exif_orientation", False), [], other, ALL_FREE)


@pytest.mark.parametrize("group", ["teacher", "momentum"])
def test_a_checkpoint_without_a_precision_was_computed_without_fp8(group: str) -> None:
    older = copy.deepcopy(TREE)
    del older[group]["precision"]
    assert compare_configs(older, TREE, [], SAME, ALL_FREE) == []
    with pytest.raises(ConfigError, match=rf"^{group}\.precision: the checkpoint has bf16"):
        compare_configs(older, changed(f"{group}.precision", "fp8"), [], SAME, ALL_FREE)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("optimizer.betaz", "did you mean optimizer.betas"), ("optimizer", "optimizer is not a key")],
)
def test_a_permission_that_would_have_no_effect_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        compare_configs(TREE, TREE, [name], SAME, ALL_FREE)


def test_positions_count_anew_from_an_allowed_change() -> None:
    saved = {"step": 4, "position": 32, "step0": 0, "position0": 0, "applied": 4}
    saved |= {"end_step": 10, "horizon": 80}
    same = resumed_progress(saved, 3, 8, changed=False)
    assert same.to_dict() == saved
    other = resumed_progress(saved, 6, 16, changed=True)
    assert (other.step0, other.position0, other.horizon) == (4, 32, 32 + 6 * 16)
    other.advance(16, applied=True)
    assert (other.step, other.position) == (5, 48)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"epochs": 10.0}, {"epochs": 10.0}, 400),
        ({"epochs": 10.0}, {"epochs": 10.0, "global_batch_size": 512}, 200),
        ({"epochs": 10.0}, {"epochs": 10.0, "global_batch_size": 1024}, 100),
        ({"epochs": 10.0}, {"epochs": 10.0, "global_batch_size": 128}, 800),
        ({"epochs": 10.0}, {"epochs": 12.5}, 650),
        ({"epochs": 10.0}, {"epochs": 5.0}, 0),
        ({"epochs": 10.0}, {"steps": 700, "global_batch_size": 512}, 100),
        ({"steps": 1000}, {"epochs": 8.0}, 200),
        ({"steps": 1000}, {"steps": 500}, 0),
    ],
)
@pytest.mark.parametrize("rolled_back", [0, 50])
def test_the_steps_that_are_left_keep_the_length_of_the_run(
    before: dict[str, Any], now: dict[str, Any], expected: int, rolled_back: int
) -> None:
    """At step 600 of 1,000 steps of 256, an epoch of 25,600 images; some views were drawn twice."""
    config = load_config(ROOT / "configs" / "vit_base.yaml")
    defaults = {"epochs": None, "steps": None, "global_batch_size": 256}
    for key, value in (defaults | now).items():
        setattr(config.train, key, value)
    drawn = (600 + rolled_back) * 256
    progress = resumed_progress(
        {"step": 600, "position": drawn, "step0": 0, "position0": 0, "applied": 600}
        | {"end_step": 1000, "horizon": drawn + 400 * 256},
        *(0, 256, False),
    )
    saved = {"progress": progress.to_dict(), "config": {"train": defaults | before}}
    if "steps" in before and "epochs" in now:  # there the views drawn count
        expected -= rolled_back
    assert steps_left(config, 25_600, saved) == expected


@pytest.mark.parametrize("rolled_back", [0, 3])
@pytest.mark.parametrize(
    ("epochs", "batch", "step", "expected"),
    [(1.0, 4, 1, 2), (2.0, 4, 3, 2), (2.0, 4, 1, 4), (3.0, 4, 3, 5), (1.0, 2, 1, 3)],
)
def test_a_last_batch_beyond_an_epoch_is_counted_once(
    epochs: float, batch: int, step: int, expected: int, rolled_back: int
) -> None:
    """An epoch of 10 images is 3 steps of 4, and two are 5 steps, not 6."""
    config = load_config(ROOT / "configs" / "vit_base.yaml")
    config.train.epochs, config.train.steps, config.train.global_batch_size = epochs, None, batch
    drawn = (step + rolled_back) * 4
    progress = {"step": step, "position": drawn, "step0": 0, "position0": 0, "applied": step}
    progress |= {"end_step": 3, "horizon": drawn + (3 - step) * 4}
    train = {"epochs": 1.0, "steps": None, "global_batch_size": 4}
    assert steps_left(config, 10, {"progress": progress, "config": {"train": train}}) == expected


@pytest.mark.parametrize("key", ["student.arch", "student.width", "decoder.width"])
def test_no_permission_is_advised_that_cannot_work(key: str) -> None:
    config = load_config(ROOT / "configs" / "vit_base.yaml", ["run.allow_change=[mask.ratio]"])
    group, name = key.split(".")
    other = {"arch": "vit_large_patch16_224", "width": 768}[name]
    setattr(getattr(config, group), name, other)
    saved = {"task": "pre-training", "config": TREE, "index_digest": "digest"}
    names = ("pre-training", ALL_FREE, saved, "digest")
    with pytest.raises(ConfigError, match=r"do not fit: restore it, or use another") as raised:
        compare_run(config, *names)
    assert "allow_change" not in str(raised.value)
    config.run.allow_change = [key]
    with pytest.raises(ConfigError, match=rf"{key}: .*allow_change cannot make the weights"):
        compare_run(config, *names)
    with pytest.raises(ConfigError, match="holds checkpoints of fine-tuning"):
        compare_run(config, "pre-training", ALL_FREE, {**saved, "task": "fine-tuning"}, "digest")


def tuned(world_size: int, **train: int) -> dict[str, Any]:
    """State of a fine-tuning with 18 views per rank on 4 ranks, micro-batches of up to 6."""
    config = config_to_dict(Finetune())
    config["train"] |= {"global_batch_size": 72, "micro_batch_size": 6, **train}
    return {"config": config, "world_size": world_size}


def test_a_finetuning_keeps_its_pairs_on_other_ranks() -> None:
    config = Finetune()
    config.train.global_batch_size, config.train.micro_batch_size = 72, 6
    for ranks in (1, 2, 4, 6, 12):  # each takes micro-batches of 6
        refuse_other_pairs(config, batch_plan(config, ranks), tuned(4))
    refuse_other_pairs(config, batch_plan(config, 9), None)
    with pytest.raises(
        ConfigError, match=r"4 ranks had micro-batches of 6 views, 9 ranks have 4.*on 4 ranks"
    ):
        refuse_other_pairs(config, batch_plan(config, 9), tuned(4))
    with pytest.raises(ConfigError) as raised:
        refuse_other_pairs(config, batch_plan(config, 9), tuned(4))
    assert str(raised.value).endswith(
        "or set train.micro_batch_size=4 and run.allow_change=[train.micro_batch_size], which "
        "pairs other views"
    )
    refuse_other_pairs(config, batch_plan(config, 9), tuned(4, micro_batch_size=4))  # allowed
    config.augment.mixup = config.augment.cutmix = 0
    refuse_other_pairs(config, batch_plan(config, 9), tuned(4))


WAYS: dict[str, list[str]] = {
    "free": [
        *("run.name=other", "log.every=2", "checkpoint.every=5", "checkpoint.keep=1"),
        *(
            "train.micro_batch_size=4",
            "data.workers=1",
            "backend.sharding=replicate",
            "data.max_bad_fraction=0.5",
        ),
    ],
    "refused": ["optimizer.betas=[0.5, 0.6]"],
    "allowed": ["optimizer.betas=[0.5, 0.6]", "run.allow_change=[optimizer.betas]"],
    "batch": ["train.global_batch_size=16", "run.allow_change=[train.global_batch_size]"],
    "views": ["views.crop_scale=[0.5, 1.0]", "run.allow_change=[views.crop_scale]"],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any, list[str]]]:
    recipe = write_recipe(tmp_path_factory.mktemp("resume"), depth=2)
    first = ["train.stop_after=2"]
    small = "train.global_batch_size=8: an epoch of 20 images has 2.5 batches"  # is warned about
    (found,) = run_ranks(1, resume_each, recipe, first, list(WAYS.values()))
    return {
        way: (error, state, [text for text in warnings if not text.startswith(small)])
        for way, (error, state, warnings) in zip(WAYS, found, strict=True)
    }


@pytest.mark.gloo
def test_a_run_continues_with_free_keys_changed(resumed: dict[str, Any]) -> None:
    error, state, warnings = resumed["free"]
    assert (error, warnings) == ("", [])
    assert state["progress"]["step"] == STEPS
    assert (state["progress"]["step0"], state["progress"]["position0"]) == (0, 0)
    assert state["config"]["run"]["name"] == "other"


@pytest.mark.gloo
def test_a_run_refuses_other_optimizer_settings(resumed: dict[str, Any]) -> None:
    error, state, _ = resumed["refused"]
    assert error.startswith(f"{EXIT_CONFIG} optimizer.betas: the checkpoint has [0.9, 0.95]")
    assert "add it to run.allow_change" in error
    assert state["progress"]["step"] == 2


@pytest.mark.gloo
def test_with_permission_the_configs_optimizer_settings_win_and_are_told(
    resumed: dict[str, Any],
) -> None:
    error, state, warnings = resumed["allowed"]
    assert error == ""
    assert warnings == [
        "allowed change: optimizer.betas: the checkpoint has [0.9, 0.95], the config [0.5, 0.6]; "
        "from here on [0.5, 0.6] applies"
    ]
    assert (state["progress"]["step0"], state["progress"]["position0"]) == (2, 16)
    assert state["config"]["optimizer"]["betas"] == [0.5, 0.6]


@pytest.mark.gloo
def test_another_batch_continues_at_the_same_position(resumed: dict[str, Any]) -> None:
    error, state, _ = resumed["batch"]
    assert error == ""
    assert state["progress"]["position"] == 2 * 8 + (STEPS - 2) * 16


@pytest.mark.gloo
def test_other_views_are_refused_even_with_permission(resumed: dict[str, Any]) -> None:
    error, state, _ = resumed["views"]
    assert error.startswith(f"{EXIT_CONFIG} views.crop_scale: the checkpoint has [0.2, 1.0]")
    assert "never changes" in error
    assert state["progress"]["step"] == 2
