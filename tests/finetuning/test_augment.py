"""Augmentation: timm's laws, a pure function of seed and position, targets that sum to 1."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F

from cmtmae_scale.config.finetune import Augment
from cmtmae_scale.finetuning.augment import AREA, ASPECT, Augmenter, cross_entropy, erase, rectangle
from cmtmae_scale.finetuning.draws import per_view
from cmtmae_scale.finetuning.randaugment import NAMES, operate, randaugment
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from dataloading.plan import Plan
from dataloading.stream import Batch

SIZE, CLASSES, DEPTH = 48, 5, 3
FILL = (124, 116, 104)


def pictures(count: int) -> torch.Tensor:
    """Smooth images, uint8 ``[count, SIZE, SIZE, 3]``."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = generator.integers(20, 236, (5, 5, 3), dtype=np.uint8)
        large = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        found.append(np.asarray(large))
    return torch.tensor(np.stack(found))


def batch_of(positions: list[int], broken: tuple[int, ...] = ()) -> Batch:
    """Views whose image is a function of the position."""
    everything = pictures(16)
    where = np.array(positions, dtype=np.int64)
    zeros = np.zeros_like(where)
    plan = Plan(where, zeros, zeros, np.zeros((len(where), 4), np.int32), zeros.astype(np.bool_))
    place = torch.tensor(where)
    valid = torch.tensor([one not in broken for one in positions])
    return Batch((everything[place % 16],), place, place, place, valid, plan)


def augmenter(seed: int = 0, **changes: float | None) -> Augmenter:
    settings = Augment()
    for name, value in changes.items():
        setattr(settings, name, value)
    return Augmenter(
        settings,
        seed=seed,
        classes=CLASSES,
        depth=DEPTH,
        drop_path=0.2,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def labels_of(batch: Batch) -> torch.Tensor:
    return batch.sample_id % CLASSES


TIMM_NAMES = {
    **{name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast")},
    **{name: f"{name}Increasing" for name in ("Brightness", "Sharpness")},
    **{name: f"{name}Rel" for name in ("TranslateX", "TranslateY")},
}
MOVES = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
"""Their sign is drawn: timm's may turn the other way."""


def timms(name: str, picture: np.ndarray, level: float, sign: float, monkeypatch) -> np.ndarray:
    """The same operation of timm on a PIL image."""
    monkeypatch.setattr("timm.data.auto_augment.random.random", lambda: 0.9 if sign < 0 else 0.1)
    full = TIMM_NAMES.get(name, name)
    to_arguments = LEVEL_TO_ARG[full]
    values = to_arguments(level, {}) if to_arguments else ()
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    return np.asarray(NAME_TO_OP[full](Image.fromarray(picture), *values, **options))


@pytest.mark.parametrize("level", [2.5, 9.0, 9.9])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_timms(name: str, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = pictures(1)[0]
    if name not in MOVES:
        generator = torch.Generator().manual_seed(0)
        noisy = picture + 40 * torch.randn(picture.shape, generator=generator)
        picture = noisy.clamp(20, 220).byte()  # rough, and not of full contrast
    for sign in (1.0, -1.0):
        expected = [
            timms(name, picture.numpy(), level, one, monkeypatch).astype(int)
            for one in ((sign, -sign) if name in MOVES else (sign,))
        ]
        (found,) = operate(picture.permute(2, 0, 1)[None], [name], [(level, sign)], FILL)
        assert found.dtype == torch.uint8
        after = found.permute(1, 2, 0).numpy().astype(int)
        off = min((np.abs(after - one) for one in expected), key=np.mean)
        # Rounding of a grey level; moved images also differ by half a pixel at their border.
        assert np.median(off) <= 1 and off.mean() < (2.0 if name in MOVES else 0.6)
        assert np.abs(after - picture.numpy()).mean() > 3


def test_fifteen_operations_two_a_view_each_every_other_time() -> None:
    assert len(set(NAMES)) == 15
    images = pictures(1).expand(600, -1, -1, -1)
    changed = randaugment(
        images, np.arange(600), seed=1, magnitude=9.0, magnitude_std=0.5, fill=FILL
    )
    same = (changed == images).flatten(1).all(1).float().mean()
    assert 0.15 < same < 0.4  # a quarter, and where an operation changes nothing
    assert torch.equal(images, pictures(1).expand(600, -1, -1, -1))


def test_a_view_is_treated_by_its_position_alone() -> None:
    images = pictures(4)
    options = {"seed": 1, "magnitude": 9.0, "magnitude_std": 0.5, "fill": FILL}
    whole = randaugment(images, np.arange(70, 74), **options)
    parts = [randaugment(images[k : k + 1], np.array([70 + k]), **options) for k in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, randaugment(images, np.arange(70, 74), **options | {"seed": 2}))


@pytest.fixture
def untouched_generators() -> Iterator[None]:
    """Global generators are where they were."""
    before = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())
    yield
    after = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())
    assert after == before


@pytest.mark.usefixtures("untouched_generators")
def test_the_same_positions_give_the_same_bits_whatever_came_before() -> None:
    batch = batch_of([6, 7, 8, 9])
    first = augmenter()(batch, labels_of(batch))
    one = augmenter()
    for start in (0, 4, 22):
        other = batch_of(list(range(start, start + 4)))
        one(other, labels_of(other))
    again = one(batch, labels_of(batch))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    different = augmenter(seed=1)(batch, labels_of(batch))
    assert not any(torch.equal(a, b) for a, b in list(zip(first, different, strict=True))[:3])
    assert torch.equal(batch.images[0], batch_of([6, 7, 8, 9]).images[0])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_sum_to_one_and_follow_what_was_mixed(
    mixup: float, cutmix: float, smoothing: float
) -> None:
    one = augmenter(mixup=mixup, cutmix=cutmix, smoothing=smoothing, magnitude=None, erase=0.0)
    plain = augmenter(mixup=0.0, cutmix=0.0, smoothing=0.0, magnitude=None, erase=0.0)
    kinds = set()
    for start in range(0, 160, 4):
        batch = batch_of([start, start + 1, start + 2, start + 3])
        labels = labels_of(batch)
        mixed, clean = one(batch, labels), plain(batch, labels)
        torch.testing.assert_close(mixed.targets.sum(1), torch.ones(4), rtol=0, atol=1e-6)
        assert mixed.targets.min() >= 0
        # labels of the first and of the last view differ, so that their shares can be read
        own = mixed.targets[0, labels[0]] - smoothing / CLASSES
        share = float(own) / (1 - smoothing)
        same = (mixed.images[0] == clean.images[0]).float().mean()
        whole = share * clean.images[0] + (1 - share) * clean.images[3]
        if torch.allclose(mixed.images[0], whole, atol=1e-4):
            kinds.add("none" if share > 1 - 1e-6 else "mixup")
        else:
            pasted = (mixed.images[0] == clean.images[3]).float().mean()
            assert float(same) == pytest.approx(share, abs=0.02)
            assert float(pasted) == pytest.approx(1 - share, abs=0.02)
            kinds.add("cutmix")
    expected = {name for name, on in (("mixup", mixup), ("cutmix", cutmix)) if on} or {"none"}
    assert kinds - {"none"} == expected - {"none"} and ("none" in kinds or expected != {"none"})


def test_smoothing_spreads_a_share_over_all_classes() -> None:
    batch = batch_of([0, 1, 2])
    found = augmenter(mixup=0.0, cutmix=0.0, smoothing=0.2)(batch, labels_of(batch)).targets
    expected = torch.full((3, CLASSES), 0.2 / CLASSES)
    expected[torch.arange(3), labels_of(batch)] += 0.8
    torch.testing.assert_close(found, expected)


def test_a_view_that_cannot_be_decoded_counts_neither_itself_nor_in_its_partner() -> None:
    batch = batch_of([0, 1, 2, 3], broken=(2,))
    mixed = augmenter()(batch, labels_of(batch))
    assert mixed.valid.tolist() == [True, False, False, True]
    alone = augmenter(mixup=0.0, cutmix=0.0)(batch, labels_of(batch))
    assert alone.valid.tolist() == [True, True, False, True]
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(
        logits[alone.valid], alone.targets[alone.valid], reduction="sum"
    )
    torch.testing.assert_close(cross_entropy(logits, alone)["total"], expected)


def test_a_stand_in_for_an_unread_batch_is_taken() -> None:
    batch = batch_of([0, 0])._replace(plan=None, valid=torch.zeros(2, dtype=torch.bool))
    assert not augmenter()(batch, labels_of(batch)).valid.any()


def test_erased_rectangles_are_noise_of_timms_law() -> None:
    images = torch.full((2000, 3, SIZE, SIZE), 9.0)
    erase(images, np.arange(2000), 0, 0.25)
    inside = (images != 9.0).all(1)  # [B, S, S]
    touched = inside.flatten(1).any(1)
    assert float(touched.float().mean()) == pytest.approx(0.25, abs=0.03)  # 3 deviations
    for mask in inside[touched][:100]:
        rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
        high, wide = len(rows), len(columns)
        assert int(mask.sum()) == high * wide  # a full rectangle
        assert AREA[0] - 0.01 < high * wide / SIZE**2 < AREA[1] + 0.03
        assert ASPECT[0] / 1.2 < high / wide < ASPECT[1] * 1.2
    noise = images[inside[:, None].expand_as(images)]
    assert abs(float(noise.mean())) < 0.01 and float(noise.std()) == pytest.approx(1.0, abs=0.01)


def test_rectangles_of_a_flat_picture_fit_or_are_none() -> None:
    draws = per_view(1, 0, np.arange(500), 40).tolist()
    boxes = [rectangle(row, 8, 64) for row in draws]
    assert sum(box is None for box in boxes) < 50
    for top, left, high, wide in filter(None, boxes):
        assert 0 <= top <= 8 - high and 0 <= left <= 64 - wide


def shifted(picture: torch.Tensor, **how: object) -> torch.Tensor:
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | how
    bilinear = F.InterpolationMode.BILINEAR
    return F.affine(picture, interpolation=bilinear, fill=list(FILL), **options)


def torchvisions(name: str, picture: torch.Tensor, level: float, sign: float) -> torch.Tensor:
    """An operation by torchvision's functions, on one image."""
    factor = max(0.1, 1.0 + sign * 0.9 * level / 10)
    angle = float(np.degrees(np.arctan(sign * 0.3 * level / 10)))
    far = sign * 0.45 * level / 10 * picture.shape[-1]
    threshold = 256 - min(256, int(256 * level / 10))
    added = min(128, int(110 * level / 10))
    return {
        "AutoContrast": lambda: F.autocontrast(picture),
        "Equalize": lambda: F.equalize(picture),
        "Invert": lambda: F.invert(picture),
        "Rotate": lambda: shifted(picture, angle=sign * 3.0 * level),
        "Posterize": lambda: F.posterize(picture, max(1, 4 - int(4 * level / 10))),
        "Solarize": lambda: F.solarize(picture, threshold) if threshold < 256 else picture,
        "SolarizeAdd": lambda: picture.where(picture >= 128, picture + added),
        "Color": lambda: F.adjust_saturation(picture, factor),
        "Contrast": lambda: F.adjust_contrast(picture, factor),
        "Brightness": lambda: F.adjust_brightness(picture, factor),
        "Sharpness": lambda: F.adjust_sharpness(picture, factor),
        "ShearX": lambda: shifted(picture, shear=[angle, 0.0], center=[0.0, 0.0]),
        "ShearY": lambda: shifted(picture, shear=[0.0, angle], center=[0.0, 0.0]),
        "TranslateX": lambda: shifted(picture, translate=[far, 0.0]),
        "TranslateY": lambda: shifted(picture, translate=[0.0, far]),
    }[name]()


@pytest.mark.parametrize("name", NAMES)
def test_together_pictures_get_the_bits_that_torchvision_gives_each_alone(name: str) -> None:
    noise = 20 * torch.randn((16, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    images = (pictures(16).permute(0, 3, 1, 2) + noise).clamp(0, 255).byte()
    levels = np.random.default_rng(0).normal(7.0, 2.5, 16).clip(0, 10).tolist()
    moves = [(level, 1.0 if k % 2 else -1.0) for k, level in enumerate(levels)]
    found = operate(images, [name] * 16, moves, FILL)
    for picture, (level, sign), one in zip(images, moves, found, strict=True):
        assert torch.equal(one, torchvisions(name, picture, level, sign))


class Calls(TorchDispatchMode):
    """Counts operators: on a GPU, about as many kernels."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.number += 1
        return function(*arguments, **(named or {}))


def test_the_number_of_operators_hardly_grows_with_the_views() -> None:
    with Calls() as calls:
        options = {"seed": 1, "magnitude": 9.0, "magnitude_std": 0.5, "fill": FILL}
        randaugment(pictures(1).expand(256, -1, -1, -1), np.arange(256), **options)
    assert calls.number < 500  # 4,800 one after the other
