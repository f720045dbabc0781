"""Initial weights from timm, MAE and transformers: outputs, counts, errors, runs."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.checkpoint.init_weights import InitReport, load_init_weights
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_STOPPED, ConfigError, exit_code_of
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import PatchChoice
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.pretraining.build import build_models
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers import weights
from cmtmae_scale.teachers.weights import read_weights
from tests.engine.run_case import run, tensors, this_world, write_recipe
from tests.processes import run_ranks
from tests.references import vit_mae
from tests.references.decoders import sincos_table

State = dict[str, Tensor]
ALONE, CPU = World(0, 1, 0, 1, "none"), torch.device("cpu")


def make_config(decoder: Any = "full", size: int = 64, **student: Any) -> Config:
    """MAE's losses; ``test_vit`` is 64 wide, 6 deep, 2 heads, MLP 192, patches of 16."""
    config = Config()
    config.student.arch, config.views.image_size = "test_vit", size
    for key, value in student.items():
        setattr(config.student, key, value)
    config.decoder.type = decoder
    config.decoder.depth, config.decoder.width, config.decoder.heads = 2, 32, 4
    config.loss.teacher, config.loss.student, config.loss.pixel = 0.0, 0.0, 1.0
    config.loss.tokens, config.mask.sampler = "masked", "random"
    config.collaboration.alpha_attention = config.collaboration.alpha_target = 1.0
    config.mask.salient_fraction = 0.0
    return config


def make_model(config: Config | None = None) -> CollaborativeMAE:
    model = CollaborativeMAE(config or make_config())
    initialise(model, 0)
    return model


def shaken(module: nn.Module) -> State:
    torch.manual_seed(1)
    return {
        name: value + 0.05 * torch.randn_like(value) for name, value in module.state_dict().items()
    }


def timm_state(arch: str = "test_vit", size: int = 64, **options: Any) -> State:
    model = timm.create_model(arch, img_size=size, **{"num_classes": 10, **options})
    return shaken(model)


def mae_state(width: int = 32) -> State:
    """Under the names of MAE's public code, its decoder's blocks being timm's."""
    parts = nn.ModuleDict(
        {
            "embed": nn.Linear(64, width),
            "blocks": nn.ModuleList(Block(width, 4, qkv_bias=True) for _ in range(2)),
            "norm": nn.LayerNorm(width),
            "pred": nn.Linear(width, 768),
        }
    )
    state = timm_state(num_classes=0)
    state |= {f"decoder_{name}": value for name, value in shaken(parts).items()}
    state["mask_token"] = torch.randn(1, 1, width)
    table = sincos_table(width, (4, 4)).float()
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, width), table])[None]
    return state


def names(state: State, *prefixes: str) -> set[str]:
    return {name for name in state if name.startswith(prefixes)}


def check_accounts(report: InitReport, state: State) -> None:
    """Every tensor of the file is in exactly one part."""
    listed = [*report.loaded, *report.resampled, *report.skipped]
    assert sorted(listed) == sorted(state)


def make_choice(length: int = 16) -> PatchChoice:
    order = torch.rand(2, length, generator=torch.manual_seed(3)).argsort(1)
    return PatchChoice(order[:, : length // 4], order[:, length // 4 :], order[:, :0])


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.manual_seed(4))


def test_timms_classifier_gives_the_encoder_and_leaves_its_head() -> None:
    model, state = make_model(make_config("prompt")), timm_state()
    decoder = {n: p.clone() for n, p in model.state_dict().items() if n.startswith("decoder.")}
    report = load_init_weights(model, state, "w.pt")
    check_accounts(report, state)
    assert set(report.skipped) == {"head.weight", "head.bias"} and not report.resampled
    theirs = timm.create_model("test_vit", img_size=64, num_classes=10)
    theirs.load_state_dict(state)
    with torch.no_grad():
        found, expected = model.encoder(images()), theirs.forward_features(images())
    assert float((found - expected).abs().max()) < 1e-5
    assert all(torch.equal(model.state_dict()[n], p) for n, p in decoder.items())


def test_maes_release_gives_encoder_and_decoder(tmp_path: Path) -> None:
    state, model = mae_state(), make_model()
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    report = load_init_weights(model, read_weights(tmp_path / "mae_pretrain.pth"), "w")
    check_accounts(report, state)
    assert report.skipped == {"decoder_pos_embed": "the decoder computes its positions"}
    own = model.state_dict()
    assert len(report.loaded) == len(own) == len(state) - 1
    assert torch.equal(own["decoder.mask_token"], state["mask_token"])
    assert torch.equal(own["heads.pixel.bias"], state["decoder_pred.bias"])
    key = "blocks.1.attn.qkv.weight"
    assert torch.equal(own[f"decoder.{key}"], state[f"decoder_{key}"])
    assert torch.equal(own[f"encoder.{key}"], state[key])


@pytest.mark.parametrize("form", ["file", "modules", "old names"])
def test_the_whole_of_transformers_vit_mae_gives_the_same_predictions(
    form: str, tmp_path: Path
) -> None:
    theirs = vit_mae.build(64, 6, 2, 192, 64, 16, (32, 2, 4))
    state = dict(theirs.state_dict())
    if form != "modules":
        theirs.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert "vit.encoder.layer.0.attention.attention.query.weight" in state
    if form == "old names":  # as on the hub; transformers 5.24 saves decoder_encoder.layer
        old = {n.replace("decoder_encoder.layer", "decoder_layers"): p for n, p in state.items()}
        save_file(old, tmp_path / "model.safetensors")
    if form != "modules":
        state = read_weights(tmp_path / "model.safetensors")
    model, choice = make_model(), make_choice()
    report = load_init_weights(model, state, "w")
    check_accounts(report, state)
    assert list(report.skipped) == ["decoder.decoder_pos_embed"] and not report.resampled
    # The noise that makes theirs keep and hide the same patches: each patch's place in our order.
    noise = torch.cat([choice.ids_keep, choice.ids_hidden], 1).argsort(1).float()
    with torch.no_grad():
        logits = theirs(images(), noise=noise).logits
        found = model(images(), choice)["pixel"]
    for row in range(2):
        assert float((found[row] - logits[row, choice.ids_hidden[row]]).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "decoder, width, said",
    [
        ("prompt", 32, "the configured decoder is not MAE's"),
        ("cross", 32, "the configured decoder is not MAE's"),
        ("full", 48, r"is \[48\], the configured decoder.blocks.0.attn.proj.bias \[32\]"),
    ],
)
def test_another_decoder_is_skipped_as_a_whole(decoder: str, width: int, said: str) -> None:
    state, model = mae_state(width), make_model(make_config(decoder))
    before = {n: p.clone() for n, p in model.state_dict().items() if not n.startswith("encoder.")}
    report = load_init_weights(model, state, "w")
    check_accounts(report, state)
    assert set(report.skipped) == names(state, "decoder_", "mask_token")
    (reason,) = set(report.skipped.values())
    assert said.replace("\\", "") in reason
    assert all(torch.equal(model.state_dict()[n], p) for n, p in before.items())


def test_a_decoder_with_other_positions_or_without_a_block_is_skipped() -> None:
    learnt, short = mae_state(), mae_state()
    learnt["decoder_pos_embed"] += 0.1
    short = {n: p for n, p in short.items() if not n.startswith("decoder_blocks.1.")}
    for state, said in (
        (learnt, "not the sine-cosine embedding"),
        (short, "no tensor for decoder."),
    ):
        report = load_init_weights(make_model(), state, "w")
        check_accounts(report, state)
        assert set(report.skipped) == names(state, "decoder_", "mask_token")
        assert said in report.skipped["mask_token"]


def test_a_decoder_without_pixels_leaves_maes_pixel_head() -> None:
    config = make_config()
    config.loss.teacher, config.loss.pixel = 1.0, 0.0
    model, state = CollaborativeMAE(config, {"teacher": 7}), mae_state()
    report = load_init_weights(model, state, "w")
    check_accounts(report, state)
    passed = {"decoder_pos_embed", "decoder_pred.weight", "decoder_pred.bias"}
    assert set(report.skipped) == passed
    assert torch.equal(model.state_dict()["decoder.mask_token"], state["mask_token"])


def test_positions_of_another_grid_are_resampled_and_counted() -> None:
    state, model = timm_state(num_classes=0), make_model(make_config(size=96))
    report = load_init_weights(model, state, "w")
    check_accounts(report, state)
    assert report.resampled == {"pos_embed": "4 x 4 to 6 x 6 patches"}
    table = model.state_dict()["encoder.pos_embed"][0]
    old = state["pos_embed"][0, 1:].T.reshape(1, 64, 4, 4)
    new = nn.functional.interpolate(old, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(table[1:], new[0].flatten(1).T, rtol=0, atol=1e-6)
    assert torch.equal(table[0], state["pos_embed"][0, 0])


def test_bf16_files_give_float32_weights() -> None:
    state = {name: value.bfloat16() for name, value in mae_state().items()}
    model = make_model()
    assert len(load_init_weights(model, state, "w").skipped) == 1  # positions still fit
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_the_report_names_counts_and_reasons() -> None:
    text = str(load_init_weights(make_model(make_config("prompt", 96)), mae_state(), "w"))
    assert text.startswith("77 tensors loaded, 1 resampled (pos_embed: 4 x 4 to 6 x 6 patches), ")
    assert "32 skipped (" in text and "decoder_blocks.*" in text
    assert text.endswith(": the configured decoder is not MAE's)")
    assert text.count("decoder_blocks") == 1


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


CASES = {
    "missing": (
        lambda: without(timm_state(), "blocks.3.norm1.bias"),
        ["no tensor for encoder.blocks.3.norm1.bias [64]", "take a whole file"],
    ),
    "shape": (
        lambda: timm_state() | {"norm.weight": torch.zeros(3)},
        ["norm.weight is [3], the configured encoder.norm.weight [64]", "set student.arch"],
    ),
    "width": (
        lambda: timm_state("vit_tiny_patch16_224", depth=6),
        ["blocks.0.attn.proj.bias is [192]", "[64]; ", "and 7", "set student.arch"],
    ),
    "depth": (
        lambda: timm_state(depth=7),
        ["blocks.6.attn.proj.bias is unexpected", "and 9 more", "set student.arch"],
    ),
    "patch": (
        lambda: timm_state(patch_size=8),
        ["is [64, 3, 8, 8]", "[64, 3, 16, 16]", "set student.patch_size=8", "of 16 pixels"],
    ),
    "registers": (
        lambda: timm_state("test_vit2", depth=6),
        ["no tensor for encoder.cls_token [1, 1, 64]", "more", "set student.arch"],
    ),
    "names": (
        lambda: {"visual.conv1.weight": torch.zeros(2)},
        ["not names of a VisionTransformer", "first: visual.conv1.weight", "take a file of"],
    ),
    "trio": (
        lambda: without(as_transformers(), "vit.encoder.layer.0.attention.attention.key.weight"),
        ["attention.query.weight + vit.", "value.weight is [128, 64]", "[192, 64]"],
    ),
}


def as_transformers() -> State:
    """Enough of transformers' names to be recognised, of one block."""
    block = "vit.encoder.layer.0.attention.attention."
    trio = {f"{block}{part}.weight": torch.zeros(64, 64) for part in ("value", "key", "query")}
    return trio | {"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3, 16, 16)}


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_that_does_not_fit_is_refused_and_nothing_is_changed(case: str) -> None:
    make, said = CASES[case]
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_init_weights(model, make(), "w.pt")
    text = str(caught.value)
    assert text.startswith("student.init_weights=w.pt") and caught.value.exit_code == EXIT_CONFIG
    assert all(part in text for part in said), text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def start_config(file: Path) -> Config:
    """Losses of both models, so that a momentum encoder is built."""
    config = make_config("prompt", init_weights=str(file))
    config.loss.student, config.loss.tokens = 1.0, "all"
    config.collaboration.alpha_target = 0.5
    config.backend.sharding = "full"
    return config


def test_the_momentum_encoder_gets_the_initial_weights_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = timm_state()
    save_file(state, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO):
        models = build_models(start_config(tmp_path / "w.safetensors"), ALONE, CPU, {})
    fragments = models.backend.fragments()
    averages = [key for key in fragments if key.startswith("momentum.")]
    assert len(averages) == 78
    for key in averages:
        name = key.removeprefix("momentum.")
        for prefix in ("momentum.", "model.encoder."):
            assert torch.equal(fragments[prefix + name].local, state[name].flatten())
    (line,) = [line for line in caplog.messages if "student.init_weights" in line]
    assert f"{tmp_path / 'w.safetensors'}: 78 tensors loaded, 0 resampled, 2 skipped" in line


def split_qkv(state: State) -> State:
    """Queries, keys and values as three matrices, as transformers names them."""
    found: State = {}
    for name, value in state.items():
        thirds = zip(("query", "key", "value"), value.chunk(3), strict=False)
        if ".attn.qkv." in name:
            found |= {name.replace("attn.qkv", f"attention.attention.{k}"): v for k, v in thirds}
        else:
            found[name] = value
    return {name: value.contiguous() for name, value in found.items()}


def start_shards(file: Path) -> dict[str, tuple[int, Any]]:
    """Offset and values of this rank's shards of the encoder and of the EMA weights."""
    world = this_world()
    fragments = build_models(start_config(file), world, CPU, {}).backend.fragments()
    return {
        key.removeprefix("model.encoder."): (own.offset, own.local.numpy())
        for key, own in fragments.items()
        if key.startswith(("model.encoder.", "momentum."))
    }


@pytest.mark.gloo
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_each_rank_takes_its_ranges_of_the_file(suffix: str, tmp_path: Path) -> None:
    state, file = timm_state(num_classes=0), tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(split_qkv(state), file)
    found: State = {}
    for rank in run_ranks(2, start_shards, file):
        for key, (offset, local) in rank.items():
            name = key.removeprefix("momentum.")
            found.setdefault(key, torch.full((state[name].numel(),), torch.nan))
            found[key][offset : offset + len(local)] = torch.from_numpy(local)
    assert len(found) == 2 * len(state)
    for key, value in found.items():
        assert torch.equal(value, state[key.removeprefix("momentum.")].flatten()), key


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but such files exist
def test_files_that_cannot_be_read_are_named_with_a_remedy(tmp_path: Path) -> None:
    save_file(timm_state(), tmp_path / "torn.safetensors")
    whole = (tmp_path / "torn.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "notes.txt").write_text("weights")
    torch.save(timm_state(), tmp_path / "torn.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:999])
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    said = {
        "absent.pt": "there is no such file; correct the path",
        "torn.safetensors": "copy it again",
        "page.pt": "download the file itself",
        "torn.pt": "copy it again",
        "notes.txt": "expected .safetensors or .pt",
        "script.pt": "set student.init_weights=NEW",
    }
    for name, remedy in said.items():
        with pytest.raises(ConfigError) as caught:
            build_models(start_config(tmp_path / name), ALONE, CPU, {})
        assert caught.value.exit_code == EXIT_CONFIG
        assert str(caught.value).startswith(f"student.init_weights={tmp_path / name}: ")
        assert remedy in str(caught.value)


def train_and_resume(recipe: Path, file: Path, still: list[str]) -> str:
    """Train a step, resume without the file; return the error of a resume without the key."""
    start = f"student.init_weights={file}"
    run(recipe, [*still, start, "train.stop_after=1"])
    file.unlink()
    with pytest.raises(ConfigError) as caught:
        run(recipe, still)
    assert run(recipe, [*still, start]) is None
    return str(caught.value)


@pytest.mark.gloo
def test_a_store_that_fails_while_the_file_is_read_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> dict[str, Tensor]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    file = tmp_path / "w.safetensors"
    save_file({"norm.weight": torch.ones(2)}, file)
    monkeypatch.setattr(weights, "load_file", fail)
    with pytest.raises(ConfigError, match=r"student\.init_weights=") as raised:
        build_models(start_config(file), ALONE, CPU, {})
    assert exit_code_of(raised.value) == EXIT_STOPPED


def test_a_resumed_run_needs_the_key_but_not_the_file(tmp_path: Path) -> None:
    state, file = timm_state(), tmp_path / "w.safetensors"
    save_file(state, file)
    still = [f"run.output_dir={tmp_path / 'run'}", "optimizer.base_lr=0", "train.steps=2"]
    (error,) = run_ranks(1, train_and_resume, write_recipe(tmp_path), file, still)
    assert error.startswith(
        f"student.init_weights: the checkpoint has {file}, the config None; restore"
    )
    saved = tensors(tmp_path / "run", 2)
    for name, value in state.items():
        if not name.startswith("head."):
            assert torch.equal(saved[f"model.encoder.{name}"].view_as(value), value)
            average = saved[f"momentum.{name}"].view_as(value)
            torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-7)


def test_quantised_and_complex_weights_are_named() -> None:
    model, state = make_model(), timm_state(size=32)  # the embedding would be resampled
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, dtype in (("pos_embed", torch.complex64), ("blocks.0.attn.qkv.weight", torch.int8)):
        with pytest.raises(ConfigError, match=f"{name} is .* instead of float32; save the weights"):
            load_init_weights(model, state | {name: state[name].to(dtype)}, "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
