"""Image-text pairs cleaned: captions written for images, scored, and kept or replaced."""
