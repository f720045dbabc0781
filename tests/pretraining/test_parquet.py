"""A run reads the same images from files, tars and Parquet files, with the same losses."""

from pathlib import Path

import pytest
import yaml

from dataloading.index import build_index
from tests.dataloading.tar_case import write_tar
from tests.engine.run_case import BASE, read_losses, run
from tests.engine.test_golden_losses import MAE, write_images
from tests.processes import run_ranks

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")


def losses(folder: Path, data: Path, *launches: int) -> list[float]:
    """Run three steps, in launches that end after the given steps."""
    tree = (BASE | MAE) | {
        "run": {"output_dir": str(folder)},
        "data": {"workers": 2, "path": str(data), "decode": "torch"},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "steps": 3},
    }
    folder.mkdir()
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    for last in launches:
        run_ranks(1, run, recipe, [f"train.stop_after={last}"])
    return read_losses(folder)


@pytest.mark.slow
@pytest.mark.gloo
def test_losses_are_those_of_files_and_tars_also_when_resumed(tmp_path: Path) -> None:
    files = Path(write_images(tmp_path / "files", 0))
    index = build_index(files)
    labels = [index.labels[label] for label in index.entries["label"].tolist()]
    images = [(files / name).read_bytes() for name in index.names]
    members = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        members += [(f"{number:03d}.png", image), (f"{number:03d}.cls", label.encode())]
    write_tar(tmp_path / "tars" / "train-0.tar", members)
    (tmp_path / "parquet").mkdir()
    table = pa.table({"image": [{"bytes": image} for image in images], "label": labels})
    pq.write_table(table, tmp_path / "parquet" / "train-0.parquet", row_group_size=6)
    expected = losses(tmp_path / "a", files, 3)
    assert len(expected) == 3
    assert losses(tmp_path / "b", tmp_path / "tars", 3) == expected
    assert losses(tmp_path / "c", tmp_path / "parquet", 2, 3) == expected
