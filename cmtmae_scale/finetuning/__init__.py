"""The fine-tuning task."""
