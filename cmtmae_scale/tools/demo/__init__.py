"""The demo: real photographs and a real teacher from the package index, then a short training."""
