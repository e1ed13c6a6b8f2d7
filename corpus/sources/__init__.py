"""Sources of images, one module per source."""
