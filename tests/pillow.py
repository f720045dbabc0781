"""Load the plug-ins of Pillow once, in the forkserver, and not in each of its children."""

from PIL import Image

Image.init()
