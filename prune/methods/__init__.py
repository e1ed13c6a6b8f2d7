"""Pruning methods: each has one module and one YAML file."""
