"""Captioners: images and known facts in, texts out. One file and one YAML each."""
