"""Frozen networks that turn images or text into features; each has one module and one YAML file."""
