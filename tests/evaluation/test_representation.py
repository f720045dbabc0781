"""Ranks, similarities and attention on masks: the plain versions' numbers."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cmtmae_scale.errors import CmtMaeError, TeacherError
from cmtmae_scale.evaluation import dense
from cmtmae_scale.evaluation.encoders import Tokens, token_encoder
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.evaluation.foreground import (
    Maps,
    agreement,
    attention_of,
    foreground_fraction,
    measure_attention,
)
from cmtmae_scale.evaluation.masks import open_masked
from cmtmae_scale.evaluation.representation import (
    LIDAR_VIEWS,
    Moments,
    Representation,
    centre_moment,
    entropy_rank,
    lidar_of_moments,
    measure_lidar,
    patch_similarity,
    rank_of_moment,
    represent,
    uniformity,
)
from cmtmae_scale.evaluation.subject import Subject
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import MomentumEncoder
from dataloading.errors import DataError
from dataloading.index import build_index
from tests.evaluation.dense_case import (
    ENCODER,
    GRID,
    PATCH,
    SIDE,
    draw,
    encode_tokens,
    write_masked,
)
from tests.evaluation.evaluation_case import labelled_photographs, world
from tests.pretraining.test_students import make_config
from tests.processes import run_ranks
from tests.references import dense as reference

CPU = torch.device("cpu")
READING = ReadOptions(3, 2, "torch")


def moments_of(rows: np.ndarray) -> Moments:
    """Streamed in unequal parts."""
    found = Moments(rows.shape[-1], CPU)
    for part in np.array_split(rows.reshape(-1, rows.shape[-1]), 3):
        found.add(torch.from_numpy(part))
    return found


def test_ranks_from_streamed_moments_are_those_of_the_singular_values() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 12)) * np.linspace(0.01, 3, 12) + 2
    found = moments_of(rows)
    assert rank_of_moment(found.second) == pytest.approx(reference.rankme(rows), rel=1e-6)
    centred = reference.rankme(rows - rows.mean(0))
    assert rank_of_moment(centre_moment(found)) == pytest.approx(centred, rel=1e-6)
    alike = moments_of(np.ones((9, 4)) / 3)
    assert rank_of_moment(centre_moment(alike), alike.second.trace()) == 0
    assert rank_of_moment(moments_of(np.ones((9, 4))).second) == pytest.approx(1, abs=1e-3)
    assert rank_of_moment(moments_of(np.eye(5)).second) == pytest.approx(5)
    assert entropy_rank(torch.zeros(3)) == 0


def test_lidar_is_the_plain_versions() -> None:
    rng = np.random.default_rng(1)
    views = rng.normal(size=(9, 1, 6)) * [3, 2, 1, 0.5, 0, 0] + 0.3 * rng.normal(size=(9, 4, 6))
    found = lidar_of_moments(moments_of(views), moments_of(views.mean(1)))
    assert found == pytest.approx(reference.lidar(views), rel=1e-4)
    alike = np.repeat(views[:1], 9, axis=0)
    assert found > 1 and lidar_of_moments(moments_of(alike), moments_of(alike.mean(1))) == 0


def test_similarities_are_those_of_every_pair() -> None:
    tokens = np.random.default_rng(2).normal(size=(2, 11, 5)) + 0.5
    cosine, potential = patch_similarity(torch.from_numpy(tokens))
    for one, c, p in zip(tokens, cosine.tolist(), potential.log().tolist(), strict=True):
        assert (c, p) == pytest.approx(reference.similarity(one), rel=1e-9)
    assert uniformity(torch.from_numpy(tokens[0])) == pytest.approx(
        reference.similarity(tokens[0])[1]
    )


@pytest.mark.parametrize("images", [1, 1500, 2048, 2049, 4095, 4096, 1_281_167])
def test_the_uniformity_of_all_images_has_at_most_2048_patches(images: int) -> None:
    found = Representation(ENCODER, images, CPU)
    patches = len(range(0, images, found.every)) * found.per_image
    assert min(images, 1024) <= patches <= 2048


def rows_of(folder: Path) -> list[tuple[Any, ...]]:
    index = build_index(str(folder))
    ids = np.arange(len(index))
    rows, decoded = represent([ENCODER], index, ids, READING, world(), CPU)
    rows += measure_lidar([ENCODER], index, decoded, READING, world(), CPU)
    ends = [row.interval or (0.0, 0.0) for row in rows]
    return [
        (*row[1:4], round(row.value, 6), *(round(end, 6) for end in both), row.total)
        for row, both in zip(rows, ends, strict=True)
    ]


@pytest.mark.gloo
def test_measures_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """Rank 2 of 3 has one image for LiDAR's ten views per image, and one image is damaged."""
    folder = labelled_photographs(tmp_path / "all", 8, 0)
    broken = folder / "class1" / "004.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    expected = rows_of(folder)
    names = [(row[0], row[2]) for row in expected]
    assert names == [
        *(("cls", "RankMe"), ("patches", "RankMe"), ("tokens", "effective rank")),
        *(("tokens", "effective rank, centred"), ("tokens", "cosine"), ("tokens", "uniformity")),
        *(("tokens", "uniformity"), ("cls", "LiDAR"), ("patches", "LiDAR")),
    ]
    assert {row[-1] for row in expected} == {7}
    assert run_ranks(3, rows_of, folder) == [expected] * 3


def test_features_that_are_not_finite_and_empty_sets_are_refused(tmp_path: Path) -> None:
    folder = labelled_photographs(tmp_path / "all", 4, 0)

    def encode(images: torch.Tensor) -> Tokens:
        tokens = encode_tokens(images)
        tokens.patches[:1] = torch.inf
        return tokens

    bad = token_encoder("bad weights", SIDE, GRID, encode)
    index = build_index(str(folder))
    ids = np.arange(4)
    with pytest.raises(DataError, match="features of bad weights are not finite for 2 of 4 images"):
        represent([bad], index, ids, READING, world(), CPU)
    with pytest.raises(DataError, match="bad weights are not finite for 4 of 4 images"):
        measure_lidar([bad], index, ids, ReadOptions(LIDAR_VIEWS, 2, "torch"), world(), CPU)
    for file in folder.rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="none of the images could be decoded"):
        represent([ENCODER], index, ids, READING, world(), CPU)


def test_agreement_is_the_plain_versions() -> None:
    rng = np.random.default_rng(3)
    masks = np.stack([draw(number, (SIDE, SIDE))[1] for number in range(4)])
    masks[1, :9, :9] = 255
    attention = rng.integers(0, 5, (4, *GRID)) / 10  # many equal values
    inside, known = foreground_fraction(torch.from_numpy(masks), GRID)
    found = agreement(torch.from_numpy(attention).flatten(1), inside, known)
    for one, mask, row in zip(attention, masks, found.tolist(), strict=True):
        assert row == pytest.approx(reference.agreement(one, mask, PATCH))
    nothing = foreground_fraction(torch.zeros(1, SIDE, SIDE, dtype=torch.uint8), GRID)
    assert agreement(torch.ones(1, 36), *nothing).isnan().all()


def test_the_mass_inside_of_a_map_with_negative_values_is_a_fraction() -> None:
    """As of maps that are mixed with ``attention.norm=zscore``, whose sum is about 0."""
    attention = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-2.0, -1.0, -3.0, -4.0]])
    inside = torch.tensor([0.0, 1.0, 0.0, 1.0]).double().expand(2, -1)
    found = agreement(attention, inside, torch.ones(2, 4, dtype=torch.bool))
    assert found.tolist() == [[0.75, pytest.approx(1 / 3), 0.75], [0.5, pytest.approx(1 / 3), 0.5]]


def test_a_map_that_is_the_mask_agrees_and_a_uniform_one_is_chance(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 4)
    found = open_masked(str(folder), "val")

    def compute(images: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        red = images[0].float()[..., 0] > 115  # of the objects; see ``draw``
        return {"red": foreground_fraction(red.byte(), GRID)[0].float()}

    rows, unclear, shown = measure_attention(
        Maps(("red",), (SIDE,), GRID, compute), found, READING, world(), CPU
    )
    values = {(row.weights, row.measure): row.value for row in rows}
    assert unclear == 0 and shown is not None and set(shown.maps) == {"red"}
    assert values["red", "AUC"] > 0.95 and values["uniform", "AUC"] == 0.5
    assert values["red", "mass inside"] > 2 * values["uniform", "mass inside"]
    assert {row.total for row in rows} == {4}


def refusal_of_map(folder: Path) -> str:
    """The error where the map of one image, which is rank 0's, has a NaN."""
    found = open_masked(str(folder), "val")

    def compute(images: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        attention = torch.ones(len(images[0]), GRID[0] * GRID[1])
        attention[:1, 0] = torch.nan if world().rank == 0 else 1.0
        return {"good": torch.ones_like(attention), "teacher": attention}

    maps = Maps(("good", "teacher"), (SIDE,), GRID, compute)
    with pytest.raises(DataError) as caught:
        measure_attention(maps, found, READING, world(), CPU)
    return str(caught.value)


def refusal_of_teacher(folder: Path) -> str:
    def build_maps(subject: Subject, device: torch.device) -> Maps:
        if dist.get_rank() == 1:
            raise TeacherError("teacher.weights=x: no such file")
        return Maps(("map",), (SIDE,), GRID, lambda images: {"map": torch.ones(len(images[0]), 36)})

    dense.maps_of_subject = build_maps
    options = Namespace(images=str(folder), masks=str(folder), batch=2, threads=1, decode="torch")
    with pytest.raises(CmtMaeError) as caught:
        dense.run_representation(options, Subject(ENCODER, None, {}), [ENCODER], world(), CPU)
    return str(caught.value)


@pytest.mark.gloo
def test_a_teacher_that_one_rank_cannot_build_ends_all(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 4)
    one, two = run_ranks(2, refusal_of_teacher, folder)
    assert two == "teacher.weights=x: no such file" and one == f"rank 1: {two}"


@pytest.mark.gloo
def test_maps_that_are_not_finite_are_refused_on_every_rank(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 5)
    one, two = run_ranks(2, refusal_of_map, folder)
    assert one == two and "map of teacher is not finite for 1 of 5 images: nothing is" in one


@pytest.mark.parametrize(
    "arch", ["vit_base_patch16_dinov3", "eva02_base_patch14_224", "vit_base_patch16_rope_mixed_224"]
)
def test_the_map_of_a_rotary_student_is_that_of_the_momentum_encoder(arch: str) -> None:
    config = make_config(arch)
    config.attention.layers = [0, 1]
    momentum = build_student(config, MomentumEncoder)
    initialise(momentum, 0)
    for parameter in momentum.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    student = build_student(config)
    student.load_state_dict(momentum.state_dict())
    size = config.views.image_size
    images = torch.randint(256, (2, size, size, 3), generator=torch.manual_seed(2)).byte()
    found = attention_of(student.eval(), size, config)(images).attention
    expected = momentum(normalise_images(images, IMAGENET_MEAN, IMAGENET_STD))[1]
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
