"""A teacher of one's own, as docs/teachers.md describes: weights of its factory are random."""

from functools import cache

import torch
from torch import Tensor, nn


class OwnTeacher(nn.Module):
    """One block of attention over patches and a class token."""

    patch_size = 16
    embed_dim = 24
    num_prefix_tokens = 1
    has_class_token = True
    attention_source = "cls"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 16, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, 24))
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens ``[B, 1 + N, 24]``, query ``[B, 2, 1, 12]``, key ``[B, 2, 1 + N, 12]``."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        query, key, value = (
            layer(x).unflatten(-1, (2, 12)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + mixed.transpose(1, 2).flatten(2), query[:, :, :1], key


class FeaturesOnly(nn.Module):
    """Patches without attention, without prefix."""

    patch_size, embed_dim, mean, std = 16, 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)


class WrongShape(FeaturesOnly):
    embed_dim = 32


class ReadsValues(FeaturesOnly):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float(images.mean())


class FlatQuery(OwnTeacher):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, query, key = super().forward(images)
        return tokens, query.flatten(1), key


class AllQueries(OwnTeacher):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, _, key = super().forward(images)
        return tokens, key, key


class AllQueriesOfPatches(AllQueries):
    attention_source = "mean_query"


class WrongSource(FeaturesOnly):
    attention_source = "mean_query"


def fails() -> nn.Module:
    raise OSError("no weights")


def no_module() -> int:
    return 3


@cache
def kept() -> nn.Module:
    return FeaturesOnly()


def make_own_teacher() -> nn.Module:
    return OwnTeacher()
