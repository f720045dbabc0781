"""One finished run for all tests of exports."""

from pathlib import Path

import pytest

from tests.engine.run_case import run, write_recipe
from tests.processes import run_ranks


@pytest.fixture(scope="package")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two sharded ranks with checkpoints at steps 4 and 6."""
    recipe = write_recipe(tmp_path_factory.mktemp("export"))
    run_ranks(2, run, recipe, ["backend.sharding=full", "student.patch_size=8"])
    return recipe.parent / "run"
