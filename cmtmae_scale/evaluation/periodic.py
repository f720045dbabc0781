"""k-NN, a small linear probe, segmentation and label-free measures during a run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend, Fragment
from cmtmae_scale.backends.gather import gather_tensors
from cmtmae_scale.checkpoint.layout import list_checkpoints
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.evaluation.dense import open_masked_pair
from cmtmae_scale.evaluation.encoders import PATCHES, Encoder, encoder_from_student
from cmtmae_scale.evaluation.features import ReadOptions, extract_features
from cmtmae_scale.evaluation.images import open_pair, require_decodable
from cmtmae_scale.evaluation.knn import NEIGHBOURS, count_images, knn_scores, warn_of_few_images
from cmtmae_scale.evaluation.logistic import logistic_score
from cmtmae_scale.evaluation.representation import ALL_IMAGES, represent
from cmtmae_scale.evaluation.segmentation import segment
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.student import Student
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World

RANK_IMAGES = 512
"""Test images whose ranks and similarities are measured during a run."""
SEGMENTATION_K = 10
LABEL_FREE = {
    ("patches", "RankMe"): "rankme",
    ("cls", "RankMe"): "cls/rankme",
    ("tokens", "effective rank"): "effective_rank",
    ("tokens", "effective rank, centred"): "effective_rank_centred",
    ("tokens", "cosine"): "patch_cosine",
    ("tokens", "uniformity"): "patch_uniformity",
}
"""Names in the log of the measures of ``representation.py``, by features and measure."""


class RunEvaluation:
    """Evaluates the encoder during a run; the encoder stays on the host between evaluations.

    The weights are gathered from all ranks' fragments, so the accuracies equal those of
    ``cmtmae evaluate`` for the checkpoint of the same step, with every backend.

    Raises:
        DataError: unusable images, or a set of which no image can be decoded, on every rank. A
            collective.
    """

    def __init__(self, config: Config, world: World, device: torch.device) -> None:
        train, test = str(config.eval.train_path), str(config.eval.test_path)
        run_dir = Path(config.run.output_dir)
        is_new = on_all_ranks(lambda: not list_checkpoints(run_dir / "checkpoints"))
        settings = config.data.exif_orientation, config.data.verify_index, is_new
        self.sets = open_pair(train, test, run_dir / "evaluation", *settings)
        require_decodable(self.sets.train, f"eval.train_path={train}")
        require_decodable(self.sets.test, f"eval.test_path={test}")
        self.masked = None
        if config.eval.segmentation_path is not None:
            self.masked = open_masked_pair(config.eval.segmentation_path, None, None, 0)
        self.has_warned = False
        with torch.random.fork_rng(devices=[]):
            self.student = build_student(config, Student)
        self.reading = ReadOptions(
            config.train.micro_batch_size, config.data.workers, config.data.decode
        )
        self.name = "momentum encoder" if needs(config).momentum else "student"
        self.size = config.views.image_size
        self.world = world
        self.device = device

    def __call__(self, backend: Backend) -> dict[str, float]:
        """Evaluate the momentum encoder where there is one, else the student. A collective.

        Returns:
            Accuracies in [0, 1] by name: ``eval/knn10``, ``eval/knn20``, ``eval/linear`` for the
            mean of the patches, and ``eval/cls/...`` for the class token where there is one. A k
            above the number of training images is reduced to it, and named so. Then the
            names of ``LABEL_FREE``, of at most 512 test images, and ``eval/segmentation_knn``, the
            mIoU with k = 10, where ``eval.segmentation_path`` is set.

        Raises:
            ReadError: on every rank, if storage did not return an image to one of them.
            DataError: on every rank, if features are not finite.
        """
        self.student.load_state_dict(gather_encoder(backend.fragments()), strict=True)
        try:
            encoder = encoder_from_student(self.name, self.student, self.size, self.device)
            train, test = (
                extract_features(images, [encoder], self.reading, self.world, self.device)
                for images in (self.sets.train, self.sets.test)
            )
            values = self.measure_patches(encoder)
        finally:  # a failed evaluation leaves nothing on the device
            self.student.cpu()
        found = count_images(train)
        if not self.has_warned:
            self.has_warned = True
            warn_of_few_images(found, NEIGHBOURS)
        neighbours = {k: min(k, found) for k in NEIGHBOURS}
        for column in train.columns:
            prefix = "eval/" if column.kind == PATCHES else f"eval/{column.kind}/"
            near = dict(knn_scores(train, test, column, sorted(set(neighbours.values()))))
            scores = {f"knn{k}": near[used] for k, used in neighbours.items()}
            scores["linear"] = logistic_score(train, test, column, len(self.sets.classes))
            for name, score in scores.items():
                values[prefix + name] = score.correct / score.total
        return values

    def measure_patches(self, encoder: Encoder) -> dict[str, float]:
        """Return label-free measures, and the mIoU where there are masks. A collective."""
        images, world, device = self.sets.test, self.world, self.device
        places = np.linspace(0, len(images) - 1, min(RANK_IMAGES, len(images))).round()
        ids = images.ids[places.astype(np.int64)]
        rows, _ = represent([encoder], images.index, ids, self.reading, world, device)
        values: dict[str, float] = {}
        for row in rows:
            name = LABEL_FREE.get((row.features, row.measure))
            if name is not None and row.method != ALL_IMAGES:
                values[f"eval/{name}"] = row.value
        if self.masked is not None:
            train, test = self.masked
            k = [SEGMENTATION_K]
            found, _ = segment(encoder, train, test, self.reading, 0, world, device, k, [])
            values["eval/segmentation_knn"] = found[0].value
        return values


def open_evaluation(config: Config, world: World, device: torch.device) -> RunEvaluation | None:
    """Open the evaluation of a run; ``None`` where ``eval.every`` is off."""
    return None if config.eval.every is None else RunEvaluation(config, world, device)


def gather_encoder(fragments: Mapping[str, Fragment]) -> dict[str, Tensor]:
    """Gather float32 weights of the momentum encoder, else of the student. A collective.

    Returns:
        Tensors under timm's names, on every rank, on the device of ``Backend.fragments``.
    """
    prefix = ENCODERS["momentum"]
    if not any(key.startswith(prefix) for key in fragments):
        prefix = ENCODERS["student"]
    return dict(gather_tensors(fragments, prefix))
