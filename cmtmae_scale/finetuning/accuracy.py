"""Measures the accuracy of the present weights, with each test image once over all ranks."""

import torch

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.backends.gather import gather_tensors
from cmtmae_scale.backends.initial import materialise
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.evaluation.across import sum_over_ranks
from cmtmae_scale.evaluation.encoders import inference_autocast, weights_digest
from cmtmae_scale.evaluation.images import ImageSet
from cmtmae_scale.evaluation.result import Score, score_predictions
from cmtmae_scale.finetuning.classifier import Classifier
from cmtmae_scale.finetuning.encoder import InitialEncoder
from cmtmae_scale.method.images import normalise_images
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.log import progress_bar
from dataloading.errors import DataError
from dataloading.one_pass import OnePass


class Accuracy:
    """Measures a backend's weights with a classifier of its own, in evaluation mode.

    The weights are gathered from all ranks' fragments, whatever the backend. A GPU computes in
    bfloat16, a CPU in float32, as the other evaluations do.

    Args:
        classifier: of the trained classifier's shape, on the meta device.
        encoder: size and normalisation of the images.
        images: the test set.
        config: how images are read.
        world: place of this process.
        device: device of this rank.
    """

    def __init__(
        self,
        classifier: Classifier,
        encoder: InitialEncoder,
        images: ImageSet,
        config: Finetune,
        world: World,
        device: torch.device,
    ) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.encoder, self.images, self.config = encoder, images, config
        self.world, self.device = world, device

    @torch.no_grad()
    def __call__(self, backend: Backend) -> tuple[Score, str]:
        """Return the hits over the images that can be decoded, and the weights' SHA-256.

        A collective.

        Raises:
            ReadError: on every rank, if a rank cannot read an image from storage.
            DataError: if no image could be decoded, or if logits are not finite.
        """
        model = materialise(self.classifier.encoder, self.device)
        own = dict(model.named_parameters())
        for name, tensor in gather_tensors(backend.fragments(), "model.encoder."):
            own[name].copy_(tensor)
        digest = weights_digest(own)
        labels = torch.as_tensor(self.images.labels, device=self.device)
        counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        share = -(-len(self.images) // self.world.world_size)

        def count() -> None:
            done = 0
            with progress_bar("testing", share, "images") as report_done, self.batches() as batches:
                for batch in batches:
                    images = normalise_images(batch.images[0], self.encoder.mean, self.encoder.std)
                    with inference_autocast(self.device):
                        logits = model(images)
                    place = batch.position[batch.valid]
                    logits = logits[batch.valid].float()
                    found = score_predictions(logits, labels[place])
                    unusable = int((~logits.isfinite().all(1)).sum())
                    counts.add_(torch.tensor([*found, unusable], device=self.device))
                    done = min(done + len(batch.position), share)
                    report_done(done)

        try:
            on_all_ranks(count)
        finally:  # free the device's memory also after a failed evaluation
            model.to("meta")
        *found, unusable = sum_over_ranks(counts).tolist()
        total = Score(*found)
        if not total.total:
            raise DataError(
                f"{self.images.index.root}: none of {len(self.images)} images could be decoded"
            )
        if unusable:
            raise DataError(
                f"{self.images.index.root}: the logits of the fine-tuned weights ({digest[:12]}) "
                f"are not finite for {unusable} of {total.total} images: no accuracy is computed "
                "from them; fine-tune again with a lower optimizer.base_lr"
            )
        return total, digest

    def batches(self) -> OnePass:
        """Return this rank's test images."""
        return OnePass(
            self.images.index,
            self.images.ids,
            micro_batch=self.config.train.micro_batch_size,
            size=self.encoder.size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            threads=self.config.data.workers,
            decode=self.config.data.decode,
            device=self.device,
        )
