"""Decoders against MAE's blocks (timm's) and plain formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.config.schema import Decoder as DecoderSettings
from cmtmae_scale.method.decoder import (
    CrossAttention,
    Heads,
    PromptAttention,
    QueryBlock,
    build_decoder,
    split_heads,
)
from cmtmae_scale.method.initialisation import initialise, sincos_positions
from cmtmae_scale.method.masking import PatchChoice
from cmtmae_scale.method.targets import TokenLayout

WIDTH, STUDENT, HEADS, GRID = 24, 20, 3, (4, 4)
KEEP, HIDDEN, THROWN, ROWS = 5, 8, 3, 2
ALL = TokenLayout(True, KEEP, HIDDEN)


def make_choice(seed: int = 0) -> PatchChoice:
    order = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return PatchChoice(*order.split((KEEP, HIDDEN, THROWN), dim=1))


def make_tokens(prefix: int = 1) -> Tensor:
    return torch.randn(ROWS, prefix + KEEP, STUDENT, generator=torch.Generator().manual_seed(1))


def shake(module: nn.Module) -> None:
    """Random values everywhere, biases and norms too."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def make_decoder(layout: TokenLayout = ALL, prefix: int = 1, **settings: Any) -> Any:
    group = DecoderSettings(width=WIDTH, heads=HEADS, **{"depth": 1, **settings})
    decoder = build_decoder(group, STUDENT, GRID, prefix, layout)
    shake(decoder)
    return decoder


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def make_mae_block() -> Block:
    block = Block(WIDTH, HEADS, 4, qkv_bias=True, norm_layer=lambda d, **_: nn.LayerNorm(d, 1e-6))  # pyright: ignore
    shake(block)
    return block


@pytest.mark.parametrize("kind", ["prompt", "full", "cross"])
def test_a_block_has_the_known_number_of_parameters(kind: Any) -> None:
    """Cross-attention to an encoder of the same width has as many."""
    with torch.device("meta"):
        decoder = build_decoder(DecoderSettings(type=kind), 512, (14, 14), 1, ALL)
    counts = [sum(p.numel() for p in block.parameters()) for block in decoder.transformer_blocks()]
    assert counts == [3_152_384] * 8
    assert sum(counts) == 25_219_072


def test_prompt_block_equals_maes_block_at_the_hidden_tokens() -> None:
    mae = make_mae_block()
    block = QueryBlock(PromptAttention(WIDTH, HEADS), WIDTH, norm_context=True)
    block.load_state_dict(mae.state_dict())  # the same keys
    context, x = torch.randn(2, 6, WIDTH), torch.randn(2, 8, WIDTH)
    expected = mae(torch.cat([context, x], dim=1))[:, 6:]
    assert difference(block(x, context), expected) < 2e-6


def test_prompt_block_leaves_the_context_without_norm_by_default() -> None:
    block = QueryBlock(PromptAttention(WIDTH, HEADS), WIDTH)
    shake(block)
    context, x = torch.randn(2, 6, WIDTH), torch.randn(2, 8, WIDTH)
    attn = block.attn
    assert isinstance(attn, PromptAttention)
    y = block.norm1(x)
    q = attn.qkv(y)[..., :WIDTH]
    k, v = attn.qkv(torch.cat([context, y], 1))[..., WIDTH:].chunk(2, -1)
    q, k, v = (split_heads(t, HEADS) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    x2 = x + attn.proj((weights @ v).transpose(1, 2).reshape(2, 8, WIDTH))
    assert difference(block(x, context), x2 + block.mlp(block.norm2(x2))) < 5e-6


def test_order_of_the_context_does_not_matter() -> None:
    block = QueryBlock(PromptAttention(WIDTH, HEADS), WIDTH)
    shake(block)
    context, x = torch.randn(2, 6, WIDTH), torch.randn(2, 8, WIDTH)
    assert difference(block(x, context), block(x, context.flip(1))) < 5e-6


def test_cross_block_on_a_normed_context_equals_maes_block_with_a_mask() -> None:
    mae = make_mae_block()
    block = QueryBlock(CrossAttention(WIDTH, WIDTH, HEADS), WIDTH)
    state = mae.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = state.pop(f"attn.qkv.{kind}").chunk(3)
        state |= {f"attn.q.{kind}": q, f"attn.kv.{kind}": torch.cat([k, v])}
    block.load_state_dict(state)
    context, x = torch.randn(2, 6, WIDTH), torch.randn(2, 8, WIDTH)
    mask = torch.zeros(14, 14, dtype=torch.bool)
    mask[:, :6] = True
    expected = mae(torch.cat([context, x], dim=1), attn_mask=mask[None, None])[:, 6:]
    assert difference(block(x, mae.norm1(context)), expected) < 2e-6


def test_cross_decoder_predicts_each_hidden_token_alone() -> None:
    full = make_decoder(TokenLayout(False, 0, HIDDEN), type="cross", depth=2)
    part = make_decoder(TokenLayout(False, 0, 3), type="cross", depth=2)
    part.load_state_dict(full.state_dict())
    tokens, choice = make_tokens(), make_choice()
    assert difference(full(tokens, choice)[:, :3], part(tokens, choice)) < 5e-6


def test_full_decoder_equals_mae_with_unshuffling() -> None:
    """MAE's own order: mask tokens scattered back to the image, positions added after."""
    decoder, tokens, choice = make_decoder(type="full", depth=2), make_tokens(), make_choice()
    choice = PatchChoice(choice.ids_keep, torch.cat(choice[1:], 1), choice.ids_thrown[:, :0])
    layout = TokenLayout(True, KEEP, HIDDEN + THROWN)
    decoder.layout = layout
    found = decoder(tokens, choice)
    for row in range(ROWS):
        image = decoder.mask_token[0].expand(16, -1).clone()
        image[choice.ids_keep[row]] = decoder.embed(tokens[row, 1:])
        image = image + sincos_positions(WIDTH, GRID)
        x = torch.cat([decoder.embed(tokens[row, :1]), image])[None]
        for block in decoder.blocks:
            x = block(x)
        x = decoder.norm(x)[0]
        order = torch.cat([choice.ids_keep[row], choice.ids_hidden[row]]) + 1
        expected = x[torch.cat([torch.zeros(1, dtype=torch.int64), order])]
        assert difference(found[row], expected) < 2e-5


def test_prompt_decoder_returns_normed_context_for_what_the_encoder_saw() -> None:
    decoder, tokens, choice = make_decoder(depth=2), make_tokens(prefix=3), make_choice()
    decoder.num_prefix = 3
    found = decoder(tokens, choice)
    embedded = decoder.embed(tokens)
    positions = sincos_positions(WIDTH, GRID)[choice.ids_keep]
    cls = F.layer_norm(embedded[:, :1], (WIDTH,), decoder.norm.weight, decoder.norm.bias, 1e-6)
    visible = decoder.norm(embedded[:, 3:] + positions)
    assert difference(found[:, : 1 + KEEP], torch.cat([cls, visible], 1)) < 1e-6
    assert found.shape == (ROWS, 1 + KEEP + HIDDEN, WIDTH)


@pytest.mark.parametrize("kind", ["prompt", "full", "cross"])
@pytest.mark.parametrize(
    "layout",
    [ALL, TokenLayout(False, KEEP, HIDDEN), TokenLayout(False, 0, HIDDEN)],
    ids=["all", "patches", "masked"],
)
def test_a_smaller_layout_takes_the_same_tokens(kind: str, layout: TokenLayout) -> None:
    tokens, choice = make_tokens(), make_choice()
    whole, part = make_decoder(type=kind, depth=2), make_decoder(layout, type=kind, depth=2)
    part.load_state_dict(whole.state_dict(), strict=kind != "cross")
    start = 1 + KEEP + HIDDEN - layout.num_tokens
    assert torch.allclose(whole(tokens, choice)[:, start:], part(tokens, choice), atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "full", "cross", "none"])
@pytest.mark.parametrize("hidden_only", [False, True])
def test_every_parameter_and_the_encoder_get_a_gradient(kind: str, hidden_only: bool) -> None:
    layout = TokenLayout(False, 0, HIDDEN) if hidden_only else ALL
    if kind == "none":
        layout = TokenLayout(True, KEEP, 0)
    decoder = make_decoder(layout, type=kind, depth=2)
    tokens = make_tokens().requires_grad_()
    output = decoder(tokens, make_choice())
    (output * torch.randn_like(output)).sum().backward()
    assert tokens.grad is not None and tokens.grad[:, 1:].abs().sum() > 0
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_gradient_reaches_the_encoder_through_keys_and_values_alone() -> None:
    """The prompting context is not detached."""
    decoder, tokens = make_decoder(depth=2), make_tokens().requires_grad_()
    decoder(tokens, make_choice())[:, 1 + KEEP :].square().sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind", ["prompt", "full", "cross", "none"])
def test_thrown_patches_take_no_part(kind: str) -> None:
    layout = TokenLayout(True, KEEP, 0 if kind == "none" else HIDDEN)
    decoder, tokens, choice = make_decoder(layout, type=kind), make_tokens(), make_choice()
    other = choice._replace(ids_thrown=choice.ids_thrown.flip(1) * 0)
    assert torch.equal(decoder(tokens, choice), decoder(tokens, other))


@pytest.mark.parametrize("kind", ["prompt", "full", "cross"])
def test_recomputed_blocks_give_the_same_gradients(kind: str) -> None:
    gradients = []
    for recompute in (False, True):
        decoder, tokens = make_decoder(type=kind, depth=2), make_tokens()
        decoder.grad_checkpointing = recompute
        decoder(tokens, make_choice()).square().sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["prompt", "full", "cross"])
def test_bf16_stays_bf16(kind: str) -> None:
    decoder = make_decoder(type=kind).to(torch.bfloat16)
    decoder.positions = sincos_positions(WIDTH, GRID)  # backends cast parameters, not buffers
    output = decoder(make_tokens().to(torch.bfloat16), make_choice())
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_positions_are_no_state() -> None:
    assert not [key for key in make_decoder().state_dict() if "position" in key]


def test_initialise_sets_every_weight_of_a_decoder() -> None:
    for kind in ("prompt", "full", "cross", "none"):
        decoder = make_decoder(TokenLayout(True, KEEP, 0) if kind == "none" else ALL, type=kind)
        for parameter in decoder.parameters():
            parameter.data.fill_(float("nan"))
        initialise(decoder, 0)
        assert all(p.isfinite().all() for p in decoder.parameters())
    decoder = make_decoder(type="cross")
    initialise(decoder, 0)
    assert float(decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.5)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'linear' is not one of"):
        make_decoder(type="linear")


def test_heads_predict_what_is_asked_for() -> None:
    x = torch.randn(2, 7, WIDTH)
    for has_cls, tokens in ((True, 6), (False, 7)):
        found = Heads(WIDTH, {"teacher": 5, "pixel": 12}, has_cls)(x)
        assert {name: one.shape for name, one in found.items()} == {
            "teacher": (2, 7, 5),
            "pixel": (2, tokens, 12),
        }
