"""Ways to run the same step: plain (one process) and FSDP2."""
