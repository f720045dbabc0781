"""One checkpoint layout, whatever wrote it."""
