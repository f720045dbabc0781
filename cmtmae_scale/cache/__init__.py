"""Teacher cache: attention and features, computed once and read back."""
