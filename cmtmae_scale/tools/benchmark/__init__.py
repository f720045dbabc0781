"""How fast, on what, and next to what: measured side by side in one process."""
