"""Weights of a run in the formats of other libraries, each proven before it is published."""
