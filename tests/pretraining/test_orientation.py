"""``data.exif_orientation`` reaches every index that a run, its cache and its evaluation open."""

from pathlib import Path

import pytest
from PIL import Image

from cmtmae_scale.cache.build import open_or_build_index
from cmtmae_scale.commands.dry_run import count_images
from cmtmae_scale.config.load import load_config
from cmtmae_scale.evaluation.images import open_pair, open_split
from cmtmae_scale.pretraining.build import open_index
from dataloading import index as indexing
from dataloading.index import build_index
from tests.engine.run_case import write_recipe


@pytest.mark.parametrize("key", [True, False])
def test_every_index_of_a_run_turns_what_the_key_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bool
) -> None:
    recipe = write_recipe(tmp_path)
    photos, exif = tmp_path / "photos", Image.Exif()
    exif[0x0112] = 6
    path = photos / "class0" / "000.jpg"
    with Image.open(path) as image:
        image.save(path, exif=exif)
    expected = build_index(photos, exif_orientation=key).digest
    assert expected != build_index(photos, exif_orientation=not key).digest

    config = load_config(recipe, [f"data.exif_orientation={str(key).lower()}"])
    run_dir = tmp_path / "run"
    assert open_index(config, run_dir).digest == expected
    assert open_or_build_index(config, tmp_path / "cache").digest == expected
    sets = open_pair(str(photos), str(photos), None, key)
    assert {sets.train.index.digest, sets.test.index.digest} == {expected}
    assert open_split(str(photos), 0.5, 0, key).train.index.digest == expected
    # The dry run reads the run's kept index instead of building another.
    monkeypatch.delattr(indexing, "build_parts")
    assert count_images(config, [])[1] == 20
