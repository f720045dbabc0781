"""First recipe for a folder of images."""
