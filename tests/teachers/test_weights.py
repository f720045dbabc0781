"""Weights as programs write them are loaded, every tensor accounted for; other files are named."""

import argparse
import errno
import logging
import os
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from cmtmae_scale.errors import TeacherError
from cmtmae_scale.teachers import weights
from cmtmae_scale.teachers.state_dicts import load_strictly
from cmtmae_scale.teachers.weights import read_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return timm.create_model("test_vit", num_classes=0).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def chunked(state: State) -> State:
    """Names of DINOv2's training: six blocks in chunks of two."""
    found = {}
    for name, value in state.items():
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace("blocks.", f"blocks.{number // 2}.", 1)
        found[name] = value
    return found


def within(state: State) -> State:
    """Names after torch.compile and checkpointing of single blocks."""
    return {
        name.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module."): value
        for name, value in state.items()
    }


HEAD = {"head.mlp.0.weight": torch.zeros(3), "dino_head.last.weight": torch.zeros(2)}
ARGS = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("out"), betas=(0.9, 0.95))
PROGRAMS: dict[str, tuple[Callable[[State], object], int]] = {
    "MAE checkpoint-N.pth": (
        lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": ARGS},
        0,
    ),
    "DINO": (
        lambda s: {
            "student": under("module.backbone.", s),
            "teacher": under("backbone.", s) | HEAD,
            "args": ARGS,
            "epoch": 1,
        },
        2,
    ),
    "DINO's student saved alone": (lambda s: under("module.backbone.", s) | HEAD, 2),
    "DINOv2": (lambda s: {"teacher": under("backbone.", chunked(s)) | HEAD}, 2),
    "Lightning": (
        lambda s: {
            "state_dict": under("model.", s) | {"criterion.weight": torch.zeros(2)},
            "epoch": 1,
            "pytorch-lightning_version": "2.2",
            "hyper_parameters": {"lr": 1.0},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x"}},
        },
        1,
    ),
    "Lightning, compiled": (lambda s: {"state_dict": under("net.backbone._orig_mod.", s)}, 0),
    "compiled, then wrapped": (lambda s: under("module._orig_mod.", s), 0),
    "wrapped, then compiled": (lambda s: {"model": under("_orig_mod.module.", s)}, 0),
    "twice": (lambda s: under("module._orig_mod.module._orig_mod.", s), 0),
    "single blocks": (within, 0),
    "DeepSpeed": (lambda s: {"module": under("module.", s), "global_steps": 3}, 0),
    "model_state_dict": (lambda s: {"model_state_dict": s}, 0),
    "the export of the full model": (
        lambda s: under("encoder.", s) | {"decoder.mask_token": torch.zeros(1)},
        1,
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_every_tensor_of_a_programs_file_is_loaded_or_named(
    state: State, tmp_path: Path, program: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build, others = PROGRAMS[program]
    file = tmp_path / f"w{suffix}"
    torch.save(build(state), file)
    found = read_weights(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    lines = [line for line in caplog.messages if "are not used" in line]
    assert len(lines) == bool(others)
    assert not others or f"({len(state)} tensors); {others} other tensors" in lines[0]


def test_weights_beside_those_that_are_taken_are_named(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """timm's training saves those of the EMA too, which its own loading prefers."""
    caplog.set_level(logging.INFO)
    averaged = {name: value + 1 for name, value in state.items()}
    file = tmp_path / "last.pth.tar"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"state_dict": state, "state_dict_ema": averaged, "optimizer": optimizer}, file)
    assert torch.equal(read_weights(file)["norm.weight"], state["norm.weight"])
    assert caplog.messages == [
        f"teacher.weights={file}: the tensors under state_dict are taken, those under "
        "state_dict_ema are not"
    ]


def refusal(file: Path) -> str:
    with pytest.raises(TeacherError) as raised:
        read_weights(file, "student.init_weights")
    text = str(raised.value)
    assert text.startswith(f"student.init_weights={file}: ") and text.isprintable()
    assert "re-running" not in text.lower() and "two options" not in text
    return text


@pytest.mark.parametrize("name", ["is_file", "open_regular"])
def test_a_file_that_may_not_be_read_is_named(
    state: State, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fails in a folder that may not be entered, the second for the file itself."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    file = tmp_path / "w.pt"
    torch.save(state, file)
    monkeypatch.setattr(Path if name == "is_file" else weights, name, refuse)
    assert "cannot be read (Permission denied); make it readable, or correct" in refusal(file)


def test_two_encoders_are_not_guessed(state: State, tmp_path: Path) -> None:
    file = tmp_path / "moco.pth.tar"
    both = under("module.base_encoder.", state) | under("module.momentum_encoder.", state)
    torch.save({"state_dict": both}, file)
    assert "2 encoders (base_encoder., momentum_encoder.)" in refusal(file)


def test_a_pickled_model_is_named(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    for model, name in (
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (timm.create_model("test_vit"), "timm.models.vision_transformer.VisionTransformer"),
        ({"model": {}, "callback": print}, "print"),
    ):
        torch.save(model, file)
        text = refusal(file)
        assert name in text and "would run code" in text and "state_dict()" in text


OTHERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n": "git lfs pull",
    b"<!DOCTYPE html><html>404</html>": "a web page",
    b"\xef\xbb\xbf\r\n  <html>": "a web page",
    b"<?xml version='1.0'?><Error>AccessDenied</Error>": "a web page",
    b'{"message": "not found"}': "JSON",
    b"": "is empty",
    b"\x1f\x8b\x08\x00": "gzip",
    b"\x89HDF\r\n": "HDF5",
}


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_what_is_saved_in_place_of_weights_is_named(tmp_path: Path, suffix: str) -> None:
    for content, words in OTHERS.items():
        file = tmp_path / f"w{suffix}"
        file.write_bytes(content)
        assert words in refusal(file)


@pytest.mark.parametrize(
    "content", [b"\x80\x02abc", b"\x80\x02.", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), bytes(99)]
)
def test_any_bytes_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    assert "copy it again" in refusal(file)


def test_half_a_file_is_one_sentence(state: State, tmp_path: Path) -> None:
    for legacy in (False, True):
        file = tmp_path / "w.pth"
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert "copy it again" in refusal(file)


def test_a_table_of_stride_zero_is_bounded_by_its_storage(state: State, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(state | {"pos_embed": torch.zeros(1).expand(1, 10**12, 3)}, file)
    assert "pos_embed [1, 1000000000000, 3] repeats values" in refusal(file)
    views = {f"w{number}": state["patch_embed.proj.weight"] for number in range(1000)}
    torch.save(views, file)
    assert "repeats values" in refusal(file)
    torch.save({"w": torch.zeros(3, device="meta")}, file)
    assert "save dense tensors" in refusal(file)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(10**7))
    assert "unpacks to 10000000 bytes" in refusal(file)


def test_a_tensor_is_as_long_as_its_storage(tmp_path: Path) -> None:
    """Otherwise memory beyond the file would be read as weights."""
    file, forged = tmp_path / "w.pth", tmp_path / "f.pth"
    for other in (0, 10**6):  # bytes of another record, which a size of the whole would not show
        torch.save({"w": torch.ones(1000), "x": torch.ones(other // 4)}, file)
        with zipfile.ZipFile(file) as whole, zipfile.ZipFile(forged, "w") as archive:
            for member in whole.infolist():
                data = whole.read(member)
                if member.filename.endswith("data.pkl"):
                    data = data.replace(b"M\xe8\x03", b"J\0\0\0\x40")  # 2^30 values
                archive.writestr(member.filename, data)
        assert "copy it again" in refusal(forged)
    torch.save({"w": torch.ones(1000)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(forged, "w") as archive:
        for member in whole.infolist():
            data = whole.read(member)
            archive.writestr(member.filename, data[:40] if len(data) == 4000 else data)
    assert "copy it again" in refusal(forged)


def test_paths_of_any_python_and_system_are_read(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"model": {"w": torch.ones(2)}, "path": pathlib.PurePosixPath("a")}, file)
    for name in ("pathlib._local\nPosixPath", "pathlib\nWindowsPath", "pathlib\nPosixPath"):
        with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "n.pth", "w") as archive:
            for member in whole.infolist():
                data = whole.read(member).replace(b"pathlib\nPurePosixPath", name.encode())
                archive.writestr(member.filename, data)
        assert list(read_weights(tmp_path / "n.pth")) == ["w"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_no_weights(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.ones(2, dtype=torch.float16)}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TeacherError, match=f"weight is {name} instead of float32; save the"):
        load_strictly(model, state, "w.pt", "m", "")
    load_strictly(model, state | {"weight": torch.ones(2, 2).double()}, "w.pt", "m", "")


def test_float8_files_are_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "w.pt")
    assert "w is torch.float8_e5m2; save the weights" in refusal(tmp_path / "w.pt")


def test_tied_weights_are_loaded(tmp_path: Path) -> None:
    weight = torch.ones(50, 50)
    torch.save(
        {"a": weight, "b": weight, "c": weight.T, "empty": torch.zeros(0)}, tmp_path / "w.pt"
    )
    assert len(read_weights(tmp_path / "w.pt")) == 4
