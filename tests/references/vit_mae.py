"""Transformers' ViTMAE with random weights everywhere, as another program's MAE."""

from typing import Any

import pytest
import torch

from tests.references.decoders import sincos_table


def build(
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    image: int,
    patch: int,
    decoder: tuple[int, int, int],
    **options: Any,
) -> Any:
    """``decoder``: width, depth, heads. Tables are written here: some versions leave zeros."""
    pytest.importorskip("transformers", reason="the extra dev installs transformers")
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(3)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            image_size=image,
            patch_size=patch,
            layer_norm_eps=1e-6,
            decoder_hidden_size=decoder[0],
            decoder_num_hidden_layers=decoder[1],
            decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[0],
            **options,
        )
    )
    grid = (image // patch, image // patch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.zero_()
            table[0, 1:] = sincos_table(table.shape[2], grid).float()
    return model
