"""The teacher's maps and features, computed once and read back."""
