"""Backends that run the same step: FSDP2, DeepSpeed ZeRO, and plain for one process."""
