"""Distributed CMT-MAE pre-training: collaborative masking and collaborative targets."""

__version__ = "0.1.0"
