"""A stream over six hundred samples in tars, eight of them broken, with either decoder."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading.index import Index, build_index
from dataloading.reading import GREY
from dataloading.stream import Stream
from tests.dataloading.decoder_case import DECODERS
from tests.dataloading.tar_case import write_tar

COUNT, SHARDS, BATCH = 600, 4, 25
BROKEN = (0, 7, 149, 150, 311, 312, 480, 599)


def jpeg(number: int) -> bytes:
    colours = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((40, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[: -len(data) // 4] if number in BROKEN else data


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("tars")
    each = COUNT // SHARDS
    for shard in range(SHARDS):
        numbers = range(shard * each, (shard + 1) * each)
        list_members = [(f"{number:06d}.jpg", jpeg(number)) for number in numbers]
        write_tar(folder / f"train-{shard}.tar", list_members)
    return build_index(folder)


def take(index: Index, batches: int, decode, start: int = 0, quarantine=None):
    with Stream(
        index,
        seed=3,
        micro_batch=BATCH,
        sizes=(24,),
        threads=2,
        decode=decode,
        start_position=start,
        quarantine=quarantine,
    ) as stream:
        return [next(stream) for _ in range(batches)]


@pytest.mark.parametrize("decode", DECODERS)
def test_each_is_reported_once_and_nothing_is_lost_or_repeated(index, tmp_path, decode) -> None:
    assert len(index) == COUNT  # their headers are whole
    path = tmp_path / "quarantine.jsonl"
    epochs = 2
    batches = take(index, epochs * COUNT // BATCH, decode, quarantine=path)
    positions = torch.cat([batch.position for batch in batches])
    assert positions.tolist() == list(range(epochs * COUNT))
    samples = torch.cat([batch.sample_id for batch in batches])
    assert Counter(samples.tolist()) == dict.fromkeys(range(COUNT), epochs)
    valid = torch.cat([batch.valid for batch in batches])
    assert sorted(samples[~valid].tolist()) == sorted(BROKEN * epochs)
    images = torch.cat([batch.images[0] for batch in batches])
    assert (images[~valid] == GREY).all()
    reported = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sample_id"] for line in reported) == sorted(BROKEN)
    assert all(line["name"].startswith("byte ") and line["reason"] for line in reported)

    middle = len(batches) // 3
    rest = take(index, 6, decode, start=middle * BATCH, quarantine=path)
    for one, two in zip(batches[middle : middle + 6], rest, strict=True):
        for name in ("position", "sample_id", "view", "valid"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(one.images[0], two.images[0])
    assert len(path.read_text().splitlines()) == len(BROKEN)
