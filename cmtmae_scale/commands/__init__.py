"""One module per command: parse the line and check the config, then import and run."""
