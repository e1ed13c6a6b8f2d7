"""Captioners, which turn images and known metadata into texts; each has one module and one YAML file."""
