"""Corpus to subset: entropy, embedding, scenes, clusters, allocation, every method."""
