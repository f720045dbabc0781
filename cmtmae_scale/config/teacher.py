"""Settings of the frozen teacher, and of what is kept of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Teacher:
    """The frozen teacher."""

    library: Literal["open_clip", "timm"] = "open_clip"
    """Library that builds it."""
    model: str | None = None
    """Model name, or for open_clip the path of a model's JSON description."""
    weights: str | None = None
    """Pretrained tag, path of a .safetensors or .pt file, or ``random`` (tests)."""
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU; must be given for open_clip."""
    image_size: int | None = None
    """Side of the teacher's picture, pixels; ``None``: auto, so that its grid is the student's."""
    depth: int | None = None
    """Keep only the first blocks; ``None``: all."""
    feature: Literal["proj", "ln_post", "block"] = "proj"
    """Token features: projected, after the last norm, or a block's output before it."""
    mode: Literal["online", "cached", "sidecar", "none"] = "online"
    """live: run beside the student; cache: read its maps and features from ``cache.dir``; follow:
    read what ``precompute_teacher.py --follow RUN_DIR`` computes ahead of the run, and run beside
    the student where nothing is there; none: no teacher at all (MAE)."""


@dataclass
class Cache:
    """The teacher's maps and features, computed by ``launchers/precompute_teacher.py``."""

    dir: str | None = None
    """Folder of the cache; with ``teacher.mode=sidecar`` the run's own, ``RUN_DIR/cache``, unless
    one is given; with ``teacher.mode=cached`` it must be, and ``views.views_per_image`` too."""
    codec: Literal["int8", "bf16", "attention"] = "int8"
    """How features are stored when it is built: int8 over standardised channels, bf16, or not at
    all (maps only)."""
    on_miss: Literal["stop", "online"] = "online"
    """What a missing or damaged row does: stop the run, or let the teacher run for its micro-batch.
    With stop and no spot check no teacher is built, and its weights need not be at hand."""
    spot_check: float = 0.0
    """Share of micro-batches in which the teacher runs too and must agree, in [0, 1]."""
