"""Draw the figure of docs/method.md: what each mask sampler keeps visible.

``python -m cmtmae_scale.tools.figures.samplers docs/samplers.png``
"""

import sys

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cmtmae_scale.method.attention import normalise_map, visible_mass
from cmtmae_scale.method.masking import (
    SAMPLERS,
    PatchChoice,
    hash_uniform,
    select_patches,
    token_counts,
)
from cmtmae_scale.tools.figures.sheet import INK, PALE, PAPER, apply_colour_map, draw_text

GRID, RATIO, SALIENT_FRACTION = 14, 0.75, 0.5
DRAWS, SHOWN = 200, 3
PIXELS = 6
"""Side of a patch in the figure."""
TILE, GAP, MARGIN, LABEL, HEAD = GRID * PIXELS, 8, 12, 196, 24
MASKED = 232
"""Light grey of a masked patch."""
LEGEND = (
    "Masks: coloured patches are visible, light ones masked.  "
    "Mean: dark is never visible, bright always."
)
SENTENCES = {
    "random": ("uniform, as in MAE",),
    "hide_salient": ("masks the most salient",),
    "hide_salient_mix": ("half of the masked are the most", "salient, the others random"),
    "hide_salient_sample": ("samples the masked patches in", "proportion to the attention"),
    "reveal_salient": ("samples the visible patches in", "proportion to the attention"),
    "reveal_salient_topk": ("keeps the most salient visible",),
}


def synthetic_attention() -> Tensor:
    """Return a smooth attention map with two peaks on a low floor, ``[1, N]``, sum 1."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(GRID, dtype=torch.float64)
    attention = torch.full((GRID, GRID), 0.15, dtype=torch.float64)
    peak = 3 + 2 * torch.rand(2, generator=generator, dtype=torch.float64)
    for height, (row, column) in ((1.0, peak), (0.6, GRID - 1 - peak)):
        distance = (place[:, None] - row) ** 2 + (place - column) ** 2
        attention += height * torch.exp(-distance / 8)
    return normalise_map(attention.view(1, -1), "prob")


def sample_choice(sampler: str, attention: Tensor) -> PatchChoice:
    """Return ``DRAWS`` masks of one attention map."""
    return select_patches(
        attention.expand(DRAWS, -1),
        hash_uniform(0, 0, torch.arange(DRAWS), GRID * GRID),
        sampler=sampler,
        num_keep=token_counts(GRID * GRID, RATIO)[0],
        salient_frac=SALIENT_FRACTION,
    )


def draw_samplers() -> Image.Image:
    """Draw one row per sampler: attention map, three masks, how often each patch is visible."""
    attention = synthetic_attention()
    tone = 0.15 + 0.85 * normalise_map(attention, "minmax").view(GRID, GRID)
    width = 2 * MARGIN + LABEL + (SHOWN + 2) * (TILE + GAP) - GAP
    foot = MARGIN + HEAD + len(SAMPLERS) * (TILE + GAP)
    figure = Image.new("RGB", (width, foot + 28), PAPER)
    pen = ImageDraw.Draw(figure)
    titles = ["attention map", *(f"mask {number}" for number in range(1, SHOWN + 1))]
    for place, title in enumerate([*titles, f"mean of {DRAWS}"]):
        draw_text(pen, (tile_left(place), MARGIN), title, 12, PALE, TILE)
    for row, sampler in enumerate(SAMPLERS):
        choice = sample_choice(sampler, attention)
        visible = torch.zeros(DRAWS, GRID * GRID).scatter(1, choice.ids_keep, 1.0)
        visible = visible.view(DRAWS, GRID, GRID)
        top = MARGIN + HEAD + row * (TILE + GAP)
        mass = float(visible_mass(attention, choice.ids_keep))
        lines = [*SENTENCES[sampler], f"{mass:.0%} of the attention stays visible"]
        draw_text(pen, (MARGIN, top + 6), sampler, 13, INK, LABEL - GAP)
        for number, line in enumerate(lines):
            draw_text(pen, (MARGIN, top + 26 + 16 * number), line, 12, PALE, LABEL - GAP)
        masks = [torch.where(mask > 0, tone, torch.nan) for mask in visible[:SHOWN]]
        for place, values in enumerate([tone, *masks, visible.mean(dim=0)]):
            figure.paste(enlarge(values), (tile_left(place), top))
    draw_text(pen, (MARGIN, foot + 2), LEGEND, 12, PALE, width - 2 * MARGIN)
    return figure


def tile_left(place: int) -> int:
    """Return the left edge of a column of tiles."""
    return MARGIN + LABEL + place * (TILE + GAP)


def enlarge(values: Tensor) -> Image.Image:
    """Return values in [0, 1] ``[GRID, GRID]`` as a tile; NaN is a masked patch."""
    colours = torch.from_numpy(255 * apply_colour_map(values)).round().to(torch.uint8)
    pixels = torch.where(values.isnan()[..., None], MASKED, colours).to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((TILE, TILE), Image.Resampling.NEAREST)


def write_figure(path: str) -> None:
    """Write the figure as a PNG of few colours."""
    draw_samplers().quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    write_figure(sys.argv[1])
