"""Runs with several teachers: online, cached, resumed; names in logs, weights and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.api.attention import attention_maps
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.commands.dry_run import dry_run
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.teachers import entry_errors, teacher_configs
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.evaluation.foreground import maps_of_subject
from cmtmae_scale.evaluation.saved import locate_checkpoint
from cmtmae_scale.evaluation.subject import open_encoder
from cmtmae_scale.export.card import teacher_rows
from cmtmae_scale.export.full import build_full
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.tools.report.page import render_page
from cmtmae_scale.tools.report.run import read_run
from tests.engine.run_case import read_log, same, tensors
from tests.pretraining.several_case import STEPS, same_as_single, try_modes, try_more, write_several
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
Runs = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("several")
    (found,) = run_ranks(1, try_modes, write_several(folder), timeout_s=300)
    return folder, found


@pytest.fixture(scope="module")
def more(runs: Runs) -> Runs:
    (found,) = run_ranks(1, try_more, runs[0] / "recipe.yaml", timeout_s=300)
    return runs[0], runs[1] | found


def losses(runs: Runs, name: str, term: str = "total") -> list[float]:
    return [entry[f"loss/{term}"] for entry in runs[1][name].log if "loss/total" in entry]


def test_each_teacher_has_a_term_a_head_and_statistics(runs: Runs) -> None:
    folder, found = runs
    for entry in found["online"].log:
        if "loss/total" in entry:
            first, second = entry["loss/teacher_first"], entry["loss/teacher_second"]
            assert entry["loss/teacher"] == pytest.approx((first + 0.5 * second) / 1.5, rel=1e-5)
            mix = 0.7 * entry["loss/teacher"] + 0.3 * entry["loss/student"]
            assert entry["loss/total"] == pytest.approx(mix, rel=1e-5)
            assert -1 <= entry["attention/teacher_agreement"] <= 1 and "cache/hit" not in entry
    state = tensors(folder / "online", STEPS)
    assert "model.heads.teacher.weight" not in state
    heads = {name: state[f"model.heads.teacher_{name}.weight"] for name in ("first", "second")}
    assert all(len(head) == 64 for head in heads.values())
    (checkpoint,) = layout.list_checkpoints(folder / "online" / "checkpoints")
    assert [*layout.read_state(checkpoint)["target_channels"]] == ["teacher_second"]


def test_each_term_takes_part_in_the_diagnostics(runs: Runs) -> None:
    (measured,) = [e for e in runs[1]["online"].log if "diagnostics/gradient/student" in e]
    shares = {k: v for k, v in measured.items() if k.startswith("diagnostics/gradient/")}
    names = ("teacher_first", "teacher_second", "student")
    assert [*shares] == [f"diagnostics/gradient/{name}" for name in names]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0.01


def test_cached_teachers_equal_online_teachers_that_are_rounded_alike(runs: Runs) -> None:
    folder, found = runs
    assert found["codes"] == [0, 0]
    assert {path.name for path in (folder / "exact").iterdir()} >= {"first", "second"}
    assert_same(runs, "rounded", "cached")


def assert_same(runs: Runs, online: str, read: str) -> None:
    """Assert that masks, losses and weights of two runs are equal, and that all rows were read."""
    folder, found = runs
    one, two = found[online], found[read]
    assert (one.error, two.error) == ("", "") and one.masks == two.masks
    same(folder / online, folder / read, STEPS)
    assert losses(runs, online) == losses(runs, read)
    assert [entry["cache/hit"] for entry in two.log if "loss/total" in entry] == [1.0] * STEPS


@pytest.mark.slow
def test_sidecars_of_both_teachers_compute_the_same(more: Runs) -> None:
    assert_same(more, "rounded", "sidecar")


@pytest.mark.slow
def test_one_teacher_may_be_cached_and_the_other_online(more: Runs) -> None:
    """Within the rounding of int8, as for a single teacher in ``test_cached_runs.py``."""
    found = losses(more, "mixed")
    assert len(found) == STEPS and found == pytest.approx(losses(more, "online"), rel=0.005)
    assert found != losses(more, "online")
    assert all(e["cache/hit"] == 1 for e in more[1]["mixed"].log if "loss/total" in e)


@pytest.mark.slow
def test_a_missing_row_names_the_teacher(more: Runs) -> None:
    folder = more[0] / "small" / "second"
    assert f": teachers.second.cache_dir={folder}: row " in more[1]["missing"].error


@pytest.mark.slow
def test_a_resumed_run_continues_statistics_and_may_change_a_mode(more: Runs) -> None:
    """The first teacher is read from a cache of bf16 after the resume, in the last step."""
    assert more[1]["resumed"].error == ""
    assert losses(more, "resumed", "teacher_second")[-1] == pytest.approx(
        losses(more, "online", "teacher_second")[-1], rel=1e-4
    )
    assert losses(more, "resumed")[-1] == pytest.approx(losses(more, "online")[-1], rel=1e-3)


def test_a_teacher_that_fails_is_named(runs: Runs) -> None:
    assert runs[1]["failure"].startswith(
        "step 1 was not taken: the output of teachers.second.model=test_vit is not finite on "
        "ranks 0, for samples "
    )
    assert runs[1]["failure"].endswith("use other teachers.second.weights in another run")


def test_warnings_of_a_teacher_name_its_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(write_several(tmp_path))
    alone = teacher_configs(config)["second"]
    with entry_errors("second"):
        build_teacher(alone, "cpu", torch.float32)
    text = "\n".join(caplog.messages)
    assert "teachers.second.weights=random: the teacher is untrained" in text
    assert "teachers.second.image_size=96 gives a grid of 6x6" in text
    assert "remove teachers.second.image_size" in text
    caplog.clear()
    build_teacher(alone, "cpu", torch.float32)
    text = "\n".join(caplog.messages)
    assert "teacher.weights=random" in text and "teachers." not in text


def test_a_sheet_of_figures_is_drawn(runs: Runs) -> None:
    assert list((runs[0] / "online" / "figures").glob("*.png"))


def test_one_entry_computes_what_the_single_form_computes(tmp_path: Path) -> None:
    ((several, single),) = run_ranks(1, same_as_single, tmp_path)
    renamed = {
        key.replace("heads.teacher_first.", "heads.teacher."): value
        for key, value in tensors(several, STEPS).items()
    }
    expected = tensors(single, STEPS)
    assert renamed.keys() == expected.keys()
    assert all(bool((renamed[key] == value).all()) for key, value in expected.items())
    terms = [[e["loss/teacher"] for e in read_log(place)] for place in (several, single)]
    assert terms[0] == terms[1]
    assert "attention/teacher_agreement" not in json.dumps(read_log(several))


@pytest.mark.slow
def test_a_dry_run_counts_all_teachers(tmp_path: Path) -> None:
    text, _ = dry_run(load_config(write_several(tmp_path)), World(0, 1, 0, 1, "none"))
    assert "teacher first   0." in text and "teacher second  0." in text
    assert "would not start" not in text


def test_card_export_report_and_api_know_all_teachers(runs: Runs) -> None:
    run_dir = runs[0] / "online"
    config = load_config(run_dir / "config.yaml")
    rows = teacher_rows(config, needs(config))
    assert [*rows] == ["teacher first", "teacher second"]
    assert all(text.startswith("RANDOM WEIGHTS") for text in rows.values())
    assert rows["teacher second"].endswith(
        "weight 2 among the attention maps, 0.5 among the losses of the teachers"
    )
    state = {
        key.removeprefix("model."): value
        for key, value in tensors(run_dir, STEPS).items()
        if key.startswith("model.")
    }
    assert build_full(config, state, "here").heads.keys() >= {"teacher_first", "teacher_second"}
    del state["heads.teacher_second.weight"]
    with pytest.raises(CheckpointError, match="differ: teacher_widths lacks teacher_second, "):
        build_full(config, state, "here")
    page = render_page([read_run(run_dir)])
    assert "first: test_vit of timm (RANDOM WEIGHTS), online; second: " in page
    assert "teacher second" in page and "several teachers, mean over pairs" in page
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    maps = attention_maps(run_dir, views, device="cpu")
    first, second = maps.teachers["first"], maps.teachers["second"]
    assert maps.teacher is not None and maps.momentum is not None
    torch.testing.assert_close(maps.teacher, (first + 2 * second) / 3)
    torch.testing.assert_close(maps.mixed, (maps.teacher + maps.momentum) / 2)


def test_evaluation_takes_one_teacher_by_name_and_compares_the_maps_of_all(runs: Runs) -> None:
    cpu, folder = torch.device("cpu"), locate_checkpoint(runs[0] / "online")
    subject = open_encoder(folder, "teacher:second", cpu)
    assert (subject.encoder.name, subject.encoder.size) == ("teacher test_vit (random)", 96)
    for weights in ("teacher", "teacher:third"):
        with pytest.raises(ConfigError, match="give --weights teacher:NAME, NAME one of first, se"):
            open_encoder(folder, weights, cpu)
    maps = maps_of_subject(open_encoder(folder, "momentum", cpu), cpu)
    names = ("teacher first", "teacher second", "mixed, alpha 0.5")
    assert maps.names[-3:] == names and maps.sizes == (64, 64, 96)
    views = (torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8) for side in maps.sizes)
    found = maps.compute(tuple(views))
    mean = (found[names[0]] + 2 * found[names[1]]) / 3
    torch.testing.assert_close(found[names[2]], (mean + found[maps.names[0]]) / 2)
