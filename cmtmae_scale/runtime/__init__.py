"""Facilities of a running process: ranks, collectives, storage, locks, logging."""
