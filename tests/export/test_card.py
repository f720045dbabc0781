"""A model card states what was run, and nothing that is unknown."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmtmae_scale.config.load import load_config
from cmtmae_scale.evaluation.measured import Measured, measured_record
from cmtmae_scale.export.card import CardFacts, model_card
from cmtmae_scale.export.origin import Origin

ROOT = Path(__file__).resolve().parents[2]
CARD = CardFacts("timm", "an encoder for timm", "import timm", "Checked.", "f" * 64, 1000)
STATE: dict[str, Any] = {
    "progress": {"step": 30, "position": 480, "end_step": 60},
    "index_digest": "a1b2",
    "world_size": 4,
    "versions": {"torch": "2.15.0"},
}


def card_of(recipe: str, *overrides: str, folder: Path = Path("step-00000030")) -> str:
    config = load_config(ROOT / "configs" / f"{recipe}.yaml", overrides)
    return model_card(Origin(folder, STATE, config, "student"), CARD)


def front_matter(text: str) -> Any:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_hubs_front_matter_is_yaml() -> None:
    front = front_matter(card_of("vit_base", "run.name='a: [odd] #name'"))
    assert (front["license"], front["library_name"]) == ("other", "timm")
    assert front["tags"][0] == "cmt-mae"


def test_recipe_data_length_and_identity_are_written() -> None:
    text = card_of("demo")
    for fact in (
        "CMT-MAE",
        "step 30 of 60",
        "vit_small_patch14_dinov2 of timm, weights datasets/demo/teacher.safetensors",
        "reveal_salient, 75% masked, 1 per view",
        "datasets/demo/photos, 1000 images, index digest a1b2",
        "30 steps, 480 views, 0.48 epochs",
        "64 views per step",
        "ranks: 4",
        "f" * 64,
        "torch 2.15.0",
        "These weights were not evaluated.",
        "terms of the teacher (vit_small_patch14_dinov2) and of the images (datasets/demo/photos)",
    ):
        assert fact in text, fact


def test_a_random_teacher_is_never_called_by_the_weights_it_lacks() -> None:
    text = card_of("vit_base", "teacher.weights=random")
    assert "with a teacher of RANDOM WEIGHTS" in text
    assert "RANDOM WEIGHTS, architecture ViT-B-16" in text
    assert "clip" not in text.lower() and "openai" not in text.lower()
    assert "terms of the images" in text


@pytest.mark.parametrize(
    ("recipe", "tag", "present", "absent"),
    [
        ("mae_base", "mae", "mean square of pixels", "teacher's weight"),
        ("milan_base", "distillation", "without a momentum encoder", "weight in the loss"),
    ],
)
def test_other_methods_are_not_called_cmt_mae(
    recipe: str, tag: str, present: str, absent: str
) -> None:
    text = card_of(recipe)
    assert front_matter(text)["tags"][0] == tag
    assert present in text and absent not in text
    assert "CMT-MAE" not in text


def test_places_of_the_machine_stay_there() -> None:
    text = card_of(
        "demo", "data.path=/private/lab/photos", "teacher.weights=/private/t.safetensors"
    )
    assert "/private" not in text
    assert "photos, 1000 images" in text and "weights t.safetensors" in text
    for weights in ("/private/t.safetensors", "random"):
        described = card_of(
            "vit_base", "teacher.model=/private/lab/clip.json", f"teacher.weights={weights}"
        )
        assert "/private" not in described and "clip" in described


def test_results_are_those_of_these_weights(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000030"
    place = tmp_path / "evaluation"
    place.mkdir()
    subject = {"weights": "student", "step": 30, "sha256": "f" * 64}
    row = {
        "weights": "student, step 30",
        "features": "cls",
        "method": "k-NN k=10",
        "accuracy": 0.5,
        "interval_95": [0.4, 0.6],
        "correct": 50,
        "count": 100,
    }
    dense = [
        measured_record(Measured("student, step 30", "patches", method, measure, 0.41666, ends, 32))
        for method, measure, ends in (("linear", "mIoU", (0.369, 0.461)), ("rank", "RankMe", None))
    ]
    other = {"weights": "momentum", "step": 20, "sha256": "0"}
    files: dict[str, Any] = {
        "a": {"subject": subject, "results": [row, {"strange": 1}]},
        "b": {"subject": subject, "method": "finetune", "accuracy": 1},
        "c": {"subject": other, "results": [row]},
        "d": [1, 2],
        "e": {"subject": subject, "results": []},
        "g": {"subject": subject, "method": "segmentation", "results": dense},
    }
    for name, tree in files.items():
        (place / f"{name}.json").write_text(json.dumps(tree))
    (place / "f.json").write_text("{")
    text = card_of("demo", folder=folder)
    results = text.split("## Results\n\n")[1].split("\n\n## Licence")[0]
    assert results == (
        "| weights | features | method | result | count |\n"
        "|---|---|---|---|---|\n"
        "| student, step 30 | cls | k-NN k=10 | top-1 50.00 % "
        "| 50 of 100, 95 % interval 40.00 to 60.00 |\n"
        "|  |  | finetune | top-1 100.00 % |  |\n"
        "| student, step 30 | patches | linear | mIoU 0.4167 | 32, 95 % interval 0.369 to 0.461 |\n"
        "| student, step 30 | patches | rank | RankMe 0.4167 | 32 |\n"
        "\n"
        "Other result files of the run:\n"
        "- c.json: other weights (weights momentum, step 20)\n"
        "- d.json: does not name its weights\n"
        "- e.json: no result in it\n"
        "- f.json: cannot be read"
    )


HOSTILE = (
    "[click](http://bad.example)",
    "![x](https://bad.example/a.png)",
    "<img src=x onerror=alert(1)>",
    "a | b",
    "`code`",
    "line\nfeed # heading",
    "\x1b[31mred\x07",
    "&lt;b&gt;",
    "__bold__ and *more*",
    "www.bad.example",
    "\udcff",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_names_have_no_effect_in_the_card(text: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml")
    config.run.name = config.data.path = config.student.init_weights = text
    config.teacher.model = text
    place = tmp_path / "evaluation"
    place.mkdir()
    row = {"weights": text, "method": text, "accuracy": 0.5}
    dense = {"weights": text, "method": text, "measure": text, "value": 0.5}
    subject = {"weights": text, "step": text}
    for name, sha256 in (("a", "f" * 64), ("b", "0")):
        tree = {"subject": subject | {"sha256": sha256}, "results": [row, dense]}
        (place / f"{name}.json").write_text(json.dumps(tree))
    folder = tmp_path / "checkpoints" / "step-00000030"
    state = STATE | {"versions": {text: text}}
    card = model_card(Origin(folder, state, config, "student"), CARD)
    assert card.encode() and all(char.isprintable() or char == "\n" for char in card)
    body = card.split("---\n", 2)[2]
    for mark in ("](", "<img", "`code", "http:", "https:", "www.", "&lt;", "*more", "__"):
        assert mark not in body
    plain = card_of("demo")
    assert len(card.splitlines()) - len(plain.splitlines()) <= 7
    for line in body.splitlines():
        assert line.count("|") in (0, 3, 6 if "| result |" in body else 3)
