"""Interim."""

from cmtmae_scale.config.schema import AdamWSettings, Trained

__all__ = ["AdamWSettings", "Trained"]
