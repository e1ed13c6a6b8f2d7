"""The reference rows of tables, and what each is; apart from what measures them, which takes seconds to import."""

from __future__ import annotations

#: Description of each row, in the order of the tables.
REFERENCE_ROWS = {
    "real_held_out": "a second, disjoint set of as many held-out images: what a perfect generator reaches",
    "real_train": "as many real training images, unpruned",
    "reconstructed_train": "these training images through the autoencoder: what a perfect latent model reaches",
    "pca": "these training images through as many principal components as the latents have channels",
}
