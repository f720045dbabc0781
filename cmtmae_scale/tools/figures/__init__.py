"""Figures of attention, masks and features during a run, for a fixed set of images."""
