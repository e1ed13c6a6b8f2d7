"""Captioners: images and known metadata in, texts out. One file and one YAML each."""
