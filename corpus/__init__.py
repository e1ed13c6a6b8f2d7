"""Reading of images: sources, decoding, tiling, captions, splits, and the record of unreadable images with reasons."""
