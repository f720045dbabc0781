"""Look through a data set before a run, and pack it."""
