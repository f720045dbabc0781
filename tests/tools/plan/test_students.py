"""The sizes in docs/students.md are a hand calculation, and the numbers of the plan."""

from pathlib import Path
from typing import NamedTuple

import pytest

from cmtmae_scale.config.load import load_config
from cmtmae_scale.tools.estimate import build_meta_networks, count_flops, saved_bytes, state_bytes

ROOT = Path(__file__).parents[3]
GPUS = (8, 64, 512)
GIB = 2**30
SHARED = (
    "backend.sharding=full",
    "backend.activation_checkpointing=true",
    "backend.reduce_every_micro_step=true",
    "train.micro_batch_size=8",
)
PATCHES, KEPT, PIXELS = 196, 49, 3 * 16 * 16
MASKED = PATCHES - KEPT
E, BLOCKS, F = 512, 8, 768  # the decoder of vit_large, the projection of CLIP ViT-L/14
TEACHER = 24 * (12 * 1024**2 + 13 * 1024) + 588 * 1024 + 197 * 1024 + 5 * 1024 + 1024 * F


class Size(NamedTuple):
    arch: str
    width: int
    depth: int
    heads: int
    vectors: int
    """Vectors of a block, in widths: biases, norms, layer scales."""
    tokens: int
    """Prefix tokens."""
    fixed: int
    """Positional embeddings."""

    @property
    def overrides(self) -> list[str]:
        sizes = [f"student.{name}={getattr(self, name)}" for name in self._fields[:4]]
        return [*sizes, *SHARED]


SIZES = {
    "2B": Size("vit_large_patch16_224", 2048, 40, 16, 13, 1, PATCHES + 1),
    "7B": Size("vit_large_patch16_dinov3", 4096, 34, 32, 12, 5, 0),
}


class ByHand(NamedTuple):
    encoder: int
    trained: int
    student_flops: float
    momentum_flops: float
    states: dict[int, float]


def calculate(size: Size) -> ByHand:
    """Count by the formulas of the page."""
    d, depth = size.width, size.depth
    own_block, decoder_block = 12 * d * d + size.vectors * d, 12 * E * E + 13 * E
    encoder = depth * own_block
    encoder += (PIXELS + 1) * d + (size.fixed + size.tokens + 2) * d
    decoder = BLOCKS * decoder_block + (d + 1) * E + 3 * E + (E + 1) * (F + d)
    trained = encoder - size.fixed * d + decoder

    def encode(patches: int) -> int:
        tokens = patches + size.tokens
        blocks = depth * (24 * d * d * tokens + 4 * tokens * tokens * d)
        return 2 * patches * PIXELS * d + blocks

    visible = KEPT + size.tokens
    keys = visible + MASKED
    block = 20 * MASKED * E * E + 4 * keys * E * E + 4 * MASKED * keys * E
    predicted = 2 * (PATCHES + 1) * E * (F + d)
    student = encode(KEPT) + 2 * visible * d * E + BLOCKS * block + predicted
    momentum = encode(PATCHES) + 2 * (PATCHES + size.tokens) * d  # and the row of the class token
    gathered = trained - (depth - 2) * own_block - BLOCKS * decoder_block
    whole = 2 * (TEACHER + gathered)
    states = {n: (18 * trained + 6 * encoder) / n + whole for n in GPUS}
    return ByHand(encoder, trained, 3.0 * student, float(momentum), states)


def row_of(name: str, peak: dict[int, float]) -> str:
    """Return a row of the page's table."""
    size, found = SIZES[name], calculate(SIZES[name])
    cells = [
        name,
        f"`{size.arch}`, {size.width}, {size.depth}, {size.heads}",
        f"{found.encoder / 1e6:,.0f} M",
        f"{found.trained / 1e6:,.0f} M",
        f"{found.student_flops / 1e9:,.0f} + {found.momentum_flops / 1e9:,.0f} G",
        " / ".join(f"{found.states[n] / GIB:.1f}" for n in GPUS),
        " / ".join(f"{peak[n] / GIB:.1f}" for n in GPUS),
    ]
    return f"| {' | '.join(cells)} |"


def page_row(name: str) -> str:
    lines = (ROOT / "docs/students.md").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {name} |")]
    return found


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_sizes_is_a_hand_calculation(name: str) -> None:
    peak = page_row(name).split(" | ")[-1].removesuffix(" |")
    numbers = dict(zip(GPUS, (GIB * float(one) for one in peak.split(" / ")), strict=True))
    assert page_row(name) == row_of(name, numbers)
    states = calculate(SIZES[name]).states
    assert all(numbers[n] > states[n] - GIB / 20 for n in GPUS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_plan_counts_what_the_hand_calculation_says(name: str) -> None:
    config = load_config(ROOT / "configs/vit_large.yaml", SIZES[name].overrides)
    networks, found = build_meta_networks(config), calculate(SIZES[name])
    assert networks.teachers and networks.momentum is not None
    assert found.encoder == sum(one.numel() for one in networks.momentum.parameters())
    flops = count_flops(config, networks)
    assert flops.student == pytest.approx(found.student_flops, rel=1e-3)
    assert flops.momentum == pytest.approx(found.momentum_flops, rel=1e-3)
    activations = 8 * saved_bytes(config, networks.teachers)
    peak: dict[int, float] = {}
    for gpus in GPUS:
        states = sum(state_bytes(config, gpus, networks, 8).values())
        assert states == pytest.approx(found.states[gpus], rel=1e-3)
        peak[gpus] = states + activations
    assert page_row(name) == row_of(name, peak)
