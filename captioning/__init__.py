"""Cleaning of image-text pairs: captions are written for images, scored, and kept or replaced."""
