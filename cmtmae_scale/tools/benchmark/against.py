"""MAE's forward and backward here and in transformers: same weights and noise, alternating."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.initialisation import initialise, sincos_positions
from cmtmae_scale.method.masking import hash_uniform, select_patches, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.targets import (
    TokenLayout,
    objective,
    patchify,
    pixel_targets,
    term_weights,
)
from cmtmae_scale.tools.benchmark.clock import Spread, Stopwatch, elapsed_s
from cmtmae_scale.tools.benchmark.training import Protocol

TOLERANCE = 1e-5
"""Relative difference of the two losses, which differ only by the order of float32 sums."""


@dataclass
class MaeComparison:
    """Time of one forward and backward in alternating rounds."""

    images: int
    ours_s: Spread
    theirs_s: Spread
    ratio: Spread
    """Ours divided by theirs, round by round."""
    our_loss: float
    their_loss: float


def compare_with_transformers(
    config: Config, protocol: Protocol, device: torch.device
) -> MaeComparison:
    """Time both implementations after a check that their losses agree.

    The recipe is MAE's: full decoder, random masks, pixel targets, masked tokens. The protocol is
    ``windows`` rounds of ``steps`` each.

    Raises:
        ConfigError: a recipe other than MAE's, missing transformers, or different losses.
    """
    refuse_other_methods(config)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    size, count = config.views.image_size, config.train.micro_batch_size
    images = torch.randn(count, 3, size, size, device=device, generator=generator)
    theirs = build_transformers_mae(config).to(device)
    ours = CollaborativeMAE(config)
    initialise(ours, config.run.seed)
    load_init_weights(ours, theirs.state_dict(), "transformers")
    ours.to(device)
    length = ours.encoder.grid[0] * ours.encoder.grid[1]
    noise = hash_uniform(config.run.seed, 0, torch.arange(count, device=device), length)
    # MAE keeps the patches with the smallest noise, this package those with the largest key.
    calls = (make_loss(config, ours, images, noise), lambda: theirs(images, noise=1 - noise).loss)
    losses = [call().item() for call in calls]
    if not abs(losses[0] - losses[1]) <= TOLERANCE * abs(losses[1]):  # NaN differs too
        raise ConfigError(f"the losses differ: ours {losses[0]}, theirs {losses[1]}; please report")
    models: tuple[nn.Module, nn.Module] = (ours, theirs)
    rounds: list[list[float]] = [[], []]
    for number in range(protocol.warm_up + protocol.windows):
        for model, call, seen in zip(models, calls, rounds, strict=True):
            round_s = time_forward_backward(model, call, protocol.steps, device)
            if number >= protocol.warm_up:
                seen.append(round_s)
    ratios = [a / b for a, b in zip(*rounds, strict=True)]
    return MaeComparison(
        count, Spread.of(rounds[0]), Spread.of(rounds[1]), Spread.of(ratios), *losses
    )


def time_forward_backward(
    model: nn.Module, call: Callable[[], Tensor], steps: int, device: torch.device
) -> float:
    """Return the seconds of one forward and backward, the mean of several."""
    watch = Stopwatch(device)
    start = watch.mark()
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        call().backward()
    end = watch.mark()
    watch.collect()
    return elapsed_s(start, end) / steps


def make_loss(
    config: Config, model: CollaborativeMAE, images: Tensor, noise: Tensor
) -> Callable[[], Tensor]:
    """Return masks, targets, forward and mean loss of the training loop as one function."""
    count, length = noise.shape
    counts = token_counts(length, config.mask.ratio)
    layout = TokenLayout.from_config(config, *counts)
    valid = torch.ones(count, dtype=torch.bool, device=images.device)
    alpha = torch.zeros((), device=images.device)

    def call() -> Tensor:
        choice = select_patches(None, noise, sampler="random", num_keep=counts[0])
        pixels = pixel_targets(patchify(images, model.encoder.patch_side), config.target.pixel.norm)
        targets = {"pixel": layout.without_cls().gather(pixels, choice)}
        predictions = model(images, choice)
        weights = term_weights(config, alpha)
        losses = objective(predictions, targets, valid, layout, config.loss, weights)
        return losses["total"] / count

    return call


def build_transformers_mae(config: Config) -> Any:
    """Build transformers' ViTMAE of the same shape, with its own initialisation."""
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise ConfigError(
            "--against hf_mae needs transformers: pip install 'cmtmae-scale[hf]'"
        ) from error
    with torch.device("meta"):
        encoder = CollaborativeMAE(config).encoder
    block = cast(Any, encoder.blocks[0])
    torch.manual_seed(config.run.seed)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            image_size=config.views.image_size,
            patch_size=encoder.patch_side,
            layer_norm_eps=1e-6,
            decoder_hidden_size=config.decoder.width,
            decoder_num_hidden_layers=config.decoder.depth,
            decoder_num_attention_heads=config.decoder.heads,
            decoder_intermediate_size=4 * config.decoder.width,
            mask_ratio=config.mask.ratio,
            norm_pix_loss=config.target.pixel.norm == "patch",
        )
    )
    with torch.no_grad():  # some versions fill the tables only when a file is loaded
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table[0, 1:] = sincos_positions(table.shape[2], encoder.grid)
    return model


def refuse_other_methods(config: Config) -> None:
    """Refuse settings that transformers' ViTMAE does not compute."""
    expected = {
        "decoder.type": (config.decoder.type, "full"),
        "mask.sampler": (config.mask.sampler, "random"),
        "mask.masks_per_view": (config.mask.masks_per_view, 1),
        "loss.tokens": (config.loss.tokens, "masked"),
        "loss.teacher": (config.loss.teacher, 0),
        "loss.student": (config.loss.student, 0),
    }
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise ConfigError(
                f"--against hf_mae: {key}={found}, but MAE has {wanted}; use --config mae_base"
            )


def render_mae_comparison(outcome: MaeComparison, on_gpu: bool) -> str:
    """Return Markdown."""
    unit = "s" if on_gpu else "CPU-s"
    return (
        f"MAE, {outcome.images} images, forward and backward, float32, losses "
        f"{outcome.our_loss:.10f} (ours) and {outcome.their_loss:.10f} (transformers)\n\n"
        f"| | {unit}, median (lowest to highest) |\n| --- | --- |\n"
        f"| ours | {outcome.ours_s} |\n| transformers | {outcome.theirs_s} |\n"
        f"| ours / transformers, by round | {outcome.ratio} |"
    )
