"""Evaluation: metrics of images and pipelines, and numbers about convergence."""
