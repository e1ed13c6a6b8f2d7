"""The reference rows of tables, and what each is; apart from what measures them, which takes seconds to import."""

from __future__ import annotations

#: Description of each row, in the order of the tables.
REFERENCE_ROWS = {
    "real_held_out": "a second, disjoint set of equally many held-out images: the score of a perfect generator",
    "real_train": "equally many real images from the unpruned training set",
    "reconstructed_train": "the same training images through the autoencoder: the score of a perfect latent model",
    "pca": "the same training images reconstructed from as many principal components as the latents have channels",
}
