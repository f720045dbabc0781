"""Study files and made-up results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cmtmae_scale.evaluation.result import pack_hits, wilson_interval
from cmtmae_scale.tools.study.work import Run
from tests.engine.run_case import BASE

NO_TEACHER = [
    *("mask.sampler=random", "teacher.mode=none", "loss.teacher=0"),
    *("loss.student=0", "loss.pixel=1", "loss.include_cls=false"),
]
COUNT = 40


def study_tree(folder: Path) -> dict[str, Any]:
    """Two rows of two seeds, one of which reads a cache, and one row of one seed."""
    recipe = folder / "recipe.yaml"
    tree = BASE | {
        "run": {"output_dir": "x"},
        "data": BASE["data"] | {"path": str(folder / "photos")},
    }
    recipe.write_text(yaml.safe_dump(tree))
    return {
        "recipe": str(recipe),
        "dir": str(folder / "study"),
        "seeds": [0, 1],
        "settings": ["train.steps=4", "views.views_per_image=1"],
        "evaluation": {"train": str(folder / "train"), "test": str(folder / "test"), "epochs": 2},
        "rows": {
            "mae": {"settings": NO_TEACHER, "note": "pixels"},
            "cmt": {"settings": ["teacher.mode=cached"]},
            "half": {"like": "cmt", "seeds": [0], "settings": ["mask.ratio=0.5"]},
        },
        "comparisons": [["cmt", "mae"], ["half", "cmt"]],
    }


def write_study(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def hits_of(correct: int, shift: int = 0) -> np.ndarray:
    return np.roll(np.arange(COUNT) < correct, shift)


def put_results(
    run: Run, hits: np.ndarray, baselines: bool = False, digest: str = "d", **labels: str
) -> None:
    """Write a run's result files as cmtmae evaluate does; ``labels`` go with each image set."""
    correct = int(hits.sum())
    own = {"weights": "student, step 4", "count": COUNT}
    share = {"accuracy": correct / COUNT, "interval_95": wilson_interval(correct, COUNT)}
    linear = (
        own | share | {"method": "linear, lr 1, decay 0", "hits": pack_hits(torch.tensor(hits))}
    )
    rows = [linear | {"features": "patches"}, linear | {"features": "cls", "accuracy": 0.125}]
    rows.append(own | share | {"method": "logistic", "features": "patches", "accuracy": 0.25})
    if baselines:
        for name, kind in (("random weights", "patches"), ("raw pixels", "pixels")):
            rows.append(linear | {"weights": name, "features": kind, "accuracy": 0.0625})
    near = own | share | {"method": "k-NN k=10", "features": "patches", "accuracy": 0.2}
    record = {
        "subject": {"sha256": "0123"},
        "images": {name: {"digest": digest} | labels for name in ("train", "test")},
    }
    run.linear.parent.mkdir(parents=True, exist_ok=True)
    run.linear.write_text(json.dumps(record | {"results": rows}))
    low = {"accuracy": 0.025, "interval_95": wilson_interval(1, COUNT)}
    rest = [near | low | {"weights": "random weights"}] if baselines else []
    run.knn.write_text(json.dumps(record | {"results": [near, *rest]}))
    if run.segmentation is not None:
        put_segmentation(run.segmentation, {"student, step 4": 0.5, "random weights": 0.25})
    if run.teacher:
        rows = [linear | {"weights": "teacher test_vit", "features": "patches", "accuracy": 0.5}]
        run.teacher[0].write_text(json.dumps(record | {"results": rows}))
        for file in run.teacher[1:]:
            put_segmentation(file, {"teacher test_vit": 0.75})


def put_segmentation(file: Path, miou: dict[str, float]) -> None:
    """Write a result file of ``cmtmae evaluate segmentation``."""
    rows = [
        {"weights": name, "features": "patches", "method": method, "measure": measure}
        | {"value": value, "interval_95": [value - 0.125, value + 0.125], "count": 8}
        for name, found in miou.items()
        for method in ("k-NN segmentation, k=1", "linear segmentation, C=1")
        for measure, value in (("mIoU", found), ("pixel accuracy", 0.96875))
    ]
    file.write_text(json.dumps({"results": rows}))
