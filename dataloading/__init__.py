"""Views of a set of images, addressed by their position in an endless stream."""
