import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from cmtmae_scale.config.needs import Needs
from cmtmae_scale.method.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton
from cmtmae_scale.teachers.online import OnlineTeacher
from tests.teachers.cases import (
    TINY,
    build,
    make_config,
    prob,
    random_images,
    real_teacher,
    refusal,
    to_open_clip,
    write_json,
)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return write_json(tmp_path / "tiny.json", TINY)


@pytest.fixture
def clip() -> open_clip.CLIP:
    torch.manual_seed(3)
    return open_clip.CLIP(**TINY).eval()


def normalised(images: Tensor, mean: Any = CLIP_MEAN, std: Any = CLIP_STD) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def reference(visual: Any, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every block's output and head-mean attention, by the library's own modules."""
    tokens, outputs, weights = visual._embeds(pixels), [], []
    for block in visual.transformer.resblocks:
        normed = block.ln_1(tokens)
        weights.append(block.attn(normed, normed, normed, need_weights=True)[1])
        tokens = block(tokens)
        outputs.append(tokens)
    return outputs, weights


@pytest.mark.parametrize(
    ("model", "quick_gelu", "size", "student_patch", "expected_size"),
    [
        ("ViT-B-16-quickgelu", True, 224, 16, 224),
        pytest.param("ViT-L-14", False, 224, 16, 196, marks=pytest.mark.slow),
    ],
)
def test_equals_the_librarys_own_forward(
    model: str, quick_gelu: bool, size: int, student_patch: int, expected_size: int
) -> None:
    teacher = build(make_config(size, student_patch, model=model, quick_gelu=quick_gelu))
    assert teacher.image_size == expected_size
    assert teacher.grid == (14, 14)
    images = random_images(1, expected_size)
    view = teacher(images)
    visual: Any = teacher.model
    pixels = normalised(images)
    outputs, weights = reference(visual, pixels)
    assert view.attention is not None and view.features is not None
    torch.testing.assert_close(view.attention, prob(weights[-1][:, 0, 1:]), atol=1e-7, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(view.features[:, 0], visual(pixels), atol=1e-5, rtol=1e-5)
        every = visual.ln_post(outputs[-1]) @ visual.proj
    torch.testing.assert_close(view.features, every, atol=1e-5, rtol=1e-5)
    assert teacher.width == view.features.shape[-1]


def test_layers_are_averaged_and_features_come_as_asked(tiny: str) -> None:
    config = make_config(model=tiny, feature="block")
    config.attention.layers = [-1, 0]
    config.target.teacher.layers = [-1, -2]
    teacher = build(config)
    images = random_images(2, 32)
    outputs, weights = reference(teacher.model, normalised(images))
    view = teacher(images)
    assert view.attention is not None and view.features is not None
    expected = (prob(weights[-1][:, 0, 1:]) + prob(weights[0][:, 0, 1:])) / 2
    torch.testing.assert_close(view.attention, expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(view.features, (outputs[-1] + outputs[-2]) / 2)
    assert teacher.width == 32
    config.teacher.feature, config.target.teacher.layers = "ln_post", [-1]
    features = build(config)(images).features
    assert features is not None
    torch.testing.assert_close(features, teacher.model.ln_post(outputs[-1]).detach())  # pyright: ignore


def test_mean_query_is_the_column_mean_over_patches(tiny: str) -> None:
    config = make_config(model=tiny)
    config.attention.source = "mean_query"
    teacher = build(config)
    images = random_images(2, 32)
    _, weights = reference(teacher.model, normalised(images))
    attention = teacher(images).attention
    assert attention is not None
    torch.testing.assert_close(attention, prob(weights[-1][:, 1:].mean(1)[:, 1:]))


def test_what_is_not_needed_is_not_computed(tiny: str) -> None:
    calls: list[int] = []

    def count(teacher: OnlineTeacher) -> int:
        calls.clear()
        for block in teacher.tower.blocks:
            block.register_forward_hook(lambda *_: calls.append(1))
        return len(calls)

    maps = build(make_config(model=tiny), Needs(True, False, False, False, False))
    count(maps)
    view = maps(random_images(1, 32))
    assert view.features is None and view.attention is not None
    assert len(calls) == 2  # the last block's input is enough
    features = build(make_config(model=tiny), Needs(False, True, False, False, False))
    view = features(random_images(1, 32))
    assert view.attention is None and view.features is not None


def test_no_teacher_where_nothing_uses_it(tiny: str) -> None:
    none = Needs(False, False, True, True, False)
    assert build_teacher(make_config(model=tiny), "cpu", torch.float32, none) is None
    assert build_teacher(make_config(model=tiny, mode="none"), "cpu", torch.float32) is None


def test_bf16_computes_in_bf16_and_maps_stay_float32(tiny: str) -> None:
    images = random_images(2, 32)
    exact = build(make_config(model=tiny))(images)
    view = build(make_config(model=tiny), dtype=torch.bfloat16)(images)
    assert view.attention is not None and exact.attention is not None
    assert view.features is not None and view.features.dtype == torch.bfloat16
    assert view.attention.dtype == torch.float32
    torch.testing.assert_close(view.attention.sum(-1), torch.ones(2))
    torch.testing.assert_close(view.attention, exact.attention, atol=1e-2, rtol=5e-2)


def test_frozen_and_without_text_tower(tiny: str) -> None:
    teacher = build(make_config(model=tiny))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(m.training for m in teacher.model.modules())
    assert type(teacher.model) is open_clip.transformer.VisionTransformer
    assert not any("token_embedding" in name for name in teacher.model.state_dict())


def test_random_weights_are_seeded_and_leave_the_global_state(tiny: str) -> None:
    state = torch.random.get_rng_state()
    first, second = build(make_config(model=tiny)), build(make_config(model=tiny))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_grid_is_resized_with_a_warning(
    tiny: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = build(make_config(model=tiny, image_size=48))
    assert "6x6" in caplog.text and "4x4" in caplog.text
    view = teacher(random_images(2, 48))
    assert view.attention is not None and view.attention.shape == (2, 16)
    torch.testing.assert_close(view.attention.sum(-1), torch.ones(2))
    assert view.features is not None and view.features.shape == (2, 17, 24)
    with pytest.raises(ValueError, match=r"expected \[B, 48, 48, 3\]"):
        teacher(random_images(2, 32))


@pytest.mark.parametrize("form", ["whole", "visual", "wrapped", "module", "safetensors"])
def test_every_form_of_a_local_file_gives_the_same_tower(
    form: str, tiny: str, clip: open_clip.CLIP, tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    state: dict[str, Any] = dict(clip.state_dict())
    if form == "visual":
        state = dict(clip.visual.state_dict())
    if form in ("wrapped", "module"):
        state = {f"module.{name}": value for name, value in state.items()}
    if form == "wrapped":
        state = {"epoch": 3, "state_dict": state}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    teacher = build(make_config(model=tiny, weights=str(path)))
    features = teacher(random_images(2, 32)).features
    assert features is not None
    with torch.no_grad():
        expected = clip.visual(normalised(random_images(2, 32)))
    torch.testing.assert_close(features[:, 0], expected, atol=1e-5, rtol=1e-5)
    finger = teacher.fingerprint()
    assert finger["weights"] == path.name
    assert len(str(finger["weights_sha256"])) == 64
    assert str(tmp_path) not in str(finger)


def test_positions_are_resized_as_open_clip_does(
    tiny: str, clip: open_clip.CLIP, tmp_path: Path
) -> None:
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    teacher = build(make_config(48, model=tiny, weights=str(tmp_path / "w.pt")))
    vision = TINY["vision_cfg"] | {"image_size": 48}  # pyright: ignore
    larger = open_clip.CLIP(**(TINY | {"vision_cfg": vision})).eval()
    state = dict(clip.state_dict())
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    features = teacher(random_images(1, 48)).features
    assert features is not None and features.shape[1] == 37
    with torch.no_grad():
        expected = larger.visual(normalised(random_images(1, 48)))
    torch.testing.assert_close(features[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_depth_keeps_the_first_blocks(tiny: str, clip: open_clip.CLIP, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    settings = {"model": tiny, "weights": str(tmp_path / "w.pt"), "feature": "block"}
    teacher = build(make_config(**settings, depth=2))
    outputs, _ = reference(clip.visual, normalised(random_images(1, 32)))
    features = teacher(random_images(1, 32)).features
    assert features is not None
    torch.testing.assert_close(features, outputs[1], atol=1e-5, rtol=1e-5)
    assert "teacher.depth=9" in refusal(make_config(**settings, depth=9))
    config = make_config(**settings, depth=2)
    config.attention.layers = [2]
    assert "attention.layers=[2]: the teacher has 2 blocks" in refusal(config)
    config.attention.layers, config.target.teacher.layers = [-1], [-3]
    assert "target.teacher.layers=[-3]" in refusal(config)
    config.target.teacher.layers = [-1, 1]
    assert "target.teacher.layers=[-1, 1] names a block twice" in refusal(config)


def test_quick_gelu_is_settled_or_refused(tiny: str, tmp_path: Path) -> None:
    assert "teacher.quick_gelu must be given" in refusal(make_config(model=tiny, quick_gelu=None))
    text = refusal(make_config(model="ViT-B-16-quickgelu", quick_gelu=False))
    assert "teacher.quick_gelu=false" in text and "built with QuickGELU" in text
    for tag in ("openai", "dfn2b", "metaclip_400m", "metaclip_fullcc"):
        text = refusal(make_config(model="ViT-B-16", weights=tag, quick_gelu=False))
        assert "teacher.quick_gelu=false" in text and f"the weights {tag}" in text
    text = refusal(make_config(model="ViT-H-14", weights="dfn5b", quick_gelu=False))
    assert "trained with quick_gelu=true" in text
    for model in ("ViT-B-16", "ViT-B-16-quickgelu"):
        text = refusal(make_config(model=model, weights="laion2b_s34b_b88k", quick_gelu=True))
        assert "trained with quick_gelu=false" in text
    quick = build(make_config(model=tiny, quick_gelu=True))
    activations = {type(m).__name__ for m in quick.model.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU"}
    described = write_json(tmp_path / "quick.json", TINY | {"quick_gelu": True})
    assert "quick.json is built with QuickGELU" in refusal(make_config(model=described))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without internet, and without the weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_an_unreachable_tag_names_the_download_and_its_file() -> None:
    text = refusal(make_config(224, 16, model="ViT-B-16", weights="openai", quick_gelu=True))
    assert "teacher.weights=openai cannot be downloaded" in text
    folder = "datasets/teachers/vit_base_patch16_clip_224.openai"
    assert (
        "run `hf download timm/vit_base_patch16_clip_224.openai open_clip_model.safetensors "
        f"--local-dir {folder}`, then set teacher.weights={folder}/open_clip_model.safetensors"
    ) in text and text.endswith("open_clip_model.safetensors")


@pytest.mark.usefixtures("offline")
def test_an_unreachable_tag_with_pixels_of_its_own_names_its_description_too() -> None:
    text = refusal(
        make_config(224, 14, model="ViT-L-14", weights="laion2b_s32b_b82k", quick_gelu=False)
    )
    folder = "datasets/teachers/CLIP-ViT-L-14-laion2B-s32B-b82K"
    assert "open_clip_model.safetensors open_clip_config.json --local-dir" in text
    assert text.endswith(f" teacher.model={folder}/open_clip_config.json")


def test_unknown_names_list_what_there_is() -> None:
    text = refusal(make_config(model="ViT-B-16", weights="opanai", quick_gelu=True))
    assert "neither a file nor a tag of ViT-B-16" in text and "openai" in text
    assert "did you mean" in refusal(make_config(model="ViT-B16"))
    assert "teacher.model must be given" in refusal(make_config(model=None))
    assert "teacher.weights must be given" in refusal(make_config(model="ViT-B-16", weights=None))


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("ViT-B-16-SigLIP", "teacher.library=timm teacher.model=vit_base_patch16_siglip_224"),
        ("RN50", "no patch tokens"),
        ("coca_ViT-B-32", "attentional_pool"),
        ("ViT-L-14-CLIPA", "pool_type"),
    ],
)
def test_other_towers_are_refused_with_a_remedy(model: str, remedy: str) -> None:
    text = refusal(make_config(model=model))
    assert remedy in text or "final_ln_after_pool" in text
    assert f"teacher.model={model}" in text


def test_broken_descriptions_are_named(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(make_config(model=str(tmp_path / "no.json")))
    (tmp_path / "bad.json").write_text("{")
    assert "not a JSON file" in refusal(make_config(model=str(tmp_path / "bad.json")))
    empty = write_json(tmp_path / "empty.json", {})
    assert "needs embed_dim and vision_cfg" in refusal(make_config(model=empty))
    norm = write_json(
        tmp_path / "norm.json", TINY | {"vision_cfg": TINY["vision_cfg"] | {"qk_norm": True}}
    )  # pyright: ignore
    assert "qk_norm=True" in refusal(make_config(model=norm))
    for wrong in (
        TINY | {"vision_cfg": "x"},
        TINY | {"embed_dim": [1]},
        TINY | {"embed_dim": 0},
        {"model_cfg": TINY, "preprocess_cfg": []},
    ):
        path = write_json(tmp_path / "wrong.json", wrong)
        assert "not an open_clip model config" in refusal(make_config(model=path))
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert "there is no such file" in refusal(make_config(model=str(pipe)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_theta", 100, r"vision_cfg.rope_theta is not known to open_clip \S+; install the"),
        *(
            (key, value, f"vision_cfg.{key} is {value!r}; expected a whole number above 0")
            for key, value in (
                ("patch_size", 0),
                ("width", 32.0),
                ("layers", "2"),
                ("layers", True),
                ("head_width", None),
            )
        ),
        ("mlp_ratio", "x", r"cannot build a tower from vision_cfg .*'mlp_ratio': 'x'.*; correct"),
        ("head_width", 64, r"cannot build a tower from vision_cfg .*'head_width': 64.*; correct"),
        ("norm_kwargs", {"a": 1}, r"cannot build a tower from vision_cfg .*TypeError.*; correct"),
    ],
)
def test_values_that_form_no_tower_are_named(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    vision: Any = TINY["vision_cfg"]
    model = write_json(tmp_path / "odd.json", TINY | {"vision_cfg": vision | {key: value}})
    text = refusal(make_config(model=model))
    assert text.startswith(f"teacher.model={model}: ") and re.search(message, text)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("std", [0, 0, 0], "three numbers above 0"),
        ("std", [0.5, float("nan"), 0.5], "three numbers above 0"),
        ("std", [0.5, 0.5], "three numbers above 0"),
        ("mean", [0.5, 0.5, "x"], "three numbers"),
        ("mean", 0.5, "three numbers"),
    ],
)
def test_pixels_that_cannot_be_normalised_are_named(
    tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    tree = {"model_cfg": TINY, "preprocess_cfg": {key: value}}
    model = write_json(tmp_path / "odd.json", tree)
    wanted = f"teacher.model={model}: preprocess_cfg.{key} is {value}; expected {expected}"
    assert refusal(make_config(model=model)) == wanted


def test_names_that_open_clip_would_fetch_are_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda name: pytest.fail(name))
    for name in ("hf-hub:a/b", "hf-hub:b", "local-dir:/etc"):
        assert f"teacher.model={name} is not a model" in refusal(make_config(model=name))


def test_files_that_do_not_fit_are_named(tiny: str, clip: open_clip.CLIP, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    config = make_config(model=tiny, weights=str(path))

    def said(content: object) -> str:
        torch.save(content, path)
        text = refusal(config)
        assert f"teacher.weights={path}" in text
        return text

    state = dict(clip.state_dict())
    text_only = {name: value for name, value in state.items() if not name.startswith("visual.")}
    assert "only a text tower" in said(text_only)
    assert "no image tower" in said({"a": torch.zeros(1)})
    short = {name: value for name, value in state.items() if name != "visual.ln_post.bias"}
    assert "1 missing (ln_post.bias)" in said(short)
    assert "1 unexpected (extra)" in said(state | {"visual.extra": torch.zeros(1)})
    wide = state | {"visual.proj": torch.zeros(32, 25)}
    assert "proj [32, 25] instead of [32, 24]" in said(wide)
    ragged = state | {"visual.positional_embedding": torch.zeros(14, 32)}
    assert "14 rows" in said(ragged)
    assert "teacher.library=timm" in said({"visual.trunk.cls_token": torch.zeros(1)})
    assert "teacher.library=timm" in said({"patch_embed.proj.weight": torch.zeros(1)})
    assert "transformers library" in said({"vision_model.x": torch.zeros(1)})
    assert "'step' is a int, not a tensor" in said({"step": 3})
    assert "contains no state dict" in said([1])
    assert "weights_only=True" in said(open_clip.CLIPTextCfg())
    path.write_bytes(path.read_bytes()[:100])
    assert "copy it again" in refusal(config)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x00" * 20)
    assert "not a complete safetensors file" in refusal(make_config(model=tiny, weights=str(torn)))
    gone = str(tmp_path / "gone.pt")
    assert "there is no such file" in refusal(make_config(model=tiny, weights=gone))
    other = tmp_path / "w.npz"
    other.write_bytes(b"")
    assert "unknown file type" in refusal(make_config(model=tiny, weights=str(other)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but OpenAI wrote such files
def test_a_torchscript_archive_is_refused_unread(tiny: str, tmp_path: Path) -> None:
    path = str(tmp_path / "jit.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    text = refusal(make_config(model=tiny, weights=path))
    assert "TorchScript archive" in text and "torch.save(torch.jit.load" in text


def test_sizes_and_sources_that_cannot_work_are_refused(tiny: str) -> None:
    text = refusal(make_config(model=tiny, image_size=30))
    assert "teacher.image_size=30" in text and "use 24 or 32" in text
    config = make_config(model=tiny)
    config.attention.source = "pool"
    assert "attention.source=pool" in refusal(config)


def test_fingerprint_tells_settings_apart(tiny: str) -> None:
    finger = build(make_config(model=tiny)).fingerprint()
    assert finger["library"] == "open_clip" and finger["library_version"] == "3.3.0"
    assert finger["model"] == "tiny" and finger["weights"] == "random"
    assert finger["image_size"] == 32 and finger["quick_gelu"] is False
    assert finger["mean"] == list(CLIP_MEAN) and finger["std"] == list(CLIP_STD)
    assert finger["depth"] == 3 and finger["layers"] == [2] and finger["attention_layers"] == [2]
    assert finger["attention_source"] == "cls" and finger["feature"] == "proj"
    assert finger != build(make_config(model=tiny, quick_gelu=True)).fingerprint()
    assert finger != build(make_config(model=tiny, feature="ln_post")).fingerprint()


def test_skeleton_on_meta_allocates_nothing() -> None:
    config = make_config(224, 16, model="ViT-L-14-quickgelu", weights="openai", quick_gelu=True)
    with torch.device("meta"):
        teacher = build_teacher_skeleton(config)
    assert teacher.width == 768 and teacher.image_size == 196
    assert all(p.is_meta for p in teacher.model.parameters())


def test_the_real_teacher_agrees_across_libraries(tmp_path: Path) -> None:
    state, description = real_teacher()
    save_file(state, tmp_path / "timm.safetensors")
    save_file(to_open_clip(state), tmp_path / "clip.safetensors")
    pixels = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    model = write_json(tmp_path / "s.json", {"model_cfg": description, "preprocess_cfg": pixels})
    ours = build(make_config(64, 8, model=model, weights=str(tmp_path / "clip.safetensors")))
    other = build(
        make_config(
            64,
            8,
            library="timm",
            model="vit_small_patch14_dinov2",
            weights=str(tmp_path / "timm.safetensors"),
            depth=10,
            feature="ln_post",
            quick_gelu=None,
        )
    )
    assert ours.image_size == other.image_size == 112
    images = random_images(2, 14).repeat_interleave(8, 1).repeat_interleave(8, 2)
    first, second = ours(images), other(images)
    assert first.features is not None and second.features is not None
    assert first.attention is not None and second.attention is not None
    cosine = torch.cosine_similarity(first.features, second.features, dim=-1)
    assert cosine.min() > 0.9999
    torch.testing.assert_close(first.attention, second.attention, atol=1e-4, rtol=1e-2)
