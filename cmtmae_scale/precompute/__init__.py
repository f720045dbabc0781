"""The command that builds, checks, mends and plans a teacher's cache, or stays ahead of a run."""
