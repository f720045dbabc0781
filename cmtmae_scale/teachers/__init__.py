"""Frozen teachers: one module a library, one interface for the trainer."""
