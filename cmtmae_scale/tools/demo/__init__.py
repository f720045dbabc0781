"""The demo: images from installed packages, a teacher from the package index, a short run."""
