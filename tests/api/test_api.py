"""The Python interface, on the run that the snippets of docs/python_api.md produce."""

import errno
import json
import os
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import cmtmae_scale
from cmtmae_scale.api import attention as attention_module
from cmtmae_scale.api import encoders as encoders_module
from cmtmae_scale.api import features as features_module
from cmtmae_scale.api.features import save_features
from cmtmae_scale.commands.main import run_command
from cmtmae_scale.config.schema import Config, Mask
from cmtmae_scale.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    CheckpointError,
    ConfigError,
    RunStoppedError,
    exit_code_of,
)
from cmtmae_scale.evaluation import saved
from cmtmae_scale.evaluation.features import ReadOptions, extract_features
from cmtmae_scale.evaluation.images import ImageSet
from cmtmae_scale.evaluation.subject import subject_from_checkpoint
from cmtmae_scale.method import masking
from cmtmae_scale.method.images import normalise_images
from cmtmae_scale.pretraining import task
from cmtmae_scale.runtime.launch import World
from dataloading.errors import DataError
from dataloading.index import build_index
from tests.dataloading.tar_case import write_tar
from tests.engine.run_case import BASE, make_photographs

ROOT = Path(__file__).resolve().parents[2]
ALONE, CPU = World(0, 1, 0, 1, "none"), torch.device("cpu")


def snippets(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the page's snippets define, and ``folder``, in which they ran."""
    folder = tmp_path_factory.mktemp("api")
    make_photographs(folder / "photos")
    names: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        for language, text in snippets(ROOT / "docs" / "python_api.md"):
            if language == "python":
                exec(compile(text, "docs/python_api.md", "exec"), names)
                continue
            for line in text.splitlines():
                assert run_command(shlex.split(line)[1:]) == EXIT_DONE, line
                if " init " in line:  # the run is that of a smaller student, with a teacher
                    path = Path("photos.yaml")
                    tree = yaml.safe_load(path.read_text())
                    small = BASE | {name: tree[name] for name in ("run", "data")}
                    small["train"] = {"global_batch_size": 4, "steps": 6}
                    path.write_text(yaml.safe_dump(small))
                    names["interrupted"] = interrupt_build(path)
                    names["stopped"] = stop_early(path)
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=folder, place=folder / "runs" / "photos", **names)


def interrupt_build(recipe: Path) -> str:
    """The error of the page's run at a Ctrl-C before its first step."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunStoppedError) as stopped:
        patch.setattr(task, "build_models", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        cmtmae_scale.pretrain(recipe, train={"steps": 20})
    assert stopped.value.exit_code == 75 and signal.getsignal(signal.SIGINT) is handler
    assert json.loads(Path("runs/photos/exit.json").read_text())["code"] == 75
    return str(stopped.value)


def stop_early(recipe: Path) -> str:
    """The error of the page's run when it stops after a step."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError) as stopped:
        cmtmae_scale.pretrain(recipe, train={"steps": 20, "stop_after": 1})
    assert stopped.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is handler
    return str(stopped.value)


def test_a_run_stops_resumes_and_trains_as_the_page_says(done: Any) -> None:
    assert done.interrupted == (
        "runs/photos: stopped (SIGINT) before the first step, with nothing to save; the same call "
        "starts again"
    )
    assert done.stopped == "runs/photos: stopped on request; the same call resumes the run"
    log = (done.place / "log.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, log) if "loss/total" in entry]
    assert done.run == Path("runs/photos") and steps == list(range(1, 21))


def test_features_are_those_of_evaluation(done: Any) -> None:
    index = build_index(done.folder / "photos")
    encoder = subject_from_checkpoint(done.place, "momentum", ALONE, CPU).encoder
    images = ImageSet(index, np.arange(len(index)), index.entries["label"].astype(np.int64))
    table = extract_features(images, [encoder], ReadOptions(7, 2, "torch"), ALONE, CPU)
    found = done.features
    for kind in ("patches", "cls"):
        (expected,) = [rows for column, rows in table.columns.items() if column.kind == kind]
        np.testing.assert_allclose(getattr(found, kind), expected, rtol=1e-4, atol=1e-5)
    assert found.names.tolist() == list(index.names)
    assert found.classes == ("class0", "class1", "class2") and found.excluded == ()
    assert [found.classes[label] for label in found.labels] == [
        name.partition("/")[0] for name in found.names
    ]


def test_the_default_weights_are_the_ema(done: Any) -> None:
    student = cmtmae_scale.load_encoder(done.place, "student").state_dict()
    default = cmtmae_scale.load_encoder(done.place).state_dict()
    momentum = cmtmae_scale.load_encoder(done.place, "momentum").state_dict()
    assert all(torch.equal(default[name], momentum[name]) for name in momentum)
    assert any(not torch.equal(default[name], student[name]) for name in student)
    (newest,) = (done.place / "checkpoints").glob("step-*20")
    file = newest / "encoder.safetensors"
    loaded = cmtmae_scale.load_encoder(file, arch="test_vit")
    assert all(torch.equal(value, student[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training and done.settings["input_size"] == (3, 64, 64)


def test_what_is_no_encoder_is_refused(done: Any, tmp_path: Path) -> None:
    (newest,) = (done.place / "checkpoints").glob("step-*20")
    file = newest / "encoder.safetensors"
    for place, weights, arch, error, text in (
        (tmp_path, None, None, CheckpointError, "neither a run"),
        (tmp_path / "absent.safetensors", None, "test_vit", CheckpointError, "no such file"),
        (done.place, "teacher", None, ConfigError, "weights=teacher is not one of student, mom"),
        (done.place, None, "test_vit", ConfigError, "arch=test_vit belongs to a .safetensors"),
        (file, "student", "test_vit", ConfigError, "weights=student belongs to a run"),
        (file, None, None, ConfigError, "give --arch NAME"),
        (file, None, "vit_tiny_patch16_224", CheckpointError, "does not fit timm.create_model"),
    ):
        with pytest.raises(error, match=re.escape(text)):
            cmtmae_scale.load_encoder(place, weights, arch=arch)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0, fc_norm=False).state_dict()
    name = "blocks.0.attn.qkv.weight"
    file = tmp_path / "encoder.safetensors"
    save_file(state | {name: (100 * state[name]).to(torch.int8)}, file)
    text = f"{file}: {name} is int8 instead of float32; save the weights as floating-point numbers"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        cmtmae_scale.load_encoder(file, arch="test_vit")


def test_the_maps_are_those_that_masks_follow(done: Any) -> None:
    maps = done.maps
    assert maps.grid == (4, 4) and maps.views.shape == (20, 64, 64, 3)
    assert maps.teacher.shape == maps.momentum.shape == maps.mixed.shape == (20, 16)
    torch.testing.assert_close(maps.mixed.sum(1), torch.ones(20))
    half = BASE["collaboration"]["alpha_attention"]
    torch.testing.assert_close(maps.mixed, half * maps.teacher + (1 - half) * maps.momentum)
    assert not torch.allclose(maps.teacher, maps.momentum)
    again = cmtmae_scale.attention_maps(done.place, maps.views[:3].numpy(), batch_size=2)
    torch.testing.assert_close(again.mixed, maps.mixed[:3])
    with pytest.raises(ValueError, match=re.escape("expected uint8 [B, S, S, 3]")):
        cmtmae_scale.attention_maps(done.place, maps.views[0])


def test_images_are_turned_as_the_run_turns_them(
    done: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def as_stored(folder: Path, state: Any) -> Config:
        config = saved.saved_config(folder, state)
        return replace(config, data=replace(config.data, exif_orientation=False))

    for module in (attention_module, encoders_module):
        monkeypatch.setattr(module, "saved_config", as_stored)
    photos, turned = tmp_path / "photos", Image.Exif()
    photos.mkdir()
    turned[0x0112] = 6
    picture = Image.fromarray(done.maps.views[0].numpy())
    picture.save(photos / "a.png")
    picture.save(photos / "b.png", exif=turned)
    views = cmtmae_scale.attention_maps(done.place, photos).views
    assert torch.equal(views[0], views[1])
    line = ["features", "--checkpoint", str(done.place), "--images", str(photos)]
    assert run_command([*line, "--output", str(tmp_path / "f")]) == EXIT_DONE
    by_path = cmtmae_scale.extract_features(done.place, photos).patches
    upright = cmtmae_scale.extract_features(done.encoder, photos).patches
    for patches in (by_path, np.load(tmp_path / "f" / "patches.npy")):
        np.testing.assert_allclose(patches[0], patches[1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(upright[0], upright[1], rtol=1e-3, atol=1e-3)


def test_masks_are_those_of_the_method(done: Any) -> None:
    positions = torch.tensor([5, 9, 13])
    attention = done.maps.mixed[:3]
    settings = {"sampler": "reveal_salient", "ratio": 0.5, "masks_per_view": 2}
    found = cmtmae_scale.choose_masks(
        attention.numpy(), positions=positions, seed=3, salient_fraction=0.0, **settings
    )
    expected = masking.choose_masks(Mask(**settings), attention, positions, 3, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    most = cmtmae_scale.choose_masks(attention, sampler="hide_salient", ratio=0.25).ids_hidden
    assert torch.equal(most.sort().values, attention.topk(4).indices.sort().values)
    for arguments, error in (
        ({"attention": attention, "sampler": "absent"}, ValueError),
        ({"attention": attention, "ratios": 0.5}, TypeError),
        ({"attention": attention[0]}, ValueError),
        ({"sampler": "random"}, ValueError),
    ):
        with pytest.raises(error):
            cmtmae_scale.choose_masks(**arguments)


def test_images_without_a_row_are_named(done: Any, tmp_path: Path, capsys: Any) -> None:
    photos = make_photographs(tmp_path / "photos", 5)
    (photos / "class0" / "empty.jpg").write_bytes(b"")
    cut = photos / "class1" / "001.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    output = tmp_path / "new" / "features.npz"
    line = ["features", "--checkpoint", str(done.place), "--images", str(photos), "--batch", "2"]
    assert run_command([*line, "--output", str(output)]) == EXIT_DONE
    assert "4 images x 64 (patches and cls), 2 images excluded" in capsys.readouterr().out
    with np.load(output) as table:
        assert table["excluded"].tolist() == ["class0/empty.jpg", "class1/001.jpg"]
        assert table["names"].tolist() == [
            "class0/000.jpg",
            "class0/003.jpg",
            "class1/004.jpg",
            "class2/002.jpg",
        ]
        assert table["classes"][table["labels"]].tolist() == [
            "class0",
            "class0",
            "class1",
            "class2",
        ]
        assert (
            np.isfinite(table["patches"]).all()
            and len({row.tobytes() for row in table["cls"]}) == 4
        )
    assert os.listdir(output.parent) == [output.name]
    assert run_command([*line, "--output", str(output)]) == EXIT_CONFIG
    assert "features.npz exists" in capsys.readouterr().err
    assert run_command([*line, "--output", str(tmp_path / "f.csv")]) == EXIT_CONFIG
    for name in ("class0/000.jpg", "class0/003.jpg", "class1/004.jpg", "class2/002.jpg"):
        (photos / name).write_bytes((photos / name).read_bytes()[:-200])
    with pytest.raises(DataError, match="none of 5 images could be decoded"):
        save_features(tmp_path / "none.npz", done.encoder, photos)
    assert sorted(os.listdir(tmp_path)) == ["new", "photos"]
    data = next(make_photographs(tmp_path / "more", 1).rglob("*.jpg")).read_bytes()
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", data), ("a.cls", b"a"), ("a.cls", b"b")])
    line[line.index(str(photos))] = str(tar)
    assert run_command([*line, "--output", str(tmp_path / "tar.npz")]) == EXIT_DONE
    assert "1 images x 64 (patches and cls), 0 images excluded" in capsys.readouterr().out


def test_a_full_store_leaves_nothing(done: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module, "write_arrays", fail)
    with pytest.raises(ConfigError, match="make room there") as raised:
        save_features(tmp_path / "features.npz", done.encoder, done.folder / "photos")
    assert exit_code_of(raised.value) == 75 and os.listdir(tmp_path) == []


def test_files_that_stay_while_they_are_mapped_do_not_hide_the_features(
    done: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        other = f".nfs{os.urandom(4).hex()}"  # as NFS renames a deleted file that is in use
        os.rename(path, Path(path).with_name(other), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    features = save_features(tmp_path / "features.npz", done.encoder, done.folder / "photos")
    with np.load(tmp_path / "features.npz") as table:
        assert (table["patches"] == features.patches).all()


def test_features_that_are_not_finite_are_refused(done: Any) -> None:
    broken = cmtmae_scale.load_encoder(done.place)
    broken.norm.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match=r"features of class0/000\.jpg are not finite"):
        cmtmae_scale.extract_features(broken, done.folder / "photos")


@torch.no_grad()
def test_features_of_a_model_that_pools_before_its_norm_are_normed(done: Any) -> None:
    model = timm.create_model("test_vit", img_size=64, global_pool="avg", num_classes=0).eval()
    model.fc_norm.weight.fill_(3.0)
    found = cmtmae_scale.extract_features(model, done.folder / "photos").patches
    data = timm.data.resolve_model_data_config(model)
    views = normalise_images(done.maps.views, data["mean"], data["std"])
    expected = model.fc_norm(model.forward_features(views))[:, model.num_prefix_tokens :].mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_wrong_settings_are_config_errors(done: Any) -> None:
    recipe = done.folder / "photos.yaml"
    for groups, text in (
        ({"train": {"step": 2}}, "train.step is not a key of train; did you mean steps?"),
        ({"train": 20}, "train=20 is not a group; give train={'KEY': value}"),
        ({"model": {"arch": "x"}}, "model is not a key"),
        ({"run": {"name": {1, 2}}}, "run.name"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            cmtmae_scale.pretrain(recipe, **groups)
