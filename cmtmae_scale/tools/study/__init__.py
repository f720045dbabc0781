"""Studies: tables of runs over methods, settings and seeds, with their results."""
