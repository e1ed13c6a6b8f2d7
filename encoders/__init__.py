"""Frozen networks that turn images or text into features: one file and one YAML each."""
