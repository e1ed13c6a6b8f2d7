"""Training of foundation models on a subset: autoencoder, text encoder, latent diffusion."""
