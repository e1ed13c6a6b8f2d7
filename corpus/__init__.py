"""Images in: sources, decoding, tiling, captions, splits, and what was unreadable and why."""
