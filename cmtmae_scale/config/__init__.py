"""Settings: documented dataclasses, strict loading, derived numbers."""
