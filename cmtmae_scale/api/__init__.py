"""The Python interface: pre-train, and use the networks of a run; see docs/python_api.md."""
