"""One module per command: parse, check, then run."""
