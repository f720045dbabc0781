"""The Python interface: pre-train, and use what a run has learned; see docs/python_api.md."""
