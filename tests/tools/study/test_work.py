"""From a study file to runs: their order, their names, and which results are missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmtmae_scale.commands.study import list_missing
from cmtmae_scale.config import load
from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.config.load import config_to_dict, load_config, save_config
from cmtmae_scale.config.teachers import pick_teacher
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.study import work
from cmtmae_scale.tools.study.file import load_study
from cmtmae_scale.tools.study.work import Run, plan_runs, short_digest
from tests.tools.study.study_case import NO_TEACHER, hits_of, put_results, study_tree, write_study

ROOT = Path(__file__).resolve().parents[3]
LARGEST = ("first", "cpu", "cpu_finetune", "cpu_no_decoder")
"""The studies with the most rows."""


def runs_of(folder: Path, **changes: Any) -> list[Run]:
    return plan_runs(load_study(write_study(folder, study_tree(folder) | changes)))


def kinds(run: Run) -> list[str]:
    return [job.kind for job in run.missing()]


def test_a_recipe_that_stops_early_is_refused(tmp_path: Path) -> None:
    """The second launch of such a run ends with 0, and its weights would be evaluated."""
    tree = study_tree(tmp_path)
    recipe = Path(tree["recipe"])
    recipe.write_text(recipe.read_text().replace("train:\n", "train:\n  stop_after: 2\n"))
    with pytest.raises(ConfigError, match=r"train.stop_after=2: .* remove the key"):
        plan_runs(load_study(write_study(tmp_path, tree)))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGEST else [], id=path.stem)
        for path in sorted((ROOT / "configs/studies").iterdir())
    ],
)
def test_every_row_of_a_study_that_is_shipped_can_be_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    runs = plan_runs(study)
    assert {run.row for run in runs} == set(study.rows)
    first_seeds = {run.row: run for run in reversed(runs)}
    for run in first_seeds.values():
        for job in run.jobs:
            if job.kind in ("train", "cache"):
                load_config(job.arguments[4], job.arguments[5:])


def test_the_folders_of_a_study_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is added belongs in ``ADDED``: otherwise every study would train again."""
    monkeypatch.chdir(ROOT)
    runs = plan_runs(load_study("configs/studies/cpu.yaml"))
    names = [[run.row, run.seed, run.folder.name, run.config.cache.dir] for run in runs]
    assert short_digest(names) == "7ea01abe7750"


def test_a_long_chain_of_rows_is_one_file_read_and_one_count_per_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than Python's recursion limit."""
    rows: dict[str, Any] = {"r0": {"settings": ["teacher.mode=cached"]}}
    rows |= {f"r{k}": {"like": f"r{k - 1}"} for k in range(1, 1200)}
    study = load_study(
        write_study(tmp_path, study_tree(tmp_path) | {"rows": rows, "comparisons": []})
    )
    assert study.settings_of("r1199") == [*study.settings, "teacher.mode=cached"]
    study.rows = {name: study.rows[name] for name in list(study.rows)[:20]}
    reads: list[Any] = []
    real = load.read_yaml
    monkeypatch.setattr(load, "read_yaml", lambda *given: reads.append(given) or real(*given))
    counts: list[Path] = []
    monkeypatch.setattr(work, "is_complete", lambda cache: counts.append(cache) or False)
    runs = plan_runs(study)
    assert len(runs) == 40 and len(reads) == 1
    text = list_missing(runs)
    assert text.endswith("40 of 40 runs are incomplete\n") and text.count("precompute") == 40
    assert len(counts) == len(set(counts)) == 2  # one per seed


def test_neighbours_with_the_same_seeds_go_seed_by_seed(tmp_path: Path) -> None:
    order = [(run.row, run.seed) for run in runs_of(tmp_path)]
    assert order == [("mae", 0), ("cmt", 0), ("mae", 1), ("cmt", 1), ("half", 0)]


def test_the_first_run_carries_the_baselines_and_the_first_teacher_its_own_probe(
    tmp_path: Path,
) -> None:
    runs = runs_of(tmp_path)
    with_baselines = [
        run.row + str(run.seed)
        for run in runs
        if any("--no-baselines" not in p.arguments for p in run.jobs if p.kind == "evaluate")
    ]
    assert with_baselines == ["mae0"]
    assert [run.row + str(run.seed) for run in runs if run.teacher] == ["cmt0"]
    assert kinds(runs[0]) == ["train", "evaluate", "evaluate"]
    assert kinds(runs[1]) == ["cache", "train", "evaluate", "evaluate", "evaluate"]


def test_a_command_trains_what_the_row_says(tmp_path: Path) -> None:
    half = runs_of(tmp_path)[-1]
    words = next(job for job in half.jobs if job.kind == "train").arguments
    assert words[:4] == ("-m", "cmtmae_scale", "pretrain", "--config")
    config = load_config(words[4], words[5:])
    assert config == half.config
    assert (config.mask.ratio, config.train.steps, config.run.seed) == (0.5, 4, 0)
    assert config.run.output_dir == str(half.folder) and config.run.name == "half-0"
    assert Path(str(config.cache.dir)).parent == tmp_path / "study" / "caches"


def test_runs_are_named_by_what_they_compute(tmp_path: Path) -> None:
    """Logging settings do not count, others do; equal settings are one run."""
    before = runs_of(tmp_path)
    assert len({run.folder for run in before}) == len(before)
    quiet = runs_of(tmp_path, settings=["train.steps=4", "views.views_per_image=1", "log.every=3"])
    assert [run.folder for run in quiet] == [run.folder for run in before]
    longer = runs_of(tmp_path, settings=["train.steps=5", "views.views_per_image=1"])
    assert not {run.folder for run in longer} & {run.folder for run in before}
    twins = {"a": {"settings": ["mask.ratio=0.75"]}, "b": {}}
    a, b = runs_of(tmp_path, rows=twins, seeds=[0], comparisons=[])
    assert a.folder == b.folder


def test_a_run_is_found_again_though_its_folder_is_named_by_fewer_keys(tmp_path: Path) -> None:
    """As after an update that added a key: another digest, equal settings."""
    alone: dict[str, Any] = {"rows": {"mae": {"settings": NO_TEACHER}}, "seeds": [0]}
    alone["comparisons"] = []
    (run,) = runs_of(tmp_path, **alone)
    older = tmp_path / "study" / "runs" / "older"
    older.mkdir(parents=True)
    save_config(run.config, older / "config.yaml")
    assert [one.folder for one in runs_of(tmp_path, **alone)] == [older]
    (longer,) = runs_of(tmp_path, **alone, settings=["train.steps=5"])
    assert longer.folder not in (older, run.folder)
    (older / "config.yaml").write_text("train: {stepss: 4}\n")
    assert [one.folder for one in runs_of(tmp_path, **alone)] == [run.folder]


def test_a_cache_is_not_computed_again_for_weights_that_exist(tmp_path: Path) -> None:
    run = runs_of(tmp_path)[1]
    run.folder.mkdir(parents=True)
    (run.folder / "exit.json").write_text(json.dumps({"code": 0}))
    assert kinds(run) == ["evaluate"] * 3


def test_the_weights_of_one_study_are_fine_tuned_by_another(tmp_path: Path) -> None:
    """Same folder, same runs; the initial weights are a row that trains nothing of its own."""
    tree = study_tree(tmp_path)
    rows = {"mae": tree["rows"]["mae"], "random": {"like": "mae", "weights": "random"}}
    evaluation = tree["evaluation"] | {"finetune": "configs/finetune_tiny.yaml"}
    before = runs_of(tmp_path)[0]
    mae, random, *_ = runs_of(tmp_path, rows=rows, evaluation=evaluation, comparisons=[])
    assert mae.folder == random.folder == before.folder
    assert len({mae.tuned, random.tuned, None}) == 3 and mae.linear != random.linear
    words = random.jobs[-1].arguments
    assert words[2:5] == ("finetune", "--config", "configs/finetune_tiny.yaml")
    assert load_finetune(words[4], [word for word in words[5:] if "=" in word]).run.seed == 0
    assert words[words.index("--weights") + 1] == "random"
    assert words[words.index("--checkpoint") + 1] == str(mae.folder)


def test_a_result_of_another_fine_tuning_recipe_is_refused(tmp_path: Path) -> None:
    """The folder is named by the recipe's name, and the recipe may have been changed since."""
    recipe = tmp_path / "tune.yaml"
    text = Path("configs/finetune_tiny.yaml").read_text()
    recipe.write_text(text)
    tree = study_tree(tmp_path)
    evaluation = tree["evaluation"] | {"finetune": str(recipe)}
    run = runs_of(tmp_path, evaluation=evaluation)[0]
    settings = config_to_dict(load_finetune(recipe, [f"run.seed={run.seed}", "log.every=3"]))
    assert run.tuned is not None and not run.jobs[-1].done()
    run.tuned.parent.mkdir(parents=True)
    run.tuned.write_text(json.dumps({"settings": settings, "results": []}))
    assert run.jobs[-1].done()
    recipe.write_text(text.replace("base_lr: 5.0e-3", "base_lr: 1.0e-3"))
    same = runs_of(tmp_path, evaluation=evaluation)[0]
    assert same.tuned == run.tuned
    with pytest.raises(ConfigError, match=r"has optimizer.base_lr=0.005, and .*tune.yaml has 0"):
        same.jobs[-1].done()
    del settings["optimizer"]["base_lr"]  # as of a version without the key
    run.tuned.write_text(json.dumps({"settings": settings, "results": []}))
    assert same.jobs[-1].done()


def test_weights_that_a_run_does_not_have_are_refused_before_it_trains(tmp_path: Path) -> None:
    """MAE has no momentum encoder; its row may name other weights than the study."""
    tree = study_tree(tmp_path)
    evaluation, mae = tree["evaluation"] | {"weights": "momentum"}, tree["rows"]["mae"]
    with pytest.raises(ConfigError, match=r"rows.mae: .* no momentum encoder.* weights: student"):
        runs_of(tmp_path, evaluation=evaluation)
    rows = tree["rows"] | {"mae": mae | {"weights": "student"}}
    words = [run.jobs[2].arguments for run in runs_of(tmp_path, evaluation=evaluation, rows=rows)]
    assert [one[one.index("--weights") + 1] for one in words[::3]] == ["student", "momentum"]


@pytest.mark.parametrize("key", ["init_weights", "init_from_run"])
def test_the_initial_weights_of_a_run_that_loads_them_are_no_row(tmp_path: Path, key: str) -> None:
    loads = f"student.{key}=START"
    rows: dict[str, Any] = {"start": {"settings": [*NO_TEACHER, loads], "weights": "random"}}
    with pytest.raises(ConfigError, match=rf"rows.start: weights=random .* has {loads}; set "):
        runs_of(tmp_path, rows=rows, comparisons=[])
    rows["start"]["weights"] = "student"
    assert len(runs_of(tmp_path, rows=rows, comparisons=[])) == 2


def test_runs_share_the_cache_of_a_teacher_that_sees_the_same(tmp_path: Path) -> None:
    caches = {(run.row, run.seed): run.config.cache.dir for run in runs_of(tmp_path)}
    assert caches["mae", 0] is None
    assert caches["cmt", 0] == caches["half", 0] != caches["cmt", 1]


def test_each_of_several_teachers_has_its_own_cache(tmp_path: Path) -> None:
    rows = {"one": {"settings": ["teacher.mode=cached"]}}
    (alone, *_) = runs_of(tmp_path, rows=rows, comparisons=[])
    tree = study_tree(tmp_path)
    recipe = yaml.safe_load(Path(tree["recipe"]).read_text())
    first = {"name": "first", **recipe.pop("teacher")}
    second = first | {"name": "second", "image_size": 96}
    Path(tree["recipe"]).write_text(yaml.safe_dump(recipe | {"teachers": [first, second]}))
    modes = [f"teachers.{name}.mode=cached" for name in ("first", "second")]
    rows = {"both": {"settings": modes}, "mixed": {"settings": modes[1:]}}
    runs = plan_runs(load_study(write_study(tmp_path, tree | {"rows": rows, "comparisons": []})))
    both, mixed = runs[:2]
    assert [kinds(both)[:3], kinds(mixed)[:2]] == [["cache", "cache", "train"], ["cache", "train"]]
    for job, name in zip(both.jobs[:2], ("first", "second"), strict=True):
        assert job.arguments[5:7] == ("--teacher", name)
        config = load_config(job.arguments[4], job.arguments[7:])
        assert pick_teacher(config, name).cache.dir == str(job.output)
    assert both.jobs[0].output == alone.jobs[0].output  # a single teacher has the same rows
    assert both.jobs[1].output == mixed.jobs[0].output != both.jobs[0].output
    assert not both.teacher


def test_other_images_ask_for_another_evaluation_of_the_same_run(tmp_path: Path) -> None:
    evaluation = study_tree(tmp_path)["evaluation"] | {"test": "elsewhere"}
    for before, after in zip(
        runs_of(tmp_path), runs_of(tmp_path, evaluation=evaluation), strict=True
    ):
        assert before.folder == after.folder
        assert before.linear != after.linear and before.knn != after.knn


def test_what_is_done_is_not_missing(tmp_path: Path) -> None:
    run = runs_of(tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "exit.json").write_text(json.dumps({"code": 75}))
    assert kinds(run) == ["train", "evaluate", "evaluate"]
    (run.folder / "exit.json").write_text(json.dumps({"code": 0}))
    assert kinds(run) == ["evaluate", "evaluate"]
    put_results(run, hits_of(10))
    (run.folder / "exit.json").unlink()  # the weights may go when the results are there
    assert kinds(run) == []


def test_a_damaged_outcome_is_named(tmp_path: Path) -> None:
    run = runs_of(tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "exit.json").write_text("{")
    with pytest.raises(ConfigError, match=r"exit.json: cannot be read .* delete it"):
        run.missing()


def test_the_studies_for_cpus_share_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    full = load_study("configs/studies/cpu.yaml")
    for study, own in (("cpu_finetune", "random"), ("cpu_no_decoder", "teacher_only_no_decoder")):
        other = load_study(f"configs/studies/{study}.yaml")
        assert (full.recipe, full.dir, full.seeds) == (other.recipe, other.dir, other.seeds)
        for name in {*other.rows} - {own}:
            assert other.settings_of(name) == full.settings_of(name)
    assert load_study("configs/studies/cpu_finetune.yaml").settings_of("random") == (
        full.settings_of("mae")
    )


def test_a_row_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mask.ratio=2.0 must lie in \(0, 1\)"):
        runs_of(tmp_path, settings=["mask.ratio=2"])
