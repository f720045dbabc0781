"""Choose the visible patches: one key per patch, one stable sort.

Patches with large keys are visible; the sorted order is cut into visible, thrown and masked
patches. Noise is a hash of (seed, salt, position, patch), so a mask does not depend on the number
of ranks. All shapes are fixed by the config; nothing synchronises with the host.

Legend: B views in a micro-batch, R rows (masks_per_view masks of each view), N patches, K visible,
M masked, T thrown.

Source: docs/method.md, sections "Token counts", "Samplers", "Hashed noise".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.config.schema import Mask
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attention import ascending_rank, normalise_map

SAMPLERS = (
    "random",
    "hide_salient",
    "hide_salient_mix",
    "hide_salient_sample",
    "reveal_salient",
    "reveal_salient_topk",
)
WEIGHTED_SAMPLERS = ("hide_salient_sample", "reveal_salient")
"""Those that draw by weights."""
LARGEST_KEY = 1e30
HINT_KEY = 2e30
"""Above every sanitised key."""

SALTS_PER_MASK = 3
KEY_SALT, EXTRA_SALT, SUBSET_SALT = range(SALTS_PER_MASK)
"""Mask k of a view draws with salt 3 k its keys, with 3 k + 1 its hints and the coin of
``mask.prob``, with 3 k + 2 the subset of its masked patches that is predicted."""

GOLDEN = 0x9E3779B97F4A7C15
SEED_STEP = 0xD1B54A32D192ED03
SALT_STEP = 0x8CB92BA72F3D8DD7
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def signed(value: int) -> int:
    """Reduce modulo 2^64 to the range of int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically (torch shifts arithmetically)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(z: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64; int64 products wrap around."""
    z = (z ^ shift_right(z, 30)) * signed(MIX_1)
    z = (z ^ shift_right(z, 27)) * signed(MIX_2)
    return z ^ shift_right(z, 31)


@torch.no_grad()
def hash_uniform(seed: int, salt: int, ids: Tensor, length: int) -> Tensor:
    """Return uniform noise that is a pure function of (seed, salt, id, index).

    Args:
        seed: seed of the run.
        salt: separates independent draws at one position; see ``KEY_SALT`` and its siblings.
        ids: global sample indices (``position``), int64, ``[B]``.
        length: numbers per id.

    Returns:
        ``[B, length]``, float32, in (0, 1) with 23 bits; 0 and 1 never occur, so Gumbel noise is
        finite. Equal on every device and rank, and for every split of the batch.

    Raises:
        TypeError: if the ids are not int64.

    Source: docs/method.md, section "Hashed noise".
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"ids are {ids.dtype}; expected int64")
    base = splitmix64(ids * signed(GOLDEN) + signed(seed * SEED_STEP + salt * SALT_STEP))
    index = torch.arange(1, length + 1, device=ids.device) * signed(GOLDEN)
    z = splitmix64(base[:, None] + index)  # [B, length]
    return (shift_right(z, 41).float() + 0.5) * 2.0**-23


def token_counts(length: int, ratio: float, throw_ratio: float = 0.0) -> tuple[int, int, int]:
    """Return how many patches are visible, masked and thrown.

    Args:
        length: N.
        ratio: fraction masked.
        throw_ratio: fraction neither encoded nor predicted.

    Returns:
        ``(num_keep, num_hidden, num_thrown)``, which sum to N. The margin of 1e-6 corrects float
        rounding (``int(10 * (1 - 0.9)) == 0``).

    Raises:
        ValueError: if no patch would be visible or none masked.

    Source: docs/method.md, section "Token counts".
    """
    if throw_ratio > 0.0:
        hidden = int(length * ratio + 1e-6)
        thrown = int(length * (ratio + throw_ratio) + 1e-6) - hidden
        keep = length - hidden - thrown
    else:
        keep = int(length * (1.0 - ratio) + 1e-6)
        hidden, thrown = length - keep, 0
    if keep < 1 or hidden < 1 or thrown < 0:
        raise ValueError(
            f"{length} patches with ratio={ratio} and throw_ratio={throw_ratio} give "
            f"{keep} visible, {hidden} masked, {thrown} thrown; at least 1 visible and 1 masked "
            "are needed"
        )
    return keep, hidden, thrown


def grid_counts(mask: Mask, length: int) -> tuple[int, int, int]:
    """Return the token counts of a config on a grid of N patches, which the mask must fit.

    Args:
        mask: the config's group.
        length: N.

    Returns:
        See ``token_counts``.

    Raises:
        ConfigError: names the key that does not fit N patches.
    """
    try:
        counts = token_counts(length, mask.ratio, mask.throw_ratio)
    except ValueError as error:
        raise ConfigError(f"mask.ratio, mask.throw_ratio: {error}") from error
    hints, pool = (round(share * length) for share in (mask.hint_fraction, mask.hint_pool))
    if mask.hint_fraction > 0 and not 1 <= hints <= min(counts[0], pool):
        raise ConfigError(
            f"mask.hint_fraction={mask.hint_fraction} of {length} patches is {hints} hints; at "
            f"least 1, and at most {min(counts[0], pool)} fit {counts[0]} visible patches and a "
            f"pool of {pool} (mask.hint_pool={mask.hint_pool})"
        )
    if mask.sampler in WEIGHTED_SAMPLERS and mask.floor * length >= 1:
        raise ConfigError(
            f"mask.floor={mask.floor}: with {length} patches it must be below 1/{length} = "
            f"{1 / length:.3g}, since the patches' weights sum to 1"
        )
    return counts


class PatchChoice(NamedTuple):
    """One mask per row: the three tensors of a row together are a permutation of the N patches."""

    ids_keep: Tensor
    """Visible patches, int64 ``[R, K]``, largest key first."""
    ids_hidden: Tensor
    """Masked patches, int64 ``[R, M]``; where only Q of them are predicted, these are the first Q.
    Largest key first, unless ``choose_masks`` shuffled them for the predicted subset."""
    ids_thrown: Tensor
    """Patches neither encoded nor predicted, int64 ``[R, T]``, largest key first; T may be 0."""


@torch.no_grad()
def select_patches(
    attention: Tensor | None,
    noise: Tensor,
    *,
    sampler: str,
    num_keep: int,
    num_thrown: int = 0,
    extra_noise: Tensor | None = None,
    salient_frac: float | Tensor = 0.0,
    hint_frac: float = 0.0,
    hint_pool: float = 0.1,
    mask_prob: float = 1.0,
    temperature: float = 1.0,
    floor: float = 1e-6,
) -> PatchChoice:
    """Choose visible, thrown and masked patches.

    Args:
        attention: attention map, ``[B, N]``, whose values may be anything, NaN included; ``None``
            only for ``random`` without hints.
        noise: uniform in (0, 1), ``[B, N]``.
        sampler: one of ``SAMPLERS``.
        num_keep: K.
        num_thrown: T.
        extra_noise: a second draw, ``[B, N + 1]``, required by hints and by ``mask_prob`` < 1.
            The last number is the coin of ``mask_prob``. The first N select the hints of a row
            that the sampler masks, or are the key of a row that the coin exempts; each row uses
            them for one of the two.
        salient_frac: fraction of the masked patches that are the most salient ones
            (``hide_salient_mix``), in [0, 1]; a 0-dim tensor changes without recompilation.
        hint_frac: fraction of N that is revealed at random among the most salient patches.
        hint_pool: fraction of N that counts as most salient for hints.
        mask_prob: probability that a row is masked by ``sampler``; the other rows are masked at
            random, without hints. No effect on ``random`` without hints.
        temperature: temperature of the weighted samplers, > 0.
        floor: smallest weight of a patch in the weighted samplers.

    Returns:
        Exactly K visible, T thrown and M masked patches for any values of the attention map.

    Raises:
        ValueError: for an unknown sampler, missing attention or noise, or shapes or counts that do
            not fit.

    Source: docs/method.md, sections "Samplers" and "Hints and throwing".
    """
    length = noise.shape[1]
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if num_keep < 1 or num_thrown < 0 or num_keep + num_thrown >= length:
        raise ValueError(f"num_keep={num_keep} and num_thrown={num_thrown} do not fit {length}")
    num_hints = round(hint_frac * length)
    steered = sampler != "random" or num_hints > 0
    saliency = prepare_saliency(attention, noise) if steered else noise
    if sampler == "random":
        key = noise
    else:
        num_hidden = length - num_keep - num_thrown
        key = sampler_key(sampler, saliency, noise, num_hidden, salient_frac, temperature, floor)
    key = torch.nan_to_num(key, nan=-LARGEST_KEY, posinf=LARGEST_KEY, neginf=-LARGEST_KEY)
    if steered and (num_hints > 0 or mask_prob < 1.0):
        second, coin = split_extra_noise(extra_noise, noise)
        if num_hints > 0:
            key = reveal_hints(key, saliency, second, num_hints, hint_pool, num_keep)
        if mask_prob < 1.0:
            key = torch.where(coin < mask_prob, key, second)
    order = torch.argsort(key, dim=1, descending=True, stable=True)
    cut = num_keep + num_thrown
    return PatchChoice(
        ids_keep=order[:, :num_keep].contiguous(),
        ids_hidden=order[:, cut:].contiguous(),
        ids_thrown=order[:, num_keep:cut].contiguous(),
    )


def prepare_saliency(attention: Tensor | None, noise: Tensor) -> Tensor:
    """Return a checked attention map in float32: non-finite values become 0, negative ones stay."""
    if attention is None:
        raise ValueError("this sampler or its hints need an attention map; found none")
    if attention.shape != noise.shape:
        raise ValueError(
            f"attention {tuple(attention.shape)} and noise {tuple(noise.shape)} differ in shape"
        )
    return torch.nan_to_num(attention.float(), nan=0.0, posinf=0.0, neginf=0.0)


def split_extra_noise(extra_noise: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second draw ``[B, N]`` and the coin ``[B, 1]``."""
    batch, length = noise.shape
    if extra_noise is None:
        raise ValueError("hints and mask_prob below 1 need extra_noise [B, N + 1]; found none")
    if extra_noise.shape != (batch, length + 1):
        raise ValueError(
            f"extra_noise has shape {tuple(extra_noise.shape)}; expected {(batch, length + 1)}"
        )
    return extra_noise[:, :length], extra_noise[:, length:]


def sampler_key(
    sampler: str,
    saliency: Tensor,
    noise: Tensor,
    num_hidden: int,
    salient_frac: float | Tensor,
    temperature: float,
    floor: float,
) -> Tensor:
    """Return the keys of an attention-guided sampler, float32 ``[B, N]``.

    Weighted samplers add Gumbel noise to log weights; sorting these keys samples without
    replacement.
    """
    if sampler == "hide_salient":
        return -saliency
    if sampler == "reveal_salient_topk":
        return saliency
    if sampler == "hide_salient_mix":
        return mixed_key(saliency, noise, num_hidden, salient_frac)
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be above 0")
    length = saliency.shape[1]
    if not floor * length < 1.0:
        raise ValueError(f"floor={floor} must be below 1/{length}: the weights sum to 1")
    weight = (1.0 - floor * length) * normalise_map(saliency, "prob") + floor
    gumbel = -torch.log(-torch.log(noise))
    drawn = torch.log(weight) / temperature + gumbel
    return -drawn if sampler == "hide_salient_sample" else drawn


def mixed_key(
    saliency: Tensor, noise: Tensor, num_hidden: int, salient_frac: float | Tensor
) -> Tensor:
    """Return keys that mask the round(salient_frac * M) most salient patches, others at random."""
    if isinstance(salient_frac, Tensor):
        # in float64, as Python rounds; a float32 count compares with ranks as an integer does
        count: int | Tensor = torch.round(salient_frac.double() * num_hidden).float()
    else:
        if not 0.0 <= salient_frac <= 1.0:
            raise ValueError(f"salient_frac={salient_frac} must lie in [0, 1]")
        count = round(salient_frac * num_hidden)
    rank = (saliency.shape[1] - 1 - ascending_rank(saliency)).float()  # 0 = most salient
    return torch.where(rank < count, -(2.0 + count - rank), noise)


def reveal_hints(
    key: Tensor, saliency: Tensor, draw: Tensor, num_hints: int, hint_pool: float, num_keep: int
) -> Tensor:
    """Give ``num_hints`` random patches of the most salient ``hint_pool`` the largest key.

    Raises:
        ValueError: if there are more hints than visible patches or than patches in the pool.
    """
    length = key.shape[1]
    pool = round(hint_pool * length)
    if num_hints > num_keep:
        raise ValueError(f"{num_hints} hints do not fit {num_keep} visible patches")
    if num_hints > pool:
        raise ValueError(f"{num_hints} hints do not fit a pool of {pool} patches; raise hint_pool")
    in_pool = length - 1 - ascending_rank(saliency) < pool
    score = torch.where(in_pool, draw, -1.0)
    chosen = length - 1 - ascending_rank(score) < num_hints
    return torch.where(chosen, HINT_KEY, key)


def shuffle_hidden(choice: PatchChoice, noise: Tensor) -> PatchChoice:
    """Order the masked patches by noise ``[R, N]``, so that the first ones are a uniform subset."""
    order = torch.argsort(noise.gather(1, choice.ids_hidden), dim=1, descending=True, stable=True)
    # torch 2.11 cannot compile _replace
    return PatchChoice(choice.ids_keep, choice.ids_hidden.gather(1, order), choice.ids_thrown)


@torch.no_grad()
def choose_masks(
    mask: Mask,
    attention: Tensor | None,
    positions: Tensor,
    seed: int,
    salient_frac: float | Tensor,
    *,
    length: int | None = None,
    num_predicted: int | None = None,
) -> PatchChoice:
    """Choose the masks of a micro-batch as configured.

    Args:
        mask: the config's group.
        attention: collaborative attention map, ``[B, N]``; ``None`` for ``random``, with
            ``length`` given.
        positions: global sample indices, int64 ``[B]``.
        seed: seed of the run.
        salient_frac: ``mask.salient_fraction`` evaluated at this step, a float or a 0-dim tensor.
        length: N where there is no attention map.
        num_predicted: masked patches that the decoder predicts (``TokenLayout.num_hidden``);
            ``None``: all. Fewer than M are a uniform random subset, the first of ``ids_hidden``.

    Returns:
        Rows b * k + j for mask j of view b, k = ``mask.masks_per_view``. A pure function of the
        attention map, the seed, the position and j.

    Raises:
        ValueError: if neither an attention map nor a length is given.

    Source: docs/method.md, sections "Samplers", "Hashed noise" and "Predicted subset".
    """
    if attention is not None:
        length = attention.shape[1]
    if length is None:
        raise ValueError("give an attention map or the number of patches (length)")
    num_keep, num_hidden, num_thrown = token_counts(length, mask.ratio, mask.throw_ratio)

    def draw(salt: int, count: int) -> Tensor:
        salts = range(salt, SALTS_PER_MASK * mask.masks_per_view, SALTS_PER_MASK)
        noise = [hash_uniform(seed, each, positions, count) for each in salts]
        return torch.stack(noise, dim=1).flatten(0, 1)  # [R, count]

    if attention is not None:
        attention = attention.repeat_interleave(mask.masks_per_view, dim=0)  # [R, N]
    extra = mask.hint_fraction > 0.0 or mask.prob < 1.0
    choice = select_patches(
        attention,
        draw(KEY_SALT, length),
        sampler=mask.sampler,
        num_keep=num_keep,
        num_thrown=num_thrown,
        extra_noise=draw(EXTRA_SALT, length + 1) if extra else None,
        salient_frac=salient_frac,
        hint_frac=mask.hint_fraction,
        hint_pool=mask.hint_pool,
        mask_prob=mask.prob,
        temperature=mask.temperature,
        floor=mask.floor,
    )
    # The keys of ``random`` are independent noise: its first masked patches are already uniform.
    if num_predicted and num_predicted < num_hidden and mask.sampler != "random":
        choice = shuffle_hidden(choice, draw(SUBSET_SALT, length))
    return choice
