"""Hours, bytes and money follow from rates, and no cache is recommended that cannot pay."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cmtmae_scale.commands import precompute
from cmtmae_scale.config.load import load_config
from cmtmae_scale.runtime.storage import drop_from_memory
from cmtmae_scale.teachers.build import build_teacher_skeleton
from cmtmae_scale.tools import cache_rates
from cmtmae_scale.tools.cache_plan import (
    Job,
    Prices,
    Rates,
    choose_rates,
    flops_ratio,
    format_bytes,
    format_hours,
    outlook_table,
    plan_manifest,
    usable_codecs,
    weigh_cache,
)
from cmtmae_scale.tools.cache_rates import Measured
from tests.cache import cache_case as case

JOB = Job(images=1000, draws=100_000, gpus=2)
RATES = Rates(teacher=50, train=25, decode=math.inf, write=math.inf, read=math.inf)


def weigh(job: Job = JOB, rates: Rates = RATES, views: int = 4, row: int = 100, **more: Prices):
    return weigh_cache(job, rates, "int8", views, row, more.get("prices"))


def test_hours_and_bytes_are_those_of_a_hand_calculation() -> None:
    found = weigh()
    assert found.disk_bytes == 4 * 1000 * 100
    assert found.read_gpu == 25 * 100  # bytes per second
    assert found.online_h == pytest.approx(100_000 * (0.04 + 0.02) / 2 / 3600)
    assert found.run_h == pytest.approx(100_000 * 0.04 / 2 / 3600)
    assert found.build_h == pytest.approx(4000 / 100 / 3600)
    # 3,000 s online against 40 s + 2,000 s.
    assert found.from_run == 1 and found.verdict == "yes, 32% less"


@pytest.mark.parametrize(
    ("change", "build_s", "run_s"),
    [
        ({"decode": 10}, 4000 / 20, 2000),  # two processes decode
        ({"write": 1000.0}, 4000 / 10, 2000),  # the store takes ten rows a second of all
        ({"read": 2000.0}, 40, 100_000 / 20 / 2),  # and gives twenty to each
    ],
)
def test_the_slowest_stage_decides(change: dict[str, float], build_s: float, run_s: float) -> None:
    found = weigh(rates=replace(RATES, **change))
    assert found.build_h * 3600 == pytest.approx(build_s)
    assert found.run_h * 3600 == pytest.approx(run_s)
    assert found.starved == ("read" in change)


def test_a_store_slower_than_the_teacher_never_pays() -> None:
    found = weigh(rates=replace(RATES, read=100 / 0.06))  # as slow as training and teacher together
    assert found.from_run is None and found.verdict == "never (reading)"


def test_spot_checks_cost_their_forwards() -> None:
    assert weigh(replace(JOB, spot_check=0.5)).run_h * 3600 == pytest.approx(2500)
    assert weigh(replace(JOB, spot_check=1.0)).from_run is None


def test_no_run_that_sees_each_view_once_pays_whatever_the_rates() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        rates = Rates(*(10 ** draw.uniform(-3, 6) for _ in range(5)))
        epochs = draw.randint(1, 300)
        job = Job(draw.randint(1, 10**9), 0, draw.randint(1, 512))
        job = replace(job, draws=epochs * job.images)
        found = weigh(job, rates, epochs + draw.randint(0, 5), prices=Prices(3.0, 20.0))
        assert found.from_run is None or found.from_run >= 2, (job, rates)
        assert found.saved is not None and found.saved < 1e-9 * found.online_h * job.gpus
    job = Job(images=1000, draws=10_000, gpus=1)
    assert weigh(job, views=10).verdict == "no#; from run 2"
    assert weigh(job, views=9).from_run == 1


def test_a_costly_build_pays_from_the_run_in_which_its_hours_are_saved() -> None:
    found = weigh(rates=replace(RATES, decode=0.7))
    # 4,000 views at 1.4 a second: 2,857 s, and each run saves 1,000 s.
    assert found.from_run == 3 and found.verdict == "no; from run 3"


def test_money_is_gpu_hours_less_storage_while_it_is_held() -> None:
    found = weigh(row=10**9, prices=Prices(gpu_hour=36.0, tb_month=730.0))
    # 960 s less on two GPUs at 0.01 a second; 4 TB for 2,040 s at 1 an hour each.
    assert found.saved == pytest.approx(19.2 - 4 * 2040 / 3600)
    assert weigh().saved is None


def test_the_table_fits_a_hundred_columns_at_any_size() -> None:
    small = Rates(teacher=0.01, train=0.001, decode=0.01, write=1e5, read=1e3)
    large = Job(images=10**9, draws=3 * 10**11, gpus=4096)
    outlooks = [
        weigh_cache(large, rates, codec, views, 302_993, Prices(30.0, 200.0))
        for rates in (RATES, small)
        for codec in ("int8", "attention")
        for views in (1, 16, 300)
    ]
    lines = outlook_table(outlooks, 8).splitlines()
    assert len(lines) == 13 and max(map(len, lines)) <= 100
    sizes = [format_bytes(size) for size in (151_312, 1.55e12, 999.6, 2.5e18)]
    assert sizes == ["151 kB", "1.55 TB", "1 kB", "2,500 PB"]
    assert (format_hours(0.0123), format_hours(12345.6)) == ("0.0123", "12,346")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write_cache_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_rates, "MEASURE_S", 0.02)


ATTENTION = ["loss.teacher=0", "cache.codec=attention"]


def test_row_bytes_are_those_that_the_builder_stores(recipe: Path) -> None:
    for overrides in (["cache.codec=int8"], ["cache.codec=bf16"], ATTENTION):
        builder = case.make_builder(recipe, overrides)
        codec = builder.config.cache.codec
        assert codec in usable_codecs(builder.config)
        planned = plan_manifest(build_teacher_skeleton(builder.config), codec)
        assert planned.row_bytes() == builder.make_manifest(codec, 4).row_bytes()
        builder.close()


def run_plan(recipe: Path, folder: Path, *arguments: str) -> int:
    line = ["--config", str(recipe), "--plan", f"cache.dir={folder}", *arguments]
    return precompute.precompute_teacher(line)


def test_the_command_measures_and_leaves_nothing_but_the_index(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(recipe, tmp_path / "cache", "--gpus", "16", "views.views_per_image=3") == 0
    out = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["index"]
    assert max(map(len, out.splitlines())) <= 100 + len(str(recipe))
    for text in ("10: counted in", "48 views, 4.8 epochs, on 16 GPUs", "node of 8", " views/s: 2"):
        assert text in out
    rows = [line for line in out.splitlines() if line.startswith(("int8 ", "bf16 "))]
    named = [row.split()[:2] for row in rows]
    assert named == [[codec, n] for codec in ("int8", "bf16") for n in ("1", "3", "4", "16")]
    # Sixteen views are seen once each. Where this store was busy the verdict is "never (reading)":
    # a measured rate may give that, but no rate makes it a yes.
    verdicts = [row for row in rows if row.split()[1] == "16"]
    assert all("no#; from run " in row or "never (reading)" in row for row in verdicts), verdicts
    assert "hours of this CPU" in out


def test_a_plan_needs_no_images_where_their_number_is_known(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = [f"data.path={tmp_path / 'away'}", "--gpu-hour", "2", "--tb-month", "20"]
    assert run_plan(recipe, tmp_path / "cache", *away) == 78
    assert "does not exist" in capsys.readouterr().err
    known = [*away, "data.expected_images=24", "--images-s", "7", *ATTENTION]
    assert run_plan(recipe, tmp_path / "cache", *known) == 0
    out = capsys.readouterr().out
    for text in (
        "not measured",
        "24: data.expected_images",
        "7 images/s per GPU",
        "given",
        "saved",
    ):
        assert text in out
    assert "int8" not in out and out.count("\nattention ") == 4


def test_on_a_cpu_a_given_rate_implies_the_teachers() -> None:
    found = Measured(10.0, 4, 300.0, 1e8, 2e8, 0.0)
    rates = choose_rates(found, 0.5, None, False)
    assert (rates.teacher, rates.train, rates.decode) == (10, 5, 300)
    given = choose_rates(found, 0.5, 1000.0, False)
    assert (given.teacher, given.train) == (2000, 1000)
    on_gpu = choose_rates(found, 0.5, 1000.0, True)
    assert (on_gpu.teacher, on_gpu.train) == (10, 1000)


def test_flops_do_not_depend_on_the_teachers_mode(recipe: Path) -> None:
    online = flops_ratio(load_config(recipe, []))
    cached = flops_ratio(load_config(recipe, ["teacher.mode=cached", "cache.on_miss=stop"]))
    assert online == cached > 0
    more = flops_ratio(load_config(recipe, ["mask.masks_per_view=2"]))
    assert online / 2 < more < online


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpus", "2"], "--gpus needs --plan"),
        (["--plan", "--gpu-hour", "2"], "go together"),
        (["--plan", "--images-s", "inf"], "must be above 0"),
        (["--plan", "--verify"], "not allowed with"),
        (
            ["--verify", "cache.dir=x"],
            "cache.dir=x is not a share; give --verify after the settings",
        ),
    ],
)
def test_arguments_without_effect_exit_with_78(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        precompute.parse_precompute_options(["--config", "x", *arguments])
    assert stop.value.code == 78 and text in capsys.readouterr().err


def test_a_run_without_teacher_or_a_store_that_refuses_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ["mask.sampler=random", "loss.teacher=0"]
    assert run_plan(recipe, tmp_path / "cache", *none) == 78
    assert "there is nothing to cache" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    index = f"data.index={tmp_path / 'index'}"
    assert run_plan(recipe, tmp_path / "file", index) == 78
    assert f"cache.dir={tmp_path / 'file'}: cannot be written (" in capsys.readouterr().err


def test_the_share_of_pages_in_memory_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    share = drop_from_memory(path)
    assert share is None or 0 <= share <= 1
    assert path.read_bytes() == bytes(1 << 20)
