"""Fine-tuning as a task of the engine."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.checkpoint.layout import list_checkpoints
from cmtmae_scale.config.batch import batch_plan, total_steps
from cmtmae_scale.config.changes import FINETUNING_FREE_KEYS
from cmtmae_scale.config.derive import name_student
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.engine.agreement import REMEDY, require_equal, require_equal_weights
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.scalars import Scalars
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.task import Run, SideTask
from cmtmae_scale.errors import AGAIN, ConfigError
from cmtmae_scale.evaluation.images import Sets, open_pair, require_decodable
from cmtmae_scale.evaluation.result import (
    TOP,
    Row,
    Score,
    format_rows,
    image_set_record,
    result_record,
    write_result,
)
from cmtmae_scale.finetuning.accuracy import Accuracy
from cmtmae_scale.finetuning.augment import Augmenter, Examples, cross_entropy
from cmtmae_scale.finetuning.classifier import (
    Classifier,
    build_classifier,
    classifier_values,
    layer_scale,
)
from cmtmae_scale.finetuning.encoder import InitialEncoder, encoder_from_dict, refuse_other_encoder
from cmtmae_scale.finetuning.labels import label_state, refuse_other_labels
from cmtmae_scale.finetuning.scalars import scalars_at
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from dataloading.index import Index
from dataloading.parquet_index import require_small_groups
from dataloading.stream import Batch, Stream

RESULT_FILE = "result.json"

OpenEncoder = Callable[[], tuple[InitialEncoder, dict[str, Tensor]]]
"""Opens the encoder that the command line names. A collective."""


class Finetuning:
    """Supervised training of an encoder with a classifier on top, MAE's recipe.

    Args:
        config: checked settings.
        options: command-line options that name the encoder.
        open_encoder: opens it; not called if a run with the same options is resumed.
        world: place of this process.
        device: device of this rank.
    """

    name = "fine-tuning"
    terms: tuple[str, ...] = ("loss/total",)
    logged: tuple[str, ...] = terms
    free_keys: tuple[str, ...] = FINETUNING_FREE_KEYS
    prior_steps = 0

    sets: Sets
    label_state: dict[str, Any]
    encoder: InitialEncoder
    augment: Augmenter
    accuracy: Accuracy
    labels: Tensor
    view_sizes: Sequence[int]

    def __init__(
        self,
        config: Finetune,
        options: dict[str, str | None],
        open_encoder: OpenEncoder,
        world: World,
        device: torch.device,
    ) -> None:
        self.config, self.world, self.device = config, world, device
        self.options, self.open_encoder = options, open_encoder
        self.side_tasks = [SideTask("evaluation", self.is_pass_complete, self.evaluate)]
        self.summary: list[str] = []

    def open_index(self, run_dir: Path) -> Index:
        """See ``Task.open_index``; opens the test images too."""
        require_equal({f"option {name}": value for name, value in self.options.items()}, REMEDY)
        data = self.config.data
        is_new = on_all_ranks(lambda: not list_checkpoints(run_dir / "checkpoints"))
        settings = data.exif_orientation, data.verify_index, is_new
        self.sets = open_pair(data.path, data.test_path, run_dir, *settings)
        require_small_groups(data.path, self.sets.train.index.row_group, "full")
        require_decodable(self.sets.test, f"data.test_path={data.test_path}")
        self.label_state = label_state(self.sets.train.index)
        num_images = len(self.sets.train)
        check_warmup(self.config, total_steps(self.config, num_images), num_images)
        return self.sets.train.index

    def build(self, saved: dict[str, Any] | None, stop: StopRequest, stack: ExitStack) -> Backend:
        config, values = self.config, None
        if saved is None:
            self.encoder, weights = self.open_encoder()
            name, sha256 = self.encoder.name, self.encoder.facts.get("sha256")
            require_equal_weights(lambda: {f"digest of {name}": sha256})
            classifier = self.build_classifier()
            values = classifier_values(classifier, weights, name, config.run.seed)
        else:
            refuse_other_labels(saved, self.label_state, config)
            self.encoder = encoder_from_dict(saved["encoder"])
            if self.options != self.encoder.options:
                refuse_other_encoder(self.encoder, self.open_encoder()[0], config.run.output_dir)
            classifier = self.build_classifier()
        student = classifier.encoder
        student.set_grad_checkpointing(config.backend.activation_checkpointing)
        self.view_sizes = (self.encoder.size,)
        self.labels = torch.as_tensor(self.sets.train.labels, device=self.device)
        self.augment = Augmenter(
            config.augment,
            seed=config.run.seed,
            classes=len(self.sets.classes),
            depth=len(student.blocks),
            drop_path=config.head.drop_path,
            mean=self.encoder.mean,
            std=self.encoder.std,
        )
        self.accuracy = Accuracy(
            self.build_classifier(), self.encoder, self.sets.test, config, self.world, self.device
        )
        backend = make_backend(
            config,
            self.world,
            self.device,
            classifier,
            None,
            cross_entropy,
            rows=config.train.global_batch_size,
            lr_scale=layer_scale(len(student.blocks), config.optimizer.layer_decay),
        )
        if values is not None:
            initialise_backend(backend, values)
        return backend

    def build_classifier(self) -> Classifier:
        """Build a classifier of the run's shape on the meta device."""
        student, size = self.encoder.student, self.encoder.size
        with torch.device("meta"):
            return build_classifier(
                student, size, classes=len(self.sets.classes), pool=self.config.head.pool
            )

    def open_stream(self, position: int) -> Stream:
        config = self.config
        return Stream(
            self.sets.train.index,
            seed=config.run.seed,
            micro_batch=batch_plan(config, self.world.world_size).micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            sizes=(self.encoder.size,),
            scale=config.augment.crop_scale,
            ratio=config.augment.aspect_ratio,
            flip=config.augment.hflip,
            threads=config.data.workers,
            worker_type=config.data.worker_type,
            start_position=position,
            decode=config.data.decode,
            device=self.device,
            quarantine=Path(config.run.output_dir) / "quarantine.jsonl",
        )

    def scalars(self, progress: Progress) -> Scalars:
        """See ``Task.scalars``."""
        epochs = progress.horizon / len(self.sets.train)
        return scalars_at(self.config, progress.fraction, epochs)

    def prepare_fixed(self, batch: Batch) -> Examples:
        """See ``Task.prepare_fixed``: augmented views with the targets of their labels."""
        return self.augment(batch, self.labels[batch.sample_id])

    def prepare(
        self, batch: Batch, fixed: Examples, scalars: Scalars
    ) -> tuple[Examples, Sequence[Tensor]]:
        return fixed, ()

    def check_inputs(self, step: int) -> None:
        """See ``Task.check_inputs``; images and labels are always finite."""

    def step_sums(self) -> Tensor:
        return torch.zeros(0, device=self.device)

    def record_applied(self, sums: Sequence[float]) -> None:
        """See ``Task.record_applied``; there are no sums."""

    def restore(self, saved: dict[str, Any]) -> None:
        """See ``Task.restore``; the encoder is that of ``build``."""

    def saved_state(self) -> dict[str, Any]:
        return {"encoder": self.encoder.to_dict(), **self.label_state}

    def is_pass_complete(self, progress: Progress) -> bool:
        """Return whether the last step ended a pass over the images, but not the run."""
        num_images = len(self.sets.train)
        before = progress.position - self.config.train.global_batch_size
        is_new_pass = progress.position // num_images > before // num_images
        return is_new_pass and progress.step < progress.end_step

    def evaluate(self, run: Run) -> None:
        """Measure and log the accuracy on the test images. A collective."""
        self.measure_accuracy(run)

    def measure_accuracy(self, run: Run) -> tuple[Score, str]:
        """Measure and log the accuracy; return it with the SHA-256 of the weights."""
        began = time.monotonic()
        score, digest = self.accuracy(run.backend)
        values = {
            "eval/pass": float(run.progress.position // len(self.sets.train)),
            "eval/top1": score.correct / score.total,
        }
        if len(self.sets.classes) > TOP:
            values["eval/top5"] = score.correct_top5 / score.total
        if run.telemetry is not None:
            took_s = time.monotonic() - began
            run.telemetry.record_side_task("eval", run.progress.step, values, took_s)
        return score, digest

    def conclude(self, run: Run) -> None:
        """See ``Task.conclude``: measure the last weights and write the result."""
        run.place.enter("evaluation", run.progress.step)
        score, digest = self.measure_accuracy(run)
        pool = {"mean": "patches", "cls": "cls"}[self.config.head.pool]
        row = Row(self.encoder.name, pool, "fine-tuned", score)
        file = run.run_dir / RESULT_FILE
        run.writer.require_lock_on_all_ranks()

        def write() -> None:
            record = self.record_result(run.progress, row, digest)
            write_result(file, record, f"make it writable and {AGAIN}")

        on_all_ranks(write if self.world.rank == 0 else lambda: None)
        self.summary = self.summarise(run.progress, row, file)

    def summarise(self, progress: Progress, row: Row, file: Path) -> list[str]:
        """Return the lines that the command prints."""
        config, encoder, sets = self.config, self.encoder, self.sets
        excluded = len(sets.test) - row.score.total
        return [
            f"{encoder.name}: {name_student(encoder.student)} at {encoder.size} pixels, "
            f"{progress.end_step} steps of {config.train.global_batch_size}",
            f"train: {len(sets.train)} images of {len(sets.classes)} classes ({config.data.path})",
            f"test:  {row.score.total} images ({config.data.test_path})",
            *([f"excluded: {excluded} images that cannot be decoded"] if excluded else []),
            "",
            format_rows([row], len(sets.classes)),
            "",
            "the interval takes the test images as independent of each other",
            f"written to {file}",
        ]

    def record_result(self, progress: Progress, row: Row, digest: str) -> dict[str, Any]:
        """Return the whole result as JSON values."""
        config, encoder, sets = self.config, self.encoder, self.sets
        return result_record(
            [row],
            len(sets.classes),
            method="finetune",
            subject=encoder.facts,
            size=encoder.size,
            weights_sha256={encoder.name: encoder.facts["sha256"], "fine-tuned": digest},
            steps=progress.end_step,
            passes=progress.position / len(sets.train),
            images={
                "train": image_set_record(config.data.path, sets.train, len(sets.train)),
                "test": image_set_record(config.data.test_path, sets.test, row.score.total),
            },
            settings=config_to_dict(config),
            seed=config.run.seed,
        )


def check_warmup(config: Finetune, steps: int, num_images: int) -> None:
    """Refuse a warm-up that is not shorter than a run of ``steps`` steps.

    Raises:
        ConfigError: names both lengths.
    """
    epochs = steps * config.train.global_batch_size / num_images
    if config.optimizer.warmup_epochs >= epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}: the run has only "
            f"{epochs:.4g} passes over {num_images} images; lower it"
        )
