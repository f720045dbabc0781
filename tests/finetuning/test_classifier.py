"""The classifier: timm's own model, MAE's head and learning rates, drop path per view."""

import pytest
import timm
import torch
from torch import nn

from cmtmae_scale.backends.adamw import parameter_groups, trainable
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.finetuning.classifier import (
    Classifier,
    build_classifier,
    classifier_values,
    layer_scale,
)
from cmtmae_scale.finetuning.draws import branch_factors
from cmtmae_scale.method.initialisation import write_values

ARCH, SIZE, CLASSES = "test_vit", 64, 7
POOLS = {"mean": {"global_pool": "avg", "fc_norm": True}, "cls": {"global_pool": "token"}}
every_pool = pytest.mark.parametrize("pool", POOLS)


def classifier(pool: str = "mean") -> Classifier:
    """One with weights that are all different from zero."""
    found = build_classifier(StudentConfig(ARCH, 16), SIZE, classes=CLASSES, pool=pool)  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return found


def theirs(pool: str) -> nn.Module:
    return timm.create_model(ARCH, num_classes=CLASSES, img_size=SIZE, **POOLS[pool]).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@every_pool
def test_timm_loads_the_weights_and_computes_the_same_logits(pool: str) -> None:
    own, other = classifier(pool).eval(), theirs(pool)
    other.load_state_dict(own.encoder.state_dict(), strict=True)
    torch.testing.assert_close(own(images()), other(images()), rtol=1e-4, atol=1e-5)


EVAS = (
    "vit_base_patch16_dinov3",
    "eva02_base_patch14_224",
    "eva02_enormous_patch14_clip_224",  # norms at the end of the branches
    "vit_pe_core_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",
    "eva_giant_patch14_224",  # absolute positions alone
)
SIZES = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 2}


@every_pool
@pytest.mark.parametrize("arch", EVAS)
def test_an_eva_computes_timms_logits_and_drops_branches_by_view(arch: str, pool: str) -> None:
    own = build_classifier(StudentConfig(arch, 8, 96, 2, 2), 48, classes=CLASSES, pool=pool).eval()  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.2, generator=generator)
    is_mean = pool == "mean"
    norms = {"use_fc_norm": is_mean, "use_post_transformer_norm": not is_mean}
    kind = {"num_classes": CLASSES, "img_size": 48, "global_pool": "avg" if is_mean else "token"}
    other = timm.create_model(arch, **kind, **norms, **SIZES).eval()
    other.load_state_dict(own.encoder.state_dict(), strict=True)
    views = torch.randn(3, 3, 48, 48, generator=generator)
    expected = other(views)
    torch.testing.assert_close(own(views), expected, rtol=1e-4, atol=1e-4)
    keep = torch.ones(3, 2, 2)
    torch.testing.assert_close(own(views, keep), own(views))
    keep[1, 0, 1] = keep[2] = 0  # an MLP of the second view, all branches of the third
    dropped = own(views, keep)
    torch.testing.assert_close(dropped[0], own(views)[0])
    assert not torch.allclose(dropped[1], expected[1], rtol=1e-2)
    tokens = own.encoder.norm(own.encoder.embed(views[2:]))
    torch.testing.assert_close(dropped[2:], own.encoder.forward_head(tokens))
    scales = {layer_scale(2, 0.5)(name) for name, _ in trainable(own)}
    assert scales == {1.0, 0.5, 0.25, 0.125}
    own.train()(views, keep).sum().backward()
    assert all(one.grad is not None for one in own.parameters())


def test_all_weights_are_trained_the_positions_too() -> None:
    own = classifier()
    names = {name.removeprefix("encoder.") for name, _ in trainable(own)}
    assert names == {name for name, _ in theirs("mean").named_parameters()}


def mae_rule(model: nn.Module, decay: float) -> dict[str, tuple[float, bool]]:
    """Factor and whether weight decay acts, by name: the rule of MAE's fine-tuning, in words.

    Layers are counted from the head, whose factor is 1. The last block is one below the head, and
    so on; below the first block are patch embedding, class token and positions. No weight decay for
    one-dimensional tensors, class token and positions.
    """
    found = {}
    depth = len(model.blocks)
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        below_head = 0
        if first == "blocks":
            below_head = depth - int(rest[0])
        elif first in ("patch_embed", "cls_token", "pos_embed"):
            below_head = depth + 1
        factor = 1.0
        for _ in range(below_head):
            factor *= decay
        exempt = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        found[name] = (factor, not exempt)
    return found


@every_pool
def test_learning_rates_and_weight_decay_are_those_of_mae(pool: str) -> None:
    own = classifier(pool)
    expected = mae_rule(own.encoder, 0.65)
    names = {id(parameter): name for name, parameter in own.encoder.named_parameters()}
    scale = layer_scale(len(own.encoder.blocks), 0.65)
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in parameter_groups(trainable(own), 0.05, scale)
        for parameter in group["params"]
    }
    assert found.keys() == expected.keys()
    for name, (factor, decays) in expected.items():
        assert found[name] == (pytest.approx(factor, rel=1e-12), decays), name


@pytest.mark.parametrize(
    ("name", "power"),
    [
        *(("head.weight", 0), ("fc_norm.bias", 0), ("norm.weight", 0)),
        *(("blocks.11.attn.qkv.weight", 1), ("blocks.0.mlp.fc1.bias", 12)),
        *(("patch_embed.proj.weight", 13), ("cls_token", 13), ("pos_embed", 13)),
        *(("reg_token", 13), ("norm_pre.weight", 13)),
    ],
)
def test_layers_of_a_vit_b(name: str, power: int) -> None:
    assert layer_scale(12, 0.65)(f"encoder.{name}") == pytest.approx(0.65**power, rel=1e-12)


def test_a_branch_that_is_left_out_adds_nothing_and_others_are_timms() -> None:
    own = classifier().eval()
    depth = len(own.encoder.blocks)
    ones = torch.ones(3, depth, 2)
    torch.testing.assert_close(own(images(), ones), own(images()))
    dropped = ones.clone()
    dropped[1] = 0  # the second view goes through no block at all
    bare = classifier().eval()
    for block in bare.encoder.blocks:
        block.forward = lambda x, keep=None: x
    expected = own(images())
    expected[1] = bare(images())[1]
    torch.testing.assert_close(own(images(), dropped), expected, rtol=1e-4, atol=1e-5)


def test_recomputing_blocks_changes_no_gradient() -> None:
    gradients = []
    keep = branch_factors(0, torch.arange(3), 12, 0.5)
    for recompute in (False, True):
        own = classifier().train()
        own.encoder.set_grad_checkpointing(recompute)
        own(images(), keep[:, : len(own.encoder.blocks)]).square().sum().backward()
        gradients.append({name: one.grad for name, one in own.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0)


def test_drop_path_is_timms_law_whatever_the_batch() -> None:
    positions = torch.arange(40_000)
    found = branch_factors(3, positions, 4, 0.3)
    assert found is not None and found.shape == (40_000, 4, 2)
    rates = torch.tensor([0.0, 0.1, 0.2, 0.3])
    shares = (found == 0).float().mean(0)
    # deviation of a share: sqrt(0.3 * 0.7 / 40000) = 0.0023
    torch.testing.assert_close(shares, rates[:, None].expand(4, 2), rtol=0, atol=0.01)
    kept = found.amax(0)
    torch.testing.assert_close(kept, (1 / (1 - rates))[:, None].expand(4, 2))
    again = branch_factors(3, positions[100:103], 4, 0.3)
    assert torch.equal(again, found[100:103])
    assert branch_factors(3, positions, 4, 0.0) is None
    both = (found == 0).all(-1).float().mean(0)
    torch.testing.assert_close(both, rates.square(), rtol=0, atol=0.01)  # two draws per block


@every_pool
def test_the_encoders_weights_arrive_and_the_head_is_fresh(pool: str) -> None:
    encoder = timm.create_model(ARCH, num_classes=0, img_size=SIZE)

    def start(seed: int) -> dict[str, torch.Tensor]:
        own = classifier(pool)
        write_values(own, classifier_values(own, encoder.state_dict(), "x", seed))
        return own.encoder.state_dict()

    state = start(5)
    for name, value in encoder.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value), name
    assert ("norm.weight" in state) == (pool == "cls")
    if pool == "mean":
        assert (state["fc_norm.weight"] == 1).all() and not state["fc_norm.bias"].any()
    head = state["head.weight"]
    assert 1e-5 < head.std() < 4e-5 and not state["head.bias"].any()
    assert torch.equal(start(5)["head.weight"], head)
    assert not torch.equal(start(6)["head.weight"], head)


def test_a_norm_after_the_pooling_becomes_the_last_norm() -> None:
    encoder = timm.create_model(ARCH, num_classes=0, img_size=SIZE, global_pool="avg", fc_norm=True)
    with torch.no_grad():
        encoder.fc_norm.weight.fill_(2)
    own = classifier("cls")
    write_values(own, classifier_values(own, encoder.state_dict(), "x", 0))
    assert torch.equal(own.encoder.norm.weight, encoder.fc_norm.weight)


def test_what_does_not_fit_is_named() -> None:
    own = classifier()
    state = timm.create_model(ARCH, num_classes=0, img_size=SIZE).state_dict()
    gone = {name: value for name, value in state.items() if name != "blocks.0.norm1.weight"}
    with pytest.raises(ConfigError, match=r"FILE does not fit: absent \['blocks.0.norm1.weight'\]"):
        classifier_values(own, gone, "FILE", 0)
    small = state | {"pos_embed": torch.zeros(1, 5, 64)}
    with pytest.raises(ConfigError, match=r"FILE does not fit: pos_embed has shape \(1, 5, 64\)"):
        classifier_values(own, small, "FILE", 0)
    with pytest.raises(ConfigError, match=r"head.pool=cls: \w+ has no class token; set head.pool"):
        build_classifier(StudentConfig("test_vit4", 16), SIZE, classes=2, pool="cls")
