"""Which patches the student sees: one key a patch, one stable sort.

A large key is visible first; the order of keys is cut into visible, thrown and hidden patches.
Noise is a hash of (seed, salt, position, patch), so that a mask does not depend on the number of
ranks. Fixed shapes, no host synchronisation.

Legend: B views in a micro-batch, R rows (masks_per_view masks of each view), N patches, K visible,
M hidden, T thrown.

Source: method.md 4.5 to 4.7.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmtmae_scale.config.schema import Mask
from cmtmae_scale.method.attention import ascending_rank, normalise_map

SAMPLERS = (
    "random",
    "hide_salient",
    "hide_salient_mix",
    "hide_salient_sample",
    "reveal_salient",
    "reveal_salient_topk",
)
LARGEST_KEY = 1e30
HINT_KEY = 2e30
"""Above every sanitised key."""

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
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 on int64, whose products wrap around."""
    z = (z ^ shift_right(z, 30)) * signed(MIX_1)
    z = (z ^ shift_right(z, 27)) * signed(MIX_2)
    return z ^ shift_right(z, 31)


@torch.no_grad()
def hash_uniform(seed: int, salt: int, ids: Tensor, length: int) -> Tensor:
    """Uniform noise that is a pure function of (seed, salt, id, index).

    Args:
        seed: of the run.
        salt: number of the draw within its view: 3 k for mask k, 3 k + 1 for its second draw.
        ids: global positions of the draws, int64, ``[B]``.
        length: numbers an id.

    Returns:
        ``[B, length]``, float32, in (0, 1) with 23 bits; 0 and 1 never occur, so that Gumbel noise
        stays finite. The same on every device, rank and split of the batch.

    Raises:
        TypeError: if the ids are not int64.

    Source: method.md 4.7, oracle O6.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"ids are {ids.dtype}; expected int64")
    base = mix(ids * signed(GOLDEN) + signed(seed * SEED_STEP + salt * SALT_STEP))
    index = torch.arange(1, length + 1, device=ids.device) * signed(GOLDEN)
    z = mix(base[:, None] + index)  # [B, length]
    return (shift_right(z, 41).float() + 0.5) * 2.0**-23


def token_counts(length: int, ratio: float, throw_ratio: float = 0.0) -> tuple[int, int, int]:
    """Split N patches into visible, hidden and thrown ones.

    Args:
        length: N.
        ratio: share hidden.
        throw_ratio: share neither seen nor predicted.

    Returns:
        ``(num_keep, num_hidden, num_thrown)``, summing to N. Free of MAE's float trap
        (``int(10 * (1 - 0.9)) == 0``).

    Raises:
        ValueError: if nothing would be visible or nothing hidden.

    Source: method.md 4.5 (with throwing: AMT's integers), oracles O4 and O12.
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
            f"{keep} visible, {hidden} hidden, {thrown} thrown; at least 1 visible and 1 hidden "
            "are needed"
        )
    return keep, hidden, thrown


class PatchChoice(NamedTuple):
    """One mask a row; the three parts together are a permutation of the N patches.

    Each part is in the order of the sorted keys, most visible first.
    """

    ids_keep: Tensor
    """Visible patches, int64 ``[R, K]``."""
    ids_hidden: Tensor
    """Hidden patches, int64 ``[R, M]``; where fewer are predicted, the first ones are."""
    ids_thrown: Tensor
    """Patches neither seen nor predicted, int64 ``[R, T]``; T may be 0."""

    def mask(self, length: int) -> Tensor:
        """Bool ``[R, N]``, True = hidden (visible and thrown patches are False)."""
        blank = torch.zeros(
            (self.ids_hidden.shape[0], length), dtype=torch.bool, device=self.ids_hidden.device
        )
        return blank.scatter(1, self.ids_hidden, True)

    def ids_restore(self) -> Tensor:
        """int64 ``[R, N]``: gathering [visible, thrown, hidden] with it gives patch order."""
        order = torch.cat([self.ids_keep, self.ids_thrown, self.ids_hidden], dim=1)
        return torch.argsort(order, dim=1, stable=True)


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
    """Choose visible, thrown and hidden patches.

    Args:
        attention: mixed map, ``[B, N]``, any finite or broken values; ``None`` only for ``random``
            without hints.
        noise: uniform in (0, 1), ``[B, N]``.
        sampler: one of ``SAMPLERS``.
        num_keep: K.
        num_thrown: T.
        extra_noise: the second draw, ``[B, N + 1]``, required by hints and by ``mask_prob`` < 1.
            The last number is the coin of ``mask_prob``. The first N choose the hints of a row
            that the sampler masks, or are the random key of a row that the coin exempts: a row is
            one or the other, so no number serves twice.
        salient_frac: share of the hidden set that is the most salient (``hide_salient_mix``), in
            [0, 1]; a 0-dim tensor changes without recompilation.
        hint_frac: share of N revealed at random among the most salient patches.
        hint_pool: share of N that counts as most salient for hints.
        mask_prob: probability that a row is masked by ``sampler``; other rows are plainly random,
            without hints. No effect on ``random`` without hints.
        temperature: of the weighted samplers, > 0.
        floor: smallest weight of a patch in the weighted samplers.

    Returns:
        The choice: exactly K, T and M patches whatever the map holds.

    Raises:
        ValueError: for an unknown sampler, missing map or noise, shapes or counts that do not fit.

    Source: method.md 4.6; MAE, AttMask, HPM, AMT, MILAN.
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
    """Check a map; float32 ``[B, N]`` with broken values 0 and negative ones kept (zscore)."""
    if attention is None:
        raise ValueError("this sampler or its hints need an attention map; found none")
    if attention.shape != noise.shape:
        raise ValueError(
            f"attention {tuple(attention.shape)} and noise {tuple(noise.shape)} differ in shape"
        )
    return torch.nan_to_num(attention.float(), nan=0.0, posinf=0.0, neginf=0.0)


def split_extra_noise(extra_noise: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The second draw ``[B, N]`` and the coin ``[B, 1]``."""
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
    """Key of an attention-guided sampler, float32 ``[B, N]``; large = visible first.

    Weighted samplers add Gumbel noise to log weights: sorting that is sampling without replacement.
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
    weight = (1.0 - floor * length) * normalise_map(saliency, "prob") + floor
    gumbel = -torch.log(-torch.log(noise))
    drawn = torch.log(weight) / temperature + gumbel
    return -drawn if sampler == "hide_salient_sample" else drawn


def mixed_key(
    saliency: Tensor, noise: Tensor, num_hidden: int, salient_frac: float | Tensor
) -> Tensor:
    """Key that hides the n = round(salient_frac * M) most salient patches, the rest at random."""
    if isinstance(salient_frac, Tensor):
        count: int | Tensor = torch.round(salient_frac.float() * num_hidden)
    else:
        if not 0.0 <= salient_frac <= 1.0:
            raise ValueError(f"salient_frac={salient_frac} must lie in [0, 1]")
        count = round(salient_frac * num_hidden)
    rank = (saliency.shape[1] - 1 - ascending_rank(saliency)).float()  # 0 = most salient
    return torch.where(rank < count, -(2.0 + count - rank), noise)


def reveal_hints(
    key: Tensor, saliency: Tensor, draw: Tensor, num_hints: int, hint_pool: float, num_keep: int
) -> Tensor:
    """Force ``num_hints`` random patches of the most salient ``hint_pool`` share to be visible.

    Raises:
        ValueError: if there are more hints than visible patches or than the pool holds.
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


@torch.no_grad()
def choose_masks(
    mask: Mask,
    attention: Tensor | None,
    positions: Tensor,
    seed: int,
    salient_frac: float | Tensor,
    *,
    length: int | None = None,
) -> PatchChoice:
    """Draw the masks of a micro-batch as configured.

    Args:
        mask: the config's group.
        attention: mixed map, ``[B, N]``; ``None`` for ``random``, with ``length`` given.
        positions: global positions of the draws, int64 ``[B]``.
        seed: of the run.
        salient_frac: ``mask.salient_fraction`` evaluated at this step, a float or a 0-dim tensor.
        length: N where there is no map.

    Returns:
        Rows b * k + j for mask j of view b, k = ``mask.masks_per_view``. Mask j draws its noise
        with salt 3 j, its hints and its own coin of ``mask.prob`` with salt 3 j + 1.

    Raises:
        ValueError: if neither a map nor a length is given.
    """
    if attention is not None:
        length = attention.shape[1]
    if length is None:
        raise ValueError("give an attention map or the number of patches (length)")
    num_keep, _, num_thrown = token_counts(length, mask.ratio, mask.throw_ratio)
    masks = range(mask.masks_per_view)
    noise = torch.stack([hash_uniform(seed, 3 * j, positions, length) for j in masks], dim=1)
    extra = None
    if mask.hint_fraction > 0.0 or mask.prob < 1.0:
        draws = [hash_uniform(seed, 3 * j + 1, positions, length + 1) for j in masks]
        extra = torch.stack(draws, dim=1).flatten(0, 1)  # [R, N + 1]
    if attention is not None:
        attention = attention[:, None].expand(-1, mask.masks_per_view, -1).flatten(0, 1)  # [R, N]
    return select_patches(
        attention,
        noise.flatten(0, 1),
        sampler=mask.sampler,
        num_keep=num_keep,
        num_thrown=num_thrown,
        extra_noise=extra,
        salient_frac=salient_frac,
        hint_frac=mask.hint_fraction,
        hint_pool=mask.hint_pool,
        mask_prob=mask.prob,
        temperature=mask.temperature,
        floor=mask.floor,
    )
