"""Report of runs as one HTML page, from the files of their folders."""
