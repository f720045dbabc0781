"""Masks against plain references and numbers known by hand."""

import itertools
import math

import pytest
import torch

from cmtmae_scale.config.schema import Mask
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attention import collaborative_attention, visible_mass
from cmtmae_scale.method.masking import (
    SAMPLERS,
    PatchChoice,
    choose_masks,
    grid_counts,
    hash_uniform,
    select_patches,
    token_counts,
)
from tests.references import masking as reference

O2_MAP = torch.tensor([[0.4, 0.275, 0.1875, 0.1375]])


def noise_for(rows: int, length: int, salt: int = 0) -> torch.Tensor:
    return hash_uniform(0, salt, torch.arange(rows), length)


def hidden_mask(choice: PatchChoice, length: int) -> torch.Tensor:
    """Bool [R, N], True where a patch is masked."""
    blank = torch.zeros(len(choice.ids_hidden), length, dtype=torch.bool)
    return blank.scatter(1, choice.ids_hidden, True)


def is_permutation(choice: PatchChoice, length: int) -> bool:
    order = torch.cat([choice.ids_keep, choice.ids_thrown, choice.ids_hidden], dim=1)
    return bool((order.sort(dim=1).values == torch.arange(length)).all())


def test_hash_noise():
    expected = [
        [0.883310854434967, 0.4315280318260193, 0.02643376588821411],
        [0.6524484753608704, 0.7012121081352234, 0.38712412118911743],
    ]
    assert hash_uniform(0, 0, torch.tensor([0, 1]), 3).tolist() == expected


@pytest.mark.parametrize("seed, salt", [(0, 0), (7, 4), (2**40 + 3, 1)])
def test_hash_equals_unbounded_integers(seed, salt):
    ids = [0, 1, 4095, 10**12, 2**62]
    found = hash_uniform(seed, salt, torch.tensor(ids), 17)
    assert found.dtype == torch.float32
    assert found.tolist() == [reference.hash_uniform(seed, salt, i, 17) for i in ids]


def test_hash_noise_is_uniform_and_never_0_or_1():
    values = noise_for(2000, 196).flatten().double().sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert float((values - steps).abs().max()) < 0.0026  # 5 % critical value is 0.0022
    assert float(values[0]) > 0.0 and float(values[-1]) < 1.0
    with pytest.raises(TypeError, match="int64"):
        hash_uniform(0, 0, torch.zeros(2), 3)


@pytest.mark.parametrize(
    "length, ratio, keep",
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (196, 0.9, 19),
        (100, 0.9, 10),
        (10, 0.9, 1),
        (196, 0.7, 58),
        (576, 0.4, 345),
    ],
)
def test_counts(length, ratio, keep):
    assert token_counts(length, ratio) == (keep, length - keep, 0)


def test_counts_with_throwing():
    assert token_counts(196, 0.45, 0.40) == (30, 88, 78)
    assert token_counts(256, 0.45, 0.40) == (39, 115, 102)
    for length, ratio, throw in ((4, 0.9, 0.0), (10, 0.01, 0.2), (10, 0.5, 0.5)):
        with pytest.raises(ValueError, match="at least 1 visible"):
            token_counts(length, ratio, throw)


def test_samplers():
    noise = noise_for(1, 4)
    hide = select_patches(O2_MAP, noise, sampler="hide_salient", num_keep=2)
    assert hide.ids_keep.tolist() == [[3, 2]] and hide.ids_hidden.tolist() == [[1, 0]]
    reveal = select_patches(O2_MAP, noise, sampler="reveal_salient_topk", num_keep=2)
    assert reveal.ids_keep.tolist() == [[0, 1]]


@pytest.mark.parametrize("sampler", ["hide_salient", "reveal_salient_topk"])
def test_ties_keep_the_lowest_indices(sampler):
    choice = select_patches(torch.ones(2, 9), noise_for(2, 9), sampler=sampler, num_keep=4)
    assert choice.ids_keep.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("thrown", [0, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_mix_runs_from_random_to_literal(thrown, tied):
    attention = torch.rand(8, 49, generator=torch.manual_seed(4))
    if tied:
        attention = (attention * 3).round()
    noise = noise_for(8, 49)

    def mask(sampler, frac=0.0):
        options = {"num_keep": 12, "num_thrown": thrown, "salient_frac": frac}
        return hidden_mask(select_patches(attention, noise, sampler=sampler, **options), 49)

    assert torch.equal(mask("hide_salient_mix", 0.0), mask("random"))
    assert torch.equal(mask("hide_salient_mix", 1.0), mask("hide_salient"))
    half = mask("hide_salient_mix", 0.5)
    assert torch.equal(mask("hide_salient_mix", torch.tensor(0.5)), half)
    assert not torch.equal(half, mask("random"))


def test_salient_count_is_rounded():
    attention = torch.rand(1, 196, generator=torch.manual_seed(5))
    top = attention.argsort(descending=True)[:, :37]
    for frac in (0.25, torch.tensor(0.25)):  # 0.5 u at u = 0.5, M = 147: n = 37
        choice = select_patches(
            attention, noise_for(1, 196), sampler="hide_salient_mix", num_keep=49, salient_frac=frac
        )
        assert choice.ids_hidden[0, -37:].flip(0).tolist() == top[0].tolist()
        assert choice.ids_hidden[0, -38] not in attention.argsort(descending=True)[0, :38]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("thrown", [0, 5])
def test_samplers_match_loops(sampler, thrown):
    attention = torch.rand(6, 20, generator=torch.manual_seed(6))
    attention[1] = (attention[1] * 2).round() + 1  # ties
    noise = noise_for(6, 20)
    options = {"salient_frac": 0.4, "temperature": 0.7, "floor": 1e-3}
    choice = select_patches(
        attention, noise, sampler=sampler, num_keep=5, num_thrown=thrown, **options
    )
    for b in range(6):
        expected = reference.select(
            attention[b].tolist(), noise[b].tolist(), sampler, 5, thrown, **options
        )
        found = [choice.ids_keep, choice.ids_hidden, choice.ids_thrown]
        assert [ids[b].tolist() for ids in found] == list(expected)


WEIGHTS = {
    ((0.5, 0.3, 0.2), 2): (0.839286, 0.675, 0.485714),
    ((0.4, 0.3, 0.2, 0.1), 2): (0.715873, 0.608333, 0.441270, 0.234524),
    ((0.4, 0.3, 0.2, 0.1), 3): (0.922222, 0.870238, 0.758730, 0.448810),
    ((0.4, 0.275, 0.1875, 0.1375), 2): (0.707800, 0.565635, 0.413512, 0.313053),
}


@pytest.mark.parametrize("weights, draws", list(WEIGHTS))
def test_inclusion_probabilities(weights, draws):
    expected = WEIGHTS[weights, draws]
    assert reference.inclusion(list(weights), draws) == pytest.approx(expected, abs=1e-6)
    rows, length = 200_000, len(weights)
    attention, noise = torch.tensor([weights]).expand(rows, -1), noise_for(rows, length)
    shown = select_patches(attention, noise, sampler="reveal_salient", num_keep=draws)
    share = 1.0 - hidden_mask(shown, length).float().mean(dim=0)
    assert share.tolist() == pytest.approx(expected, abs=0.004)
    hidden = select_patches(
        attention, noise, sampler="hide_salient_sample", num_keep=length - draws
    )
    share = hidden_mask(hidden, length).float().mean(dim=0)
    assert share.tolist() == pytest.approx(expected, abs=0.004)


def nasty_maps(kind: str) -> torch.Tensor:
    base = torch.rand(3, 25, generator=torch.manual_seed(7))
    if kind == "ties":
        base = (base * 2).round()
    elif kind == "zeros":
        base = torch.zeros_like(base)
    elif kind == "one_hot":
        base = torch.eye(25)[:3]
    elif kind == "some_nan":
        base[:, ::3] = float("nan")
    elif kind == "all_nan":
        base = torch.full_like(base, float("nan"))
    elif kind == "inf":
        base[:, ::4], base[:, 1::4] = float("inf"), -float("inf")
    elif kind == "subnormal":
        base = base * 1e-40
    return base


KINDS = ("normal", "ties", "zeros", "one_hot", "some_nan", "all_nan", "inf", "subnormal")
NORMS = ("prob", "minmax", "rank", "zscore")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exactly_k_kept_for_any_attention_map(sampler):
    noise, extra = noise_for(3, 25), noise_for(3, 26, salt=1)
    student = torch.rand(3, 25, generator=torch.manual_seed(8))
    hints = {"hint_frac": 0.1, "hint_pool": 0.3, "mask_prob": 0.5}
    for kind, options in itertools.product(KINDS, ({}, hints)):
        raw = nasty_maps(kind)
        maps = [collaborative_attention(raw, student, 0.5, norm) for norm in NORMS]
        for attention in [*maps, raw]:
            choice = select_patches(
                attention,
                noise,
                sampler=sampler,
                num_keep=6,
                num_thrown=4,
                extra_noise=extra,
                salient_frac=0.5,
                **options,
            )
            assert choice.ids_keep.shape == (3, 6) and choice.ids_thrown.shape == (3, 4), kind
            assert choice.ids_hidden.shape == (3, 15), kind
            assert is_permutation(choice, 25), kind


def test_hints_reveal_some_of_the_most_salient():
    attention = torch.rand(200, 50, generator=torch.manual_seed(9))
    extra = noise_for(200, 51, salt=1)
    choice = select_patches(
        attention,
        noise_for(200, 50),
        sampler="hide_salient",
        num_keep=12,
        extra_noise=extra,
        hint_frac=0.06,
        hint_pool=0.2,
    )
    pool = attention.argsort(dim=1, descending=True)[:, :10]
    shown = ~hidden_mask(choice, 50)
    assert shown.gather(1, pool).sum(dim=1).tolist() == [3] * 200
    expected = extra[:, :50].gather(1, pool).argsort(dim=1, descending=True)[:, :3]
    for b in range(200):
        assert set(choice.ids_keep[b, :3].tolist()) == set(pool[b, expected[b]].tolist())
    assert is_permutation(choice, 50)


def test_mask_prob_exempts_rows_with_the_second_draw():
    rows = 20_000
    attention = torch.rand(rows, 16, generator=torch.manual_seed(10))
    noise, extra = noise_for(rows, 16), noise_for(rows, 17, salt=1)
    literal = select_patches(attention, noise, sampler="hide_salient", num_keep=4)
    plain = select_patches(None, extra[:, :16], sampler="random", num_keep=4)
    choice = select_patches(
        attention, noise, sampler="hide_salient", num_keep=4, extra_noise=extra, mask_prob=0.3
    )
    coin = extra[:, 16:] < 0.3
    assert abs(float(coin.float().mean()) - 0.3) < 0.01
    assert torch.equal(choice.ids_keep, torch.where(coin, literal.ids_keep, plain.ids_keep))
    always = select_patches(
        attention, noise, sampler="hide_salient", num_keep=4, extra_noise=extra, mask_prob=0.0
    )
    assert torch.equal(always.ids_keep, plain.ids_keep)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "block"}, "not one of random"),
        ({"sampler": "random", "num_keep": 0}, "do not fit"),
        ({"sampler": "random", "num_thrown": 16}, "do not fit"),
        ({"sampler": "reveal_salient", "attention": None}, "need an attention map"),
        ({"sampler": "random", "attention": None, "hint_frac": 0.1}, "need an attention map"),
        ({"sampler": "hide_salient", "attention": torch.rand(2, 19)}, "differ in shape"),
        ({"sampler": "hide_salient", "hint_frac": 0.1}, "need extra_noise"),
        ({"sampler": "hide_salient", "mask_prob": 0.5}, "need extra_noise"),
        (
            {"sampler": "hide_salient", "mask_prob": 0.5, "extra_noise": torch.rand(2, 20)},
            "expected .2, 21.",
        ),
        (
            {"sampler": "hide_salient", "hint_frac": 0.1, "extra_noise": torch.rand(2, 21)}
            | {"hint_pool": 0.05},
            "pool of 1",
        ),
        (
            {"sampler": "hide_salient", "hint_frac": 0.5, "extra_noise": torch.rand(2, 21)},
            "do not fit 5 visible",
        ),
        ({"sampler": "hide_salient_mix", "salient_frac": 1.5}, "salient_frac=1.5"),
        ({"sampler": "reveal_salient", "temperature": 0.0}, "temperature=0.0"),
        ({"sampler": "reveal_salient", "floor": 0.05}, "floor=0.05 must be below 1/20"),
        ({"sampler": "hide_salient_sample", "floor": math.nan}, "floor=nan must be below"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"attention": torch.rand(2, 20), "num_keep": 5} | options
    with pytest.raises(ValueError, match=message):
        select_patches(arguments.pop("attention"), noise_for(2, 20), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.999}, "mask.ratio, mask.throw_ratio: 196 patches with ratio=0.999"),
        ({"ratio": 0.001, "throw_ratio": 0.5}, "0 masked"),
        ({"ratio": 0.746, "hint_fraction": 0.254, "hint_pool": 0.5}, "is 50 hints; .* 49 visible"),
        ({"hint_fraction": 0.002}, "mask.hint_fraction=0.002 of 196 patches is 0 hints"),
        ({"hint_fraction": 0.1, "hint_pool": 0.098}, "a pool of 19"),
        ({"floor": 0.0052}, "mask.floor=0.0052: with 196 patches it must be below 1/196 = 0.0051"),
        ({"floor": 1.0, "sampler": "hide_salient_sample"}, "mask.floor=1.0"),
    ],
)
def test_a_mask_that_does_not_fit_the_grid_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        grid_counts(Mask(**changes), 196)


def test_a_mask_that_fits_the_grid_has_its_counts():
    assert grid_counts(Mask(hint_fraction=0.01, floor=0.005), 196) == token_counts(196, 0.75)
    assert grid_counts(Mask(sampler="hide_salient", floor=1.0), 196) == (49, 147, 0)


@pytest.mark.parametrize("sampler", ["reveal_salient", "hide_salient_sample"])
def test_the_largest_floor_keeps_the_direction(sampler):
    """Of the salient patches more are visible, or fewer, than of the others."""
    attention = torch.linspace(0.1, 1.0, 20).expand(4000, -1)
    floor = 0.9 / 20
    choice = select_patches(
        attention, noise_for(4000, 20), sampler=sampler, num_keep=5, floor=floor
    )
    mass = float(visible_mass(attention, choice.ids_keep))
    assert mass > 0.252 if sampler == "reveal_salient" else mass < 0.248


def full_settings(**changes) -> Mask:
    settings = {"sampler": "reveal_salient", "masks_per_view": 2, "hint_fraction": 0.1}
    return Mask(**(settings | {"hint_pool": 0.2, "prob": 0.5} | changes))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks_do_not_depend_on_the_split_of_the_batch(sampler):
    mask = full_settings(sampler=sampler)
    positions = torch.arange(10**12, 10**12 + 8)
    attention = torch.rand(8, 40, generator=torch.manual_seed(11))
    whole = choose_masks(mask, attention, positions, 3, 0.5, num_predicted=12)
    for parts in (2, 4, 8):
        pieces = [
            choose_masks(mask, a, p, 3, 0.5, num_predicted=12)
            for a, p in zip(attention.chunk(parts), positions.chunk(parts), strict=True)
        ]
        for name in PatchChoice._fields:
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            assert torch.equal(joined, getattr(whole, name))


def test_several_masks_a_view_use_their_own_salts():
    mask = full_settings(masks_per_view=3)
    positions = torch.tensor([5, 900])
    attention = torch.rand(2, 40, generator=torch.manual_seed(12))
    choice = choose_masks(mask, attention, positions, 3, 0.5)
    assert choice.ids_keep.shape == (6, 10)
    for b, j in itertools.product(range(2), range(3)):
        single = select_patches(
            attention[b : b + 1],
            hash_uniform(3, 3 * j, positions[b : b + 1], 40),
            sampler=mask.sampler,
            num_keep=10,
            extra_noise=hash_uniform(3, 3 * j + 1, positions[b : b + 1], 41),
            hint_frac=0.1,
            hint_pool=0.2,
            mask_prob=0.5,
        )
        assert single.ids_keep[0].tolist() == choice.ids_keep[b * 3 + j].tolist()
    assert len({tuple(row) for row in choice.ids_keep.tolist()}) == 6


ATTENTION_SAMPLERS = [sampler for sampler in SAMPLERS if sampler != "random"]


@pytest.mark.parametrize("sampler", ATTENTION_SAMPLERS)
def test_the_predicted_subset_is_uniform_over_the_masked_patches(sampler):
    views, length = 8000, 16
    attention = torch.rand(1, length, generator=torch.manual_seed(14)).expand(views, -1)
    positions = torch.arange(views)
    settings = {"hint_fraction": 0.0, "prob": 1.0, "masks_per_view": 1}
    mask = full_settings(sampler=sampler, **settings)
    plain = choose_masks(mask, attention, positions, 5, 0.5)
    choice = choose_masks(mask, attention, positions, 5, 0.5, num_predicted=4)
    assert torch.equal(choice.ids_keep, plain.ids_keep)
    assert torch.equal(choice.ids_hidden.sort(1).values, plain.ids_hidden.sort(1).values)
    # places in key order, 0 = largest key: each of the 12 is among the 4 with chance 1/3,
    # each pair with chance 1/11; standard deviations 0.0053 and 0.0032
    first = choice.ids_hidden[:, :4, None] == plain.ids_hidden[:, None, :]
    taken = first.any(dim=1).double()  # [views, 12]
    pairs = taken.T @ taken / views
    assert float((pairs.diagonal() - 1 / 3).abs().max()) < 0.022
    assert float((pairs - 1 / 11)[~torch.eye(12, dtype=torch.bool)].abs().max()) < 0.014


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_predicted_subset_matches_the_reference(sampler):
    mask = full_settings(sampler=sampler)
    positions = torch.tensor([3, 10**12])
    attention = torch.rand(2, 40, generator=torch.manual_seed(15))
    plain = choose_masks(mask, attention, positions, 7, 0.5)
    for count in (1, 12, 29):
        choice = choose_masks(mask, attention, positions, 7, 0.5, num_predicted=count)
        for row in range(4):
            hidden = plain.ids_hidden[row].tolist()
            expected = reference.predicted(
                hidden, 7, int(positions[row // 2]), row % 2, count, sampler
            )
            assert choice.ids_hidden[row, :count].tolist() == expected
    for count in (None, 0, 30):  # nothing to choose: the order of the keys
        choice = choose_masks(mask, attention, positions, 7, 0.5, num_predicted=count)
        assert torch.equal(choice.ids_hidden, plain.ids_hidden)


def test_deliberately_hidden_patches_are_predicted_at_their_share():
    """N = 196, 147 masked, 74 of them the most salient, 49 predicted: 74 / 3 of them."""
    attention = torch.rand(400, 196, generator=torch.manual_seed(16))
    mask = Mask(sampler="hide_salient_mix")
    choice = choose_masks(mask, attention, torch.arange(400), 0, 0.5, num_predicted=49)
    salient = torch.zeros(400, 196, dtype=torch.bool)
    salient.scatter_(1, attention.argsort(1, descending=True)[:, :74], True)
    found = salient.gather(1, choice.ids_hidden[:, :49]).double().sum(1)
    # hypergeometric: standard deviation 2.86 per row, 0.14 of the mean
    assert float(found.mean()) == pytest.approx(74 / 3, abs=0.6)
    assert float(found.std()) == pytest.approx(2.86, rel=0.15)


def test_scale_of_the_teachers_map_and_random_ignore_the_map():
    attention, other = torch.rand(4, 40), torch.rand(4, 40)
    positions = torch.arange(4)
    mask = Mask()
    expected = choose_masks(mask, collaborative_attention(attention, other, 0.5), positions, 0, 0.0)
    scaled = collaborative_attention(attention * 4096.0, other, 0.5)
    assert torch.equal(choose_masks(mask, scaled, positions, 0, 0.0).ids_keep, expected.ids_keep)
    plain = Mask(sampler="random")
    without = choose_masks(plain, None, positions, 0, 0.0, length=40)
    assert torch.equal(choose_masks(plain, attention, positions, 0, 0.0).ids_keep, without.ids_keep)
    with pytest.raises(ValueError, match="number of patches"):
        choose_masks(plain, None, positions, 0, 0.0)


@pytest.mark.parametrize(
    "sampler, low, high",
    [
        ("hide_salient", 0.0, 0.1),
        ("random", 0.2, 0.3),
        ("reveal_salient", 0.4, 0.56),
        ("reveal_salient_topk", 0.57, 0.7),
    ],
)
def test_visible_mass_shows_the_direction(sampler, low, high):
    attention = torch.randn(64, 196, generator=torch.manual_seed(13)).softmax(dim=1)
    choice = choose_masks(Mask(sampler=sampler), attention, torch.arange(64), 0, 0.0)
    assert low < float(visible_mass(attention, choice.ids_keep)) < high
