"""Settings of the evaluation during a run."""

from dataclasses import dataclass


@dataclass
class Eval:
    """k-NN and a small linear probe of the encoder while the run goes on."""

    every: int | None = None
    """Steps between evaluations; ``None``: never."""
    train_path: str | None = None
    """Labelled images to learn from, as ``data.path``; also the default of
    ``launchers/evaluate.py --train``."""
    test_path: str | None = None
    """Labelled images to test on; also the default of ``launchers/evaluate.py --test``."""
