"""Plans are those of a hand calculation, stop scaling where they state, and name what to change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cmtmae_scale.backends.traffic import Traffic, fsdp_traffic, zero_traffic
from cmtmae_scale.commands.plan import FRACTION, choose_fraction, parse_options, plan_run
from cmtmae_scale.config.batch import BatchPlan, batch_plan
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from cmtmae_scale.tools.benchmark.step_model import NEVER_FUSED, TEACHER, record_step
from cmtmae_scale.tools.estimate import saved_bytes, state_bytes
from cmtmae_scale.tools.plan import plan as plan_module
from cmtmae_scale.tools.plan.devices import DEVICES, Device, find_device
from cmtmae_scale.tools.plan.kernels import Kernel, StepKernels, moved_bytes
from cmtmae_scale.tools.plan.measured import find_step, is_device, reached_fraction
from cmtmae_scale.tools.plan.network import step_traffic, sum_groups, time_exchanges
from cmtmae_scale.tools.plan.plan import (
    DECODE_VIEWS_S,
    LAUNCH_S,
    Cluster,
    Counted,
    Images,
    Plan,
    count_work,
    make_plan,
    plan_scale,
    time_step,
)
from cmtmae_scale.tools.plan.remedies import find_remedies, refuse_memory
from cmtmae_scale.tools.plan.render import COLUMNS, render_plan
from tests.engine.run_case import write_recipe
from tests.pretraining.several_case import write_several

ROOT = Path(__file__).resolve().parents[3]
TINY = Device("tiny", 1e10, 1e9, 1e9, 1e9, 1e8, "made up")
CLUSTER = Cluster(8, 4, TINY, 0.5, "made up", 0.5, 2e7, 3.0)
IMAGES = Images(1000, "made up", 2e5, "made up")
BATCH = ("train.global_batch_size=64", "train.micro_batch_size=4", "train.steps=100")
HYBRID = ("backend.name=fsdp", "backend.sharding=hybrid", "backend.precision=bf16")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def config(recipe: Path) -> Config:
    return load_config(recipe, [*BATCH, *HYBRID])


@pytest.fixture(scope="module")
def counted(config: Config) -> Counted:
    return count_work(config)


@pytest.fixture(scope="module")
def plan(config: Config, counted: Counted) -> Plan:
    return make_plan(config, counted, CLUSTER, IMAGES)


def test_kernels_of_any_micro_batch_are_those_that_are_recorded(
    config: Config, counted: Counted
) -> None:
    train = replace(config.train, micro_batch_size=7)
    recorded = record_step(replace(config, train=train))
    kernels = counted.kernels
    for found, parts in ((kernels.teachers[""], (TEACHER,)), (kernels.update, NEVER_FUSED)):
        own = [one for one in recorded if one.part in parts]
        assert len(own) == len(found) > 0
        assert [one.flops for one in own] == [one.flops + 7 * one.flops_view for one in found]
        moved = [one.bytes + 7 * one.bytes_view for one in found]
        assert [moved_bytes(one) for one in own] == pytest.approx(moved)
    rest = [one for one in recorded if one.part not in (TEACHER, *NEVER_FUSED)]
    assert sum(one.flops for one in rest) == sum(
        one.flops + 7 * one.flops_view for one in counted.kernels.micro
    )


def test_attention_is_counted_as_a_gpu_computes_it(config: Config) -> None:
    """A CPU computes it in float32 where a backward follows."""
    single = replace(config, backend=replace(config.backend, precision="fp32"))
    half_reads, single_reads = (
        [
            sum(one.reads.values())
            for one in record_step(each)
            if one.part in ("student", "decoder") and one.name.startswith("_scaled_dot_product")
            if not one.name.endswith("backward")
        ]
        for each in (config, single)
    )
    assert len(half_reads) > 1 and [2 * moved for moved in half_reads] == single_reads


def test_the_time_of_a_step_is_that_of_a_loop_over_kernels(config: Config) -> None:
    teacher, update = Kernel(0, 6e6, 0, 1e3), Kernel(0, 0, 8e6, 0)
    micro = [Kernel(4e6, 1e6, 2e3, 1e6), Kernel(0, 5e7, 0, 1e4)]
    step = StepKernels({"": [teacher]}, micro, [update])
    found = time_step(config, step, CLUSTER, BatchPlan(96, 4, 8, 3), 2, {"": 0.5})
    expected = 0.0
    for _ in range(3):
        for kernel, share in ((teacher, 0.5), (micro[0], 1), (micro[1], 1)):
            flops, moved = kernel[0] + 4 * kernel[1], kernel[2] + 4 * kernel[3]
            # Half of 1e10 FLOP/s, half of 1e9 B/s.
            expected += share * max(flops / 5e9, moved / 5e8)
    expected += 8e6 / 5e8 / 2  # two ranks share the states
    assert found.device_s == pytest.approx(expected)
    assert found.host_s == pytest.approx((3 * 2.5 + 1) * LAUNCH_S)
    assert found.seconds == found.device_s


def test_micro_steps_repeat_what_each_of_them_gathers(recipe: Path, counted: Counted) -> None:
    networks = counted.networks
    model, momentum = networks.model, networks.momentum
    assert momentum is not None
    momentum.requires_grad_(False)
    for setting, repeated in (
        (["backend.sharding=hybrid"], {"all-gather": 2}),
        (["backend.sharding=full"], {"all-gather": 3}),
        (["backend.name=deepspeed", "backend.zero_stage=1"], {}),
        (["backend.name=deepspeed", "backend.zero_stage=2"], {"all-reduce": 3}),
        (
            ["backend.name=deepspeed", "backend.zero_stage=3"],
            {"all-gather": 3, "reduce-scatter": 3},
        ),
    ):
        config = load_config(recipe, setting)

        def count(encoder: object, config: Config = config) -> dict[tuple[str, int], int]:
            own = momentum if encoder is not None else None
            if config.backend.name == "deepspeed":
                return sum_groups(zero_traffic(config, model, own, 16))[1]
            return sum_groups(fsdp_traffic(config, model, own, 16, 8))[1]

        once, weights = count(momentum), count(None)
        found = {
            (one.kind, one.ranks): one.payload for one in step_traffic(config, networks, 16, 8, 3)
        }
        assert found.keys() == once.keys()
        for group, payload in once.items():
            times = repeated.get(group[0], 1)
            if times == 2:  # the weights in each micro-step, the EMA weights once
                expected = 3 * weights[group] + (payload - weights[group])
            else:
                expected = times * payload
            assert found[group] == expected, (setting, group)
    assert step_traffic(config, networks, 1, 8, 3) == []


def test_collectives_take_the_links_of_a_node_or_the_adapters_of_all_its_ranks(
    recipe: Path,
) -> None:
    gather = Traffic("all-gather", 8, 2, 8_000)
    reduce = Traffic("all-reduce", 2, 1, 1_000)
    hybrid = load_config(recipe, ["backend.sharding=hybrid"])
    one, two = time_exchanges(hybrid, [gather, reduce], 16, 8, 1e6, 1e5)
    assert (one.path, two.path) == ("node", "network")
    assert one.seconds == pytest.approx(7 * 1_000 / 1e6 + 2 * 7 * 3e-6)
    assert two.seconds == pytest.approx(2 * 1_000 / 2 / 1e5 + 2 * 3e-6)
    whole = Traffic("all-reduce", 16, 1, 16_000)
    replicate = load_config(recipe, ["backend.sharding=replicate"])
    for network, rate in ((1e5, 8e5), (1e6, 1e6)):  # eight adapters, at most the links
        (found,) = time_exchanges(replicate, [whole], 16, 8, 1e6, network)
        assert found.seconds == pytest.approx(2 * 15_000 / rate + 2 * 15 * 3e-6)
    (found,) = time_exchanges(replicate, [whole._replace(ranks=8)], 8, 8, 1e6, 1e5)
    assert found.path == "node"


def test_a_plan_is_that_of_a_hand_calculation(plan: Plan, config: Config, counted: Counted) -> None:
    chosen = plan.chosen
    assert chosen.batch == (64, 4, 8, 2)
    expected = state_bytes(config, 4, counted.networks)  # hybrid: the 4 of a node
    expected["input images"] = 4 * (5 * 3 * 64 * 64 + 600_000)  # uint8, of 64 pixels and decoded
    expected["activations"] = 4 * counted.saved_view
    assert chosen.memory == pytest.approx(expected)
    seconds = max(chosen.device_s, chosen.host_s)
    for one in chosen.exchanges:
        seconds += one.seconds
    assert chosen.step_s == pytest.approx(seconds)
    assert chosen.images_s == pytest.approx(64 / seconds)
    assert chosen.days == pytest.approx(100 * seconds / 86400)
    assert chosen.gpu_hours == pytest.approx(8 * 100 * seconds / 3600)
    assert plan.data.views_s == pytest.approx(64 / seconds / 2)  # two nodes
    assert plan.data.bytes_s == pytest.approx(plan.data.views_s * 2e5)
    assert plan.data.cores == pytest.approx(plan.data.views_s / DECODE_VIEWS_S)
    assert 0 < plan.flops_fraction < 0.5
    assert refuse_memory(config, counted, CLUSTER, chosen) is None
    cache = plan.caches[""][0]
    assert cache.online_h == pytest.approx(100 * seconds / 3600)


def test_each_of_several_teachers_has_its_caches_weighed(tmp_path: Path) -> None:
    """As the plan of a run whose other teacher is cached, which takes no time, or online."""
    recipe = write_several(tmp_path)
    line = [*BATCH, *HYBRID, "views.views_per_image=2"]
    config = load_config(recipe, line)
    counted = count_work(config)
    found = make_plan(config, counted, CLUSTER, IMAGES)
    assert list(found.caches) == ["first", "second"]
    hours = 100 * found.chosen.step_s / 3600
    for name, outlooks in found.caches.items():
        assert [(one.codec, one.views) for one in outlooks[:4]] == [
            *(("int8", count) for count in (1, 2, 4, 16))
        ]
        cached = [*line, f"teachers.{name}.mode=cached", "cache.dir=/unused"]
        without = make_plan(load_config(recipe, cached), counted, CLUSTER, IMAGES)
        assert outlooks[0].online_h == pytest.approx(hours)
        assert outlooks[0].run_h == pytest.approx(100 * without.chosen.step_s / 3600)
        assert outlooks[0].run_h < hours
    text = render_plan(config, found)
    for name in found.caches:
        assert f"\nteachers.{name}, the other teachers as they are\ncodec" in text


def test_the_batch_scales_up_to_the_stop(plan: Plan) -> None:
    gpus = [one.gpus for one in plan.scales]
    assert gpus == [1, 4, 8, 16, 32, 64]  # at most one GPU per view
    stop = next((n for n, one in enumerate(plan.scales) if one.limit), len(gpus))
    rates = [one.images_s for one in plan.scales[:stop]]
    assert stop > 1 and rates == sorted(rates)
    for one in plan.scales[:stop]:
        assert max(one.host_s, one.communication_s) <= one.device_s
    if stop < len(gpus):
        assert f"=64 stops scaling at {gpus[stop]} GPUs: with {64 // gpus[stop]} view" in plan.stop


def test_a_batch_that_stays_busy_ends_where_views_do(config: Config, counted: Counted) -> None:
    slow = TINY._replace(bf16_flops_s=1e7, link_bytes_s=1e15)  # kernels take the longest
    found = make_plan(config, counted, replace(CLUSTER, device=slow, network_bytes_s=1e15), IMAGES)
    assert [one.limit for one in found.scales] == [None] * 6
    assert "scales to 64 GPUs; above 64 GPUs there are fewer views than ranks" in found.stop


def test_a_run_that_does_not_fit_is_told_what_does(recipe: Path, counted: Counted) -> None:
    checkpointing = load_config(recipe, [*HYBRID, "backend.activation_checkpointing=true"])
    saved_view = {
        False: counted.saved_view,
        True: saved_bytes(checkpointing, counted.networks.teachers),
    }

    def held_bytes(config: Config) -> float:
        views = batch_plan(config, 8).micro_batch_size
        states = sum(state_bytes(config, 8, counted.networks).values())
        saved = saved_view[config.backend.activation_checkpointing]
        return states + views * (saved + counted.input_view)

    for name in ("fsdp", "deepspeed"):
        line = [*BATCH, "backend.precision=bf16", f"backend.name={name}"]
        if name == "deepspeed":  # the default bucket is larger than all else of this student
            line += ["backend.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"]
        config = load_config(recipe, line)
        activations = 4 * (counted.saved_view + counted.input_view)
        states = held_bytes(config) - activations
        for room in (states + 0.6 * activations, 0.9 * states):
            cluster = replace(CLUSTER, node_size=8, device=TINY._replace(memory_bytes=room / 0.92))
            scale = plan_scale(config, counted, cluster, IMAGES, 8)
            refusal = refuse_memory(config, counted, cluster, scale)
            assert refusal is not None and " GiB for a run; use " in refusal
            *remedies, device = refusal.split("; use ")[1].split(" or ")
            assert remedies and device == "--device a100-40gb"
            for remedy in remedies:
                changed = load_config(recipe, [*line, *remedy.split()])
                assert held_bytes(changed) <= room, remedy


def test_a_smaller_micro_batch_is_advised_with_the_gradients_that_it_keeps_whole(
    recipe: Path, counted: Counted
) -> None:
    """One micro-step reduces at once; FSDP2 adds up the whole gradients of several."""
    line = [*HYBRID, "backend.sharding=full", "train.global_batch_size=32"]
    line += ["train.micro_batch_size=4", "train.steps=100"]
    config = load_config(recipe, line)
    view = counted.saved_view + counted.input_view

    def held_bytes(config: Config) -> float:
        states = sum(state_bytes(config, 8, counted.networks, 4).values())
        return states + view * batch_plan(config, 8).micro_batch_size

    advised: list[str] = []
    for lacking in (0.1, 0.3, 0.5):  # of four views; the whole gradients are 1.5 views more
        room = held_bytes(config) - 4 * lacking * view
        cluster = replace(CLUSTER, device=TINY._replace(memory_bytes=room / 0.92))
        chosen = plan_scale(config, counted, cluster, IMAGES, 8)
        remedy, *_ = find_remedies(config, counted, cluster, chosen)
        assert held_bytes(load_config(recipe, [*line, *remedy.split()])) <= room, remedy
        advised.append(remedy)
    smaller = [f"train.micro_batch_size={size}" for size in (2, 1, 2)]
    assert advised == [*smaller[:2], f"backend.reduce_every_micro_step=true {smaller[2]}"]


def test_sharded_copies_are_gathered_by_blocks(recipe: Path, counted: Counted) -> None:
    model = counted.networks.model
    sizes = [sum(p.numel() for p in one.parameters()) for one in model.transformer_blocks()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = trained - sum(sizes) + sum(sorted(sizes)[-2:])  # the rest, a block and the next

    def gathered(*overrides: str, kind: str = "gathered blocks") -> float | None:
        config = load_config(recipe, [*BATCH, "backend.precision=bf16", *overrides])
        return state_bytes(config, 8, counted.networks).get(kind)

    assert gathered("backend.sharding=hybrid") is None
    assert gathered("backend.sharding=full") == 2 * expected
    zero = ("backend.name=deepspeed", "backend.zero_stage=3")
    assert gathered(*zero) == 2 * trained
    assert gathered(*zero, kind="gathered copies") == 2 * trained / 8  # of the student alone
    assert gathered(*zero, kind="reduction bucket") == 4 * 500_000_000
    size = "backend.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    assert gathered(*zero, size, kind="reduction bucket") == 4000
    for stage, key, expected in (
        (2, "reduce_bucket_size: 1000", 2000),
        (2, "reduce_bucket_size: 1000, overlap_comm: true", 4000),
        (2, "reduce_bucket_size: 1000, contiguous_gradients: false", None),
        (1, "reduce_bucket_size: 1000", None),
    ):
        line = ("backend.name=deepspeed", f"backend.zero_stage={stage}")
        extra = f"backend.deepspeed={{zero_optimization: {{{key}}}}}"
        assert gathered(*line, extra, kind="reduction bucket") == expected
        if key == "reduce_bucket_size: 1000":
            line = (*line, "backend.precision=fp32")
            assert gathered(*line, extra, kind="reduction bucket") == 4000
    limit = "backend.deepspeed={zero_optimization: {stage3_max_live_parameters: 1000}}"
    assert gathered(*zero, limit) == 2000


def test_a_measured_row_gives_the_fraction(recipe: Path, tmp_path: Path) -> None:
    command = (
        f"python launchers/benchmark.py train --config {recipe} --warm-up 5 --sweep "
        "train.micro_batch_size=2,8 train.micro_batch_size=4 backend.precision=bf16"
    )
    config, device = load_config(recipe), DEVICES["h200"]
    row = {"state": "done", "small": False, "device": "1 x NVIDIA H200", "command": command}
    row["results"] = [{"images_s": 123.0}]
    rows = {"smoke": row | {"results": None}, "open": row | {"state": "failed"}, "large": row}
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"rows": rows}))
    found, outdated = find_step(file, config, device)
    assert found is not None and (found.row, found.images_s) == ("large", 123.0)
    assert found.config.train.micro_batch_size == 4 and not outdated
    kernels = StepKernels({"": [Kernel(0, 989e12, 0, 0)]}, [Kernel(0, 0, 4.8e12, 0)], [])
    # 4 s of matrix products and 1 s of traffic, measured as 4 views in 20 s.
    assert reached_fraction(found._replace(images_s=0.2), kernels, device) == pytest.approx(0.25)
    line = ["train.micro_batch_size=4", "backend.precision=bf16", "views.views_per_image=2"]
    cached = load_config(recipe, [*line, "teacher.mode=cached", "cache.dir=/unused"])
    of_cache = found._replace(images_s=0.2, config=cached)
    assert reached_fraction(of_cache, kernels, device) == pytest.approx(0.05)  # without its teacher
    assert find_step(file, config, DEVICES["a100"]) == (None, [])
    for change in ("arch=vit_tiny_patch16_224", "depth=3", "width=96"):
        other = load_config(recipe, [f"student.{change}"])
        assert find_step(file, other, device).step is None, change
    old = {"old": row | {"command": f"{command} data.threads=2"}, "none": row | {"results": []}}
    file.write_text(json.dumps({"rows": old | rows}))
    assert find_step(file, config, device) == (found, ["old"])
    for text in ("[]", "{", '{"rows": {"large": 1}}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not a result of cmtmae benchmark suite"):
            find_step(file, config, device)


@pytest.mark.parametrize(
    ("measured", "names"),
    [
        ("1 x NVIDIA A100-SXM4-80GB", {"a100"}),
        ("1 x NVIDIA A100-SXM4-40GB", {"a100-40gb"}),
        ("1 x NVIDIA H100 80GB HBM3", {"h100"}),
        ("1 x NVIDIA GH200 480GB", set()),
        ("1 x NVIDIA H200", {"h200"}),
        ("None", set()),
    ],
)
def test_a_row_serves_the_device_that_it_was_measured_on(measured: str, names: set[str]) -> None:
    assert {name for name, device in DEVICES.items() if is_device(measured, device)} == names


def test_results_of_the_suite_that_nobody_named_stop_no_plan(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_options(["--config", str(recipe), "--gpus", "1", "--device", "h200"])
    row = {"state": "done", "small": False, "device": "1 x NVIDIA H200"}
    row |= {"command": f"train --config {recipe} data.threads=2", "results": [{"images_s": 1.0}]}
    file = tmp_path / "runs" / "suite.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"rows": {"old": row}}))
    config, device = load_config(recipe), DEVICES["h200"]
    assert choose_fraction(options, config, device)[0] == FRACTION
    assert (
        "runs/suite.json: skipped 1 row with settings of another version: old"
        in capsys.readouterr().err
    )
    file.write_text("{")
    assert choose_fraction(options, config, device)[0] == FRACTION
    assert "not a result of cmtmae benchmark suite" in capsys.readouterr().err
    options.suite = file
    with pytest.raises(ConfigError, match="not a result of cmtmae benchmark suite"):
        choose_fraction(options, config, device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--device", "h10"], "--device h10: did you mean h100? The known devices"),
        (["--gpus", "8", "--device", "x"], "--device x: The known devices are a100, a100-40gb"),
        (["--gpus", "3"], "cannot be shared by 3 ranks, a whole number of views each; use 2 ranks"),
        (
            ["--gpus", "12", "backend.sharding=hybrid", "train.global_batch_size=24"],
            "12 ranks do not divide into nodes of 8",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_with_a_remedy(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert plan_run(["--config", str(recipe), *arguments]) == EXIT_CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "1.5", "x"])
def test_a_fraction_lies_above_zero_and_up_to_one(recipe: Path, value: str) -> None:
    with pytest.raises(SystemExit) as left:
        plan_run(["--config", str(recipe), "--gpus", "1", "--fraction", value])
    assert left.value.code == EXIT_CONFIG


def test_the_command_prints_every_section(
    recipe: Path,
    counted: Counted,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # without results of the suite
    monkeypatch.setattr(plan_module, "count_kernels", lambda config: counted.kernels)
    line = ["--config", str(recipe), "--gpus", "2", "--price", "2", *BATCH]
    assert plan_run(line) == EXIT_DONE
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= COLUMNS
    starts = ("memory", "time", "communication", "data", "teacher cache", "scaling")
    headings = [one for one in text.splitlines() if one.startswith(starts)]
    assert [one.split(",")[0].split(" per")[0].split(" against")[0] for one in headings] == [
        "memory",
        "time and cost",
        "communication",
        "data",
        "teacher cache",
        "scaling of this batch",
    ]
    assert all("modelled" in one for one in headings)
    assert f"{FRACTION:.0%} of both rates: assumed (--fraction)" in text
    assert "64 = 4 micro x 2 ranks x 8 accumulation" in text and ", which cost " in text


def test_devices_are_found_in_any_case() -> None:
    assert find_device("H100") is DEVICES["h100"]


def test_the_rate_of_decoding_is_the_measured_one() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    assert f"`data.worker_type=process` | {DECODE_VIEWS_S:.0f} (" in page


def test_a_plan_without_caches_says_why(plan: Plan, config: Config) -> None:
    text = render_plan(config, replace(plan, caches=[]))
    assert "none: the number of images is unknown; give data.expected_images=N" in text
    alone = replace(config.loss, teacher=0.0)
    mask = replace(config.mask, sampler="random")
    text = render_plan(replace(config, loss=alone, mask=mask), replace(plan, caches=[]))
    assert "none: the run uses no teacher" in text


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    for gpus in ("64", "512"):
        assert plan_run(["--config", "vit_huge", "--gpus", gpus, "--price", "2.5"]) == EXIT_DONE
        assert capsys.readouterr().out in page
