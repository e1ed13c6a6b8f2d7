"""Subset to foundation model: autoencoder, text encoder, latent diffusion."""
