"""What every config that trains something has, whatever it trains."""

from typing import Protocol

from cmtmae_scale.config.schema import Backend, Train


class AdamWSettings(Protocol):
    """What a config says of AdamW and the gradient."""

    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float | None


class Trained(Protocol):
    """Settings of pre-training or of fine-tuning."""

    @property
    def train(self) -> Train:
        """Length and batch."""
        ...

    @property
    def backend(self) -> Backend:
        """Sharding and precision."""
        ...

    @property
    def optimizer(self) -> AdamWSettings:
        """AdamW."""
        ...
