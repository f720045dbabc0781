"""The table of docs/teachers.md: what was tested with each family of teachers."""

from pathlib import Path

import pytest
from timm.models import get_arch_pretrained_cfgs

from cmtmae_scale.config.load import load_config
from tests.processes import run_ranks
from tests.teachers.families import FAMILIES
from tests.teachers.family_case import COLUMNS, try_families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teachers.md"


def table_rows(header: str) -> dict[str, dict[str, str]]:
    """Rows of the page's table with this header, by their first cell."""
    lines = PAGE.read_text().splitlines()
    start = lines.index(header)
    names = [name.strip() for name in header.strip("|").split("|")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = dict(zip(names[1:], cells[1:], strict=True))
    return rows


TRIED = table_rows(f"| family | map | features | {' | '.join(COLUMNS)} |")
KEYS = table_rows("| family | keys |")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return run_ranks(1, try_families, tmp_path_factory.mktemp("families"))[0]


def test_the_tables_have_every_family() -> None:
    assert list(TRIED) == list(KEYS) == list(FAMILIES)
    for name, family in FAMILIES.items():
        assert (TRIED[name]["map"], TRIED[name]["features"]) == (family.source, family.feature)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_cached_trained_and_exported(
    family: str, tried: dict[str, dict[str, str]]
) -> None:
    assert {name: TRIED[family][name] for name in COLUMNS} == tried[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_of_a_family_are_legal_and_name_published_weights(
    family: str, tmp_path: Path
) -> None:
    overrides = KEYS[family]["keys"].strip("`").split()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: photos}\nrun: {output_dir: run}\ntrain: {steps: 1}\n")
    teacher = load_config(recipe, overrides).teacher
    if teacher.library == "timm":
        assert f"{teacher.model}.{teacher.weights}" in get_arch_pretrained_cfgs(str(teacher.model))
    assert teacher.feature == FAMILIES[family].feature
