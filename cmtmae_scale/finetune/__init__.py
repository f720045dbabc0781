"""Fine-tuning an encoder with labels, and what accuracy comes of it."""
