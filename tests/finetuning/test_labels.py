"""A fine-tuning belongs to the labels that it began with."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.finetuning.labels import label_state, refuse_other_labels
from dataloading.index import build_index
from tests.dataloading.tar_case import write_tar
from tests.evaluation.evaluation_case import labelled_photographs
from tests.finetuning.finetune_case import tune, write_recipe
from tests.processes import run_ranks


def write_labelled(tar: Path, photographs: Path, names: Mapping[str, str] | None = None) -> Path:
    """Write a folder's photographs with their labels into a tar, some under another name."""
    members: list[tuple[str, bytes]] = []
    for file in sorted(photographs.rglob("*.jpg")):
        label = (names or {}).get(file.parent.name, file.parent.name)
        members += [(file.name, file.read_bytes()), (f"{file.stem}.cls", label.encode())]
    return write_tar(tar, members)


def resume_relabelled(recipe: Path, folder: Path) -> None:
    """Two launches; between them two classes of the same images are exchanged."""
    tar, photographs = folder / "train.tar", recipe.parent / "train"
    overrides = [
        f"data.path={write_labelled(tar, photographs)}",
        f"run.output_dir={folder / 'run'}",
    ]
    digest = build_index(tar).digest
    tune(recipe, *overrides, "train.stop_after=1")
    write_labelled(tar, photographs, {"class0": "class1", "class1": "class0"})
    if build_index(tar).digest != digest:
        raise RuntimeError("the digest of the index covers labels")
    tune(recipe, *overrides)


@pytest.mark.gloo
def test_a_run_is_not_resumed_with_corrected_labels(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    wanted = (
        r"data.path=\S+: the labels differ from the checkpoint's \(images have other classes: "
        r"digest \w{12} against \w{12}\); restore them, or use another run.output_dir"
    )
    with pytest.raises(AssertionError, match=wanted):
        run_ranks(1, resume_relabelled, recipe, tmp_path)
    (kept,) = layout.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert layout.step_of(kept) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"class1": "yak"}, r"classes gone: class1; new: yak"),
        ({"class1": "class2"}, r"classes gone: class1; new: none"),
        (
            {"class1": "class2", "class2": "class1"},
            r"images have other classes: digest \w{12} against \w{12}",
        ),
    ],
)
def test_the_difference_is_named(tmp_path: Path, names: dict[str, str], message: str) -> None:
    labelled_photographs(tmp_path, 3, 0)
    saved, present = (
        label_state(build_index(write_labelled(tmp_path / tar, tmp_path, changed)))
        for tar, changed in (("before.tar", {}), ("after.tar", names))
    )
    config = Finetune()
    refuse_other_labels(saved, saved, config)
    with pytest.raises(ConfigError, match=rf"the labels differ .*\({message}\); restore them"):
        refuse_other_labels(saved, present, config)


def test_the_order_of_the_classes_counts() -> None:
    saved, present = (
        {"classes": classes, "labels_digest": "".join(classes)}
        for classes in (["ant", "cat", "dog"], ["ant", "dog", "cat"])
    )
    with pytest.raises(ConfigError, match="in another order: class 1 was cat and is dog"):
        refuse_other_labels(saved, present, Finetune())


def test_a_checkpoint_of_an_earlier_version_resumes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    present = {"classes": ["cat", "dog"], "labels_digest": "1"}
    refuse_other_labels({"task": "fine-tuning"}, present, Finetune())
    assert "holds no labels" in caplog.text
