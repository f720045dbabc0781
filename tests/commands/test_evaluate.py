"""The command on runs, checkpoints, exported files and models of timm."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.commands import evaluate as evaluate_module
from cmtmae_scale.commands.evaluate import evaluate as evaluate_command
from cmtmae_scale.errors import CheckpointError, ConfigError, StorageError
from cmtmae_scale.evaluation import result
from cmtmae_scale.evaluation.result import (
    Row,
    Score,
    free_file,
    judge_rows,
    pack_hits,
    unpack_hits,
    wilson_interval,
    write_result,
)
from cmtmae_scale.evaluation.subject import open_encoder
from cmtmae_scale.export.encoder import export_encoder
from cmtmae_scale.runtime.launch import World
from tests.engine.run_case import STEPS, run, write_recipe
from tests.evaluation.dense_case import write_masked
from tests.evaluation.evaluation_case import command, command_apart, labelled_photographs
from tests.finetuning.finetune_case import write_encoder
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and labelled photographs, one of which cannot be decoded."""
    folder = tmp_path_factory.mktemp("evaluation")
    train = labelled_photographs(folder / "train", 40, 0, 6)
    test = labelled_photographs(folder / "test", 26, 1, 6)
    paths = [f"eval.train_path={train}", f"eval.test_path={test}"]
    run_ranks(1, run, write_recipe(folder), paths)
    broken = test / "class1" / "007.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    return folder


def evaluate(*arguments: Any) -> str:
    """Run the command on one rank; returns the printed text."""
    (text,) = run_ranks(1, command, *arguments)
    return text


@pytest.mark.parametrize("method", ["knn", "representation"])
def test_a_result_that_cannot_be_written_fails_on_every_rank(
    place: Path, tmp_path: Path, method: str
) -> None:
    words = ["--checkpoint", place / "run", "--no-baselines", "--out", tmp_path]
    words += ["--images", place / "test"] if method == "representation" else []
    found = run_ranks(2, command_apart, [[method, *words]] * 2)
    wanted = f"{tmp_path}: cannot be written (Is a directory); name another file with --out"
    assert found == [[wanted], [wanted]]


def test_accuracies_are_the_same_at_any_number_of_ranks(place: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        options = ["--checkpoint", place / "run", "--batch", "5", "--k", "3", "--out", out]
        text = run_ranks(ranks, command, "knn", *options)
        assert text == [text[0]] * ranks
        record = json.loads(out.read_text())
        assert record["images"]["train"]["used"] == 40
        assert (
            record["images"]["train"]["labels_digest"] != record["images"]["test"]["labels_digest"]
        )
        assert (record["images"]["test"]["images"], record["images"]["test"]["used"]) == (26, 25)
        assert all(row["count"] == 25 for row in record["results"])
        found.append(record["results"])
    assert found == [found[0]] * 3 and len(found[0]) == 5


def test_linear_has_two_rows_for_each_kind_of_features(place: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", place / "run", "--epochs", "2", "--out", tmp_path / "x.json"]
    text = evaluate("linear", *options)
    record = json.loads((tmp_path / "x.json").read_text())
    methods = [(row["features"], row["method"].split(",")[0]) for row in record["results"]]
    pairs = [(kind, one) for kind in ("cls", "patches") for one in ("linear", "logistic")]
    assert methods == [*pairs, *pairs, ("pixels", "linear"), ("pixels", "logistic")]
    assert "(linear, mean of patches" in text
    for row in record["results"]:
        kept = row["method"].startswith("linear")
        assert ("hits" in row) == kept
        assert not kept or unpack_hits(row["hits"], row["count"]).sum() == row["correct"]
    assert (record["settings"]["epochs"], record["settings"]["held_out"]) == (2, 0.1)


def test_ranks_with_other_weights_or_none_leave_together(place: Path, tmp_path: Path) -> None:
    def knn(file: str) -> list[str]:
        return ["knn", "--checkpoint", str(tmp_path / file), "--arch", "test_vit"]

    for seed in (0, 1):
        (tmp_path / f"{seed}").mkdir()
        write_encoder(tmp_path / f"{seed}" / "x.safetensors", seed)
    run = ["knn", "--checkpoint", str(place / "run")]
    cases = [
        [knn("0/x.safetensors"), knn("1/x.safetensors")],
        [knn("0/x.safetensors"), knn("gone.safetensors")],
        [run, ["knn", "--checkpoint", str(tmp_path / "gone")]],
    ]
    first, second = run_ranks(2, command_apart, *cases)
    assert "digest of x.safetensors: " in first[0] and first[0] == second[0]
    assert first[1] == f"rank 1: {second[1]}" and "gone.safetensors" in second[1]
    assert first[2] == f"rank 1: {second[2]}" and "is neither a run" in second[2]


def test_ranks_of_which_one_has_the_exported_folder_leave_together(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "timm" / name).touch()
    knn = [["knn", "--checkpoint", str(tmp_path / name), "--arch", "x"] for name in ("timm", "no")]
    momentum = [[*words[:3], "--weights", "momentum"] for words in knn]
    first, second = run_ranks(2, command_apart, knn, momentum)
    assert first[0] == f"rank 1: {second[0]}"
    assert second[0] == f"--arch belongs to a .safetensors file; found {tmp_path / 'no'}"
    assert second[1] == f"rank 0: {first[1]}" or second[1] == first[1]
    assert first[1].startswith("--weights belongs to a checkpoint")


def test_a_result_file_that_cannot_be_there_ends_the_search_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result.itertools, "count", lambda start: range(start, 6))  # it must end
    (tmp_path / "evaluation").touch()
    (tmp_path / "folder").mkdir()
    file = tmp_path / "evaluation" / "knn.json"
    assert free_file(file, {}) == file
    with pytest.raises(ConfigError, match=r"knn.json: cannot be written \(File exists\)"):
        write_result(file, {})
    assert free_file(tmp_path / "folder", {}) == tmp_path / "folder-2"
    long = tmp_path / f"{'x' * 300}.json"
    assert free_file(long, {}) == long


def test_the_figure_does_not_replace_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmtmae_scale.commands.evaluate.set_up_logging", lambda *_: None)
    words = ["--checkpoint", str(tmp_path), "--clips", "clips", "--out", "found.png"]
    assert evaluate_command(["propagation", *words]) == 78
    assert "--out=found.png: the figure is written there; name FILE.json" in caplog.text


def test_a_figure_that_cannot_be_drawn_does_not_hide_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(panels: object, file: Path) -> Path:
        raise StorageError(f"{file}: No space left on device")

    found = ("the report", object(), tmp_path / "found.json")
    monkeypatch.setattr("cmtmae_scale.evaluation.dense.evaluate_dense", lambda *_: found)
    monkeypatch.setattr("cmtmae_scale.tools.figures.dense.draw_panels", draw)
    options = SimpleNamespace(method="propagation")
    alone = World(0, 1, 0, 1, "none")
    text = evaluate_module.run_method(options, alone, torch.device("cpu"))
    assert text == "the report"
    assert f"no figure is drawn: {tmp_path / 'found.png'}: No space left on device" in caplog.text


def test_the_deepspeed_launcher_puts_its_option_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(evaluate_module, "launch", lambda words: seen.append(words) or 0)
    assert evaluate_command(["--local_rank=3", "knn", "--checkpoint", "x"]) == 0
    assert seen == [["knn", "--checkpoint", "x"]]


def test_the_result_file_records_the_evaluation(place: Path) -> None:
    text = evaluate("knn", "--checkpoint", place / "run")
    file = place / "run" / "evaluation" / f"knn-momentum-step-{STEPS:08d}.json"
    assert f"written to {file}" in text
    assert "train: 40 images of 6 classes" in text and "test:  25 images" in text
    assert "excluded: 1 images that cannot be decoded" in text
    record = json.loads(file.read_text())
    assert record["subject"]["step"] == STEPS and record["subject"]["weights"] == "momentum"
    assert record["settings"]["k"] == [10, 20] and record["seed"] == 0
    assert set(record["versions"]) == {"cmtmae_scale", "torch", "timm"}
    assert {row["weights"] for row in record["results"]} == {
        *(f"momentum, step {STEPS}", "random weights", "raw pixels")
    }
    for row in record["results"]:
        assert row["accuracy"] == row["correct"] / row["count"] <= row["accuracy_top5"]
        low, high = (100 * one for one in row["interval_95"])
        line = next(
            x
            for x in text.splitlines()
            if re.match(rf"{row['weights']} +{row['features']} +{row['method']} ", x)
        )
        assert f"{low:6.2f} to {high:6.2f}" in line and f"{row['correct']}/{row['count']}" in line
    assert record["verdict"] in text
    assert not list(file.parent.glob("*.tmp"))


def test_another_evaluation_of_the_same_weights_replaces_no_result(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "run" / "checkpoints", tmp_path / "checkpoints")
    name = f"knn-student-step-{STEPS:08d}"
    words = ["knn", "--checkpoint", tmp_path, "--weights", "student", "--no-baselines", "--k", "3"]
    sets = ["--train", place / "train", "--test"]
    for test, written in (("test", ""), ("train", "-2"), ("test", ""), ("train", "-2")):
        text = evaluate(*words, *sets, place / test)
        assert f"written to {tmp_path}/evaluation/{name}{written}.json" in text
    (tmp_path / "evaluation" / f"{name}-2.json").write_text("[]")  # whatever it is, it stays
    assert f"{name}-3.json" in evaluate(*words, *sets, place / "train")
    found = [
        json.loads((tmp_path / "evaluation" / f"{name}{n}.json").read_text()) for n in ("", "-3")
    ]
    assert [one["images"]["test"]["images"] for one in found] == [26, 40]


def test_a_checkpoint_and_its_exported_file_are_one(place: Path, tmp_path: Path) -> None:
    folder = layout.folder_of(place / "run" / "checkpoints", STEPS)
    paths = ["--train", place / "train", "--test", place / "test"]
    (tmp_path / "one").mkdir()
    file = export_encoder(folder, tmp_path / "one" / "x.safetensors", "student").file
    results = []
    for number, what in enumerate(
        (
            ["--checkpoint", folder, "--weights", "student"],
            ["--checkpoint", file, "--arch", "test_vit"],
            ["--checkpoint", folder / layout.ENCODER, "--arch", "test_vit"],
        )
    ):
        out = tmp_path / f"{number}.json"
        evaluate("knn", *what, *paths, "--no-baselines", "--out", out)
        record = json.loads(out.read_text())
        results.append(([row["correct"] for row in record["results"]], record["subject"]["sha256"]))
    assert results[0] == results[1] == results[2]
    (tmp_path / "one" / "config.json").write_text('{"architecture": "test_vit"}')
    text = evaluate("knn", "--checkpoint", file, *paths, "--no-baselines")
    assert "not written to a file; name one with --out" in text
    file.rename(tmp_path / "one" / "model.safetensors")  # as in a folder of export timm
    out = tmp_path / "folder.json"
    evaluate("knn", "--checkpoint", tmp_path / "one", *paths, "--no-baselines", "--out", out)
    assert json.loads(out.read_text())["subject"]["sha256"] == results[0][1]


def test_a_classifier_is_no_encoder(place: Path, tmp_path: Path) -> None:
    file, sets = tmp_path / "x.safetensors", ["--train", place / "train", "--test", place / "test"]
    save_file(timm.create_model("test_vit", num_classes=6, img_size=64).state_dict(), file)
    with pytest.raises(AssertionError, match="holds a classifier of 6 classes"):
        evaluate("knn", "--checkpoint", file, "--arch", "test_vit", *sets)


def test_a_model_of_timm_and_the_runs_teacher_are_read_as_timm_does(
    place: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    sets = ["--train", place / "train", "--split", "0.7"]
    what = ["--timm", "test_vit", "--file", tmp_path / "weights.safetensors", "--size", "64"]
    text = evaluate("knn", *what, *sets, "--k", "5")
    assert "a split of images, not of sources: 70% of each class to train, seed 0" in text
    assert "test_vit at 64 pixels" in text
    text = evaluate("knn", "--checkpoint", place / "run", "--weights", "teacher", "--k", "5")
    assert "teacher test_vit (random)" in text


def test_the_initial_weights_of_a_run_are_its_baseline(place: Path, tmp_path: Path) -> None:
    results = {}
    for weights in ("student", "random"):
        file = tmp_path / f"{weights}.json"
        evaluate("knn", "--checkpoint", place / "run", "--weights", weights, "--out", file)
        results[weights] = json.loads(file.read_text())
    baseline, own = (
        [row["correct"] for row in results[name]["results"] if row["weights"] == "random weights"]
        for name in ("student", "random")
    )
    assert own == baseline and own
    assert results["random"]["subject"]["sha256"] != results["student"]["subject"]["sha256"]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("init_from_run", "--checkpoint START --weights student"),
        ("init_weights", "--timm test_vit --file START"),
    ],
)
def test_random_weights_are_not_the_start_of_a_run_that_loaded_its_own(
    place: Path, tmp_path: Path, key: str, remedy: str
) -> None:
    folder = shutil.copytree(
        layout.folder_of(place / "run" / "checkpoints", STEPS), tmp_path / "checkpoint"
    )
    state = layout.read_state(folder)
    state["config"]["student"][key] = "START"
    (folder / layout.STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=rf"started from student.{key}=START, .* {remedy}"):
        open_encoder(folder, "random", torch.device("cpu"))
    subject = open_encoder(folder, "student", torch.device("cpu"))
    assert subject.random is not None and subject.random.name == "random weights"


def test_dense_methods_write_rows_and_a_figure(place: Path, tmp_path: Path) -> None:
    masked = write_masked(tmp_path / "masked", 5)
    text = evaluate(
        "segmentation", "--checkpoint", place / "run", "--train", masked, "--split", 0.6
    )
    file = place / "run" / "evaluation" / f"segmentation-momentum-step-{STEPS:08d}.json"
    assert f"written to {file}" in text and file.with_suffix(".png").is_file()
    record = json.loads(file.read_text())
    names = {f"momentum, step {STEPS}", "random weights", "raw pixels"}
    assert {row["weights"] for row in record["results"]} == names
    assert [record["images"][part]["images"] for part in ("train", "test")] == [3, 2]
    for row in record["results"]:
        assert row["interval_95"][0] <= row["value"] <= row["interval_95"][1]
        assert row["measure"] in ("mIoU", "pixel accuracy") and row["count"] == 2
    assert record["verdict"] in text and "bootstrap resamples of the test images" in text
    what = ["--checkpoint", place / "run", "--masks", masked, "--out", tmp_path / "out.json"]
    evaluate("representation", "--no-baselines", *what)
    record = json.loads((tmp_path / "out.json").read_text())
    found = {row["weights"] for row in record["results"] if row["features"] == "attention"}
    mixed = {name for name in found if name.startswith("mixed, alpha ")}
    own = {f"momentum, step {STEPS}", "random weights", "teacher"}
    assert len(mixed) == 1 and found - mixed == own | {"uniform", "centre prior"}
    assert (tmp_path / "out.png").is_file() and record["images"]["images"]["images"] == 26


@pytest.mark.parametrize("method", ["knn", "segmentation"])
def test_names_that_are_no_utf8_are_evaluated_and_printed(
    place: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    images = write_masked(folder, 4) if method == "segmentation" else folder
    if method == "segmentation":
        for part in ("images", "masks"):
            (folder / part / "00.png").rename(folder / part / os.fsdecode(b"\xe9.png"))
    else:
        labelled_photographs(folder, 6, 0, 2)
        (folder / "class0").rename(folder / os.fsdecode(b"\xe9"))
    printed = io.BytesIO()
    # Python's own choice where the locale is of UTF-8; pytest's is more lenient
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "utf-8", errors="strict"))
    monkeypatch.setattr("cmtmae_scale.commands.evaluate.set_up_logging", lambda *_: None)
    options = ["--train", str(images), "--split", "0.5", "--out", str(tmp_path / "out.json")]
    words = [method, "--checkpoint", str(place / "run"), "--no-baselines", *options]
    assert evaluate_command(words) == 0
    sys.stdout.flush()
    assert f"({tmp_path}/caf\\udce9)" in printed.getvalue().decode()


MISTAKES = {
    "RUN --weights teacher --file x": "--file belongs to --timm",
    "RUN --test TEST --split 0.5": "--split makes the test set out of --train",
    "RUN --split 1.5": "--split=1.5 must be between 0 and 1",
    "RUN --arch test_vit": "--arch belongs to a .safetensors file",
    "NOTHING": "is neither a run .* nor a checkpoint",
    "FILE --train TRAIN --test TEST": "the architecture is not known, .* give --arch NAME",
    "FILE --arch test_vit": "--train PATH must be given: the run names no eval.train_path",
    "FILE --arch test_vit2 --train TRAIN": "does not fit test_vit2 with patches of 16 at 64 pixels",
    "FILE --arch test_vitt": "--arch=test_vitt is not a model of timm",
    "FILE --weights momentum": "--weights belongs to a checkpoint",
    "RUN --train TEST --test nowhere": "nowhere",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_exit_with_code_78(
    place: Path, line: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmtmae_scale.commands.evaluate.set_up_logging", lambda *_: None)
    folder = layout.folder_of(place / "run" / "checkpoints", STEPS)
    known = {"RUN": place / "run", "NOTHING": place, "FILE": folder / layout.ENCODER}
    known |= {"TRAIN": place / "train", "TEST": place / "test"}
    words = [str(known.get(word, word)) for word in line.split()]
    assert evaluate_command(["knn", "--checkpoint", *words]) == 78
    assert re.search(MISTAKES[line], caplog.text)


def test_a_broken_checkpoint_is_refused_and_a_runs_older_one_taken(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    broken = layout.folder_of(tmp_path / "run" / "checkpoints", STEPS)
    (broken / layout.rank_file(0)).unlink()
    with pytest.raises(AssertionError, match=r"is broken: rank-00000.safetensors is absent"):
        evaluate("knn", "--checkpoint", broken)
    text = evaluate("knn", "--checkpoint", tmp_path / "run")
    assert f"momentum, step {STEPS - 2}:" in text


@pytest.mark.parametrize("count", [1, 8, 13])
def test_hits_are_kept_a_bit_an_image(count: int) -> None:
    hits = torch.arange(count) % 3 == 0
    text = pack_hits(hits)
    assert len(text) == 2 * -(-count // 8) and text[0] in "89"
    assert unpack_hits(text, count).tolist() == hits.tolist()


def row(weights: str, features: str, method: str, correct: int) -> Row:
    return Row(weights, features, method, Score(correct, correct, 100))


def test_only_what_clearly_beats_both_baselines_is_better() -> None:
    rows = [row("ours", "cls", "k-NN k=10", 99), row("ours", "patches", "k-NN k=10", 60)]
    rows += [row("ours", "patches", "k-NN k=20", 99), row("random weights", "cls", "k-NN k=10", 99)]
    weak = [row("random weights", "patches", "k-NN k=10", 30)]
    strong = [row("raw pixels", "pixels", "k-NN k=10", 50)]
    text = judge_rows([*rows, *weak, *strong], "ours")
    assert (
        " is NOT clearly better than " in text and "raw pixels (" in text and "random" not in text
    )
    strong = [
        row("raw pixels", "pixels", "k-NN k=10", 35),
        row("raw pixels", "pixels", "other", 99),
    ]
    text = judge_rows([*rows, *weak, *strong], "ours")
    assert text.startswith("ours is clearly better than random weights and raw pixels")


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_intervals_are_wilsons(correct: int, count: int, low: float, high: float) -> None:
    """Third case: R. G. Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
