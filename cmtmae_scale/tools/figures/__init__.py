"""Pictures of what a run does, for a fixed set of images, while it goes on."""
