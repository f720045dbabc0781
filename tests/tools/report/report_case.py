"""Made-up runs, as the files of their folders, for tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.config.load import config_to_dict, load_config, save_config
from cmtmae_scale.config.schema import Student
from cmtmae_scale.evaluation.result import Row, Score, result_record
from cmtmae_scale.finetuning.encoder import InitialEncoder

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


def entries(steps: int, seed: int = 0, every: int = 2) -> list[dict[str, float]]:
    """A log like that of a run that learns."""
    generator = np.random.default_rng(seed)
    found: list[dict[str, float]] = []
    for step in range(every, steps + 1, every):
        share = step / steps
        teacher = 2 * math.exp(-share) + 0.02 * generator.normal()
        entry = {
            "loss/total": 0.9 * teacher,
            "loss/teacher": teacher,
            "loss/student": 0.6 * teacher,
            "loss/pixel": 0.0,
            "mask/visible_mass": 0.4,
            "attention/agreement": 0.5 * share,
            "grad_norm": 1.0 + 0.1 * generator.normal(),
            "lr": 1e-3 * math.sin(math.pi * share),
            "momentum": 0.99 + 0.01 * share,
            "alpha_attention": 1.0 if share < 0.1 else 0.5,
            "alpha_target": 1 - 0.3 * share,
            "salient_fraction": 0.0,
            "images_s": 10.0,
            "data_wait_fraction": 0.25,
            "memory_gib": 1.5,
        }
        found.append({"step": step, **entry})
        if step % 10 == 0:
            accuracies = {"eval/knn10": 0.3 + 0.2 * share, "eval/linear": 0.4 + 0.2 * share}
            found.append({"step": step, **accuracies, "eval/time_fraction": 0.1})
    return found


def write_lines(file: Path, lines: list[Any]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_figure(run_dir: Path, step: int) -> None:
    """A small sheet of noise."""
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(step).integers(0, 256, (60, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"step-{step:08d}.png")


def write_run(run_dir: Path, *overrides: str, steps: int = 60, seed: int = 0) -> Path:
    """A finished run of the demo's recipe; returns its folder."""
    run_dir.mkdir(parents=True)
    given = [f"run.output_dir={run_dir}", f"run.seed={seed}", *overrides]
    save_config(load_config(RECIPE, [f"train.steps={steps}", *given]), run_dir / "config.yaml")
    write_lines(run_dir / "log.jsonl", list(entries(steps, seed)))
    (run_dir / "exit.json").write_text(json.dumps({"code": 0, "step": steps, "reason": "done"}))
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "step": 0,
        "recipe": "configs/demo.yaml",
        "overrides": given,
        "world_size": 2,
        "device": "CPU",
        "versions": {"cmtmae_scale": "0.1", "torch": "2.11"},
    }
    write_lines(run_dir / "starts.jsonl", [start])
    for step in (20, 40, 60):
        write_figure(run_dir, step)
    evaluation = run_dir / "evaluation"
    (evaluation / "train-index").mkdir(parents=True)
    labels = {"labels": ["a", "b", "c", "d"], "names": ["a/0.jpg"] * 8}
    (evaluation / "train-index" / "index.json").write_text(json.dumps(labels))
    row = {
        "weights": "momentum, step 60",
        "features": "patches",
        "method": "k-NN k=10",
        "accuracy": 0.46875,
        "interval_95": [0.38, 0.55],
        "correct": 60,
        "count": 128,
    }
    result = {"method": "knn", "results": [row], "verdict": "student is NOT clearly better"}
    (evaluation / "knn-momentum-step-00000060.json").write_text(json.dumps(result))
    return run_dir


def write_tuning(run_dir: Path, *overrides: str, steps: int = 60, sha256: str = "a" * 64) -> Path:
    """A finished fine-tuning; returns its folder."""
    checkpoint = run_dir / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    given = [f"run.output_dir={run_dir}", f"train.steps={steps}", "run.name=tuned", *overrides]
    config = load_finetune("finetune_tiny", ["data.path=images/train", *given])
    save_config(config, run_dir / "config.yaml")
    kept = ("loss/total", "grad_norm", "lr", "images_s", "data_wait_fraction", "memory_gib")
    lines = [{key: one[key] for key in ("step", *kept)} for one in entries(steps) if "lr" in one]
    for step in range(20, steps + 1, 20):
        accuracies = {"eval/top1": step / 200, "eval/top5": step / 100, "eval/time_fraction": 0.1}
        lines.append({"step": step, "eval/pass": step / 20, **accuracies})
    write_lines(run_dir / "log.jsonl", lines)
    (run_dir / "exit.json").write_text(json.dumps({"code": 0, "step": steps, "reason": "done"}))
    subject = {"checkpoint": "runs/x", "step": 400, "arch": "test_vit", "sha256": sha256}
    name, size, student = "student, step 400", 64, Student("test_vit", 16)
    start = InitialEncoder({}, name, student, size, (0.5,), (0.5,), subject)
    state = {"task": "fine-tuning", "encoder": start.to_dict(), "progress": {"end_step": steps}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    result = result_record(
        [Row(name, "patches", "fine-tuned", Score(30, 60, 100))],
        8,
        method="finetune",
        subject=subject,
        size=size,
        weights_sha256={name: sha256, "fine-tuned": "f" * 64},
        steps=steps,
        settings=config_to_dict(config),
    )
    (run_dir / "result.json").write_text(json.dumps(result))
    for part in ("train", "test"):
        (run_dir / f"{part}-index").mkdir()
        index = {"digest": part, "images": 1234, "labels": [f"{k}" for k in range(8)]}
        (run_dir / f"{part}-index" / "index.json").write_text(json.dumps(index))
    return run_dir
