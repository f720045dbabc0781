"""Students whose sizes timm does not name: saved, evaluated, exported, fine-tuned."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import HostChunk, write_chunks
from cmtmae_scale.checkpoint.shards import describe_shard, publish_checkpoint
from cmtmae_scale.config.load import config_to_dict, load_config
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.evaluation.subject import Subject, subject_from_checkpoint, subject_from_file
from cmtmae_scale.export.encoder import export_encoder
from cmtmae_scale.export.hugging_face import vit_config
from cmtmae_scale.export.origin import open_origin
from cmtmae_scale.export.timm_folder import check_timm, write_timm
from cmtmae_scale.finetuning.classifier import build_classifier, classifier_values
from cmtmae_scale.finetuning.encoder import encoder_from_dict, take_encoder
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import Student
from tests.engine.run_case import write_recipe
from tests.evaluation.evaluation_case import world
from tests.export.test_architectures import noise

CPU = torch.device("cpu")
CASES = {
    "all": ({"width": 48, "depth": 2, "heads": 6}, (48, 2, 6)),
    "width": ({"width": 96}, (96, 6, 3)),  # test_vit: 64 channels, 6 blocks, 2 heads of 32
    "heads": ({"heads": 8}, (64, 6, 8)),  # no tensor has another shape
}


def save_run(folder: Path, sizes: Mapping[str, int | str]) -> Path:
    """A run with one checkpoint of a student with random weights; returns the checkpoint."""
    overrides = [f"student.{name}={size}" for name, size in sizes.items()]
    config = load_config(write_recipe(folder), overrides)
    student = build_student(config)
    initialise(student, 1)
    draft = folder / "draft"
    draft.mkdir()
    chunks = [
        HostChunk(f"{prefix}{name}", 0, tuple(value.shape), value.detach().flatten())
        for prefix in ("model.encoder.", "momentum.")
        for name, value in student.state_dict().items()
    ]
    shapes = {chunk.key: chunk.shape for chunk in chunks}
    facts = write_chunks(chunks, draft / layout.rank_file(0))
    shards = {0: describe_shard(facts, chunks, shapes)}
    progress = {"step": 2, "position": 16, "step0": 0, "position0": 0, "applied": 2}
    progress |= {"end_step": 2, "horizon": 16}
    state = {
        "task": "pre-training",
        "config": config_to_dict(config),
        "index_digest": "x",
        "versions": {},
        "world_size": 1,
        "progress": progress,
        "skips": {"in_succession": 0, "losses": [], "scheduled": []},
    }
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    target = layout.folder_of(checkpoints, 2)
    publish_checkpoint(draft, target, shards, shapes, state, lambda: None)
    return target


def network_of(subject: Subject) -> Student:
    assert isinstance(subject.encoder.network, Student)
    return subject.encoder.network


def shape_of(student: Student) -> tuple[int, int, int]:
    block: Any = student.blocks[0]
    return student.embed_dim, len(student.blocks), block.attn.num_heads


@pytest.mark.parametrize("case", CASES)
def test_such_a_student_is_evaluated_exported_and_fine_tuned(case: str, tmp_path: Path) -> None:
    sizes, shape = CASES[case]
    checkpoint = save_run(tmp_path, sizes)
    origin = open_origin(checkpoint, "student")
    ours = origin.encoder()
    assert shape_of(ours) == shape
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def tokens(student: Student) -> Tensor:
        return student.eval()(images)

    file = export_encoder(tmp_path / "run", tmp_path / "x.safetensors", "student").file
    of_run = subject_from_checkpoint(tmp_path / "run", "student", world(), CPU)
    of_file = subject_from_file(file, None, CPU)
    for subject in (of_run, of_file, subject_from_file(checkpoint / layout.ENCODER, None, CPU)):
        assert torch.equal(tokens(network_of(subject)), tokens(ours))
        assert subject.random is not None and isinstance(subject.random.network, Student)
        assert shape_of(subject.random.network) == shape
        assert {name: subject.facts[name] for name in sizes} == sizes

    (tmp_path / "timm").mkdir()
    write_timm(tmp_path / "timm", origin)
    assert check_timm(tmp_path / "timm", origin, noise(64)).difference < 1e-4
    found = vit_config(ours, "test_vit")
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    assert tuple(found[key] for key in keys) == shape

    for subject in (of_run, of_file):
        initial, weights = take_encoder(subject, {})
        saved = json.loads(json.dumps(initial.to_dict()))
        assert encoder_from_dict(saved) == initial
        classifier = build_classifier(initial.student, 64, classes=3, pool="cls")
        classifier_values(classifier, weights, initial.name, seed=0)
        assert shape_of(classifier.encoder) == shape


@pytest.mark.parametrize(
    "text", ["x", "[]", '{"a": 1}', '{"arch": 1}', '{"arch": "test_vit", "depth": 1000000}']
)
def test_rubbish_in_a_files_metadata_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"pos_embed": torch.zeros(1, 17, 64)}, file, {"student": text})
    with pytest.raises(CheckpointError, match=r"metadata has student=.* export the encoder again"):
        subject_from_file(file, None, CPU)


def test_an_older_finetuning_names_architecture_and_patch_alone() -> None:
    saved = {"options": {}, "name": "x", "arch": "test_vit", "patch_size": 8, "size": 64}
    found = encoder_from_dict(saved | {"mean": [0.5], "std": [0.5], "facts": {}})
    assert (found.student.arch, found.student.patch_size, found.student.width) == (
        "test_vit",
        8,
        None,
    )
