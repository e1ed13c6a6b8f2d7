"""Images and latents: array conversions, autoencoder calls, and PCA of patches as their yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from corpus.index import Corpus

PATCH = 8


@dataclass(frozen=True)
class PatchPCA:
    """Principal components of non-overlapping 8 x 8 x 3 patches, the yardstick of an autoencoder.

    Attributes:
        mean: float32 [192], basis: float32 [192, C] orthonormal, scale: root-mean-square of all components together.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: float

    @classmethod
    def fit(cls, images: torch.Tensor, components: int) -> PatchPCA:
        """Fit to float images [N, 3, H, W] in [-1, 1]."""
        patches = _patches(images).flatten(0, 2).double()
        mean = patches.mean(0)
        centred = patches - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        basis = vectors.flip(1)[:, :components]
        basis = basis * basis.sum(0).sign()  # one orientation, whatever the LAPACK
        scale = float((centred @ basis).square().mean().sqrt())
        return cls(mean.float(), basis.float(), scale)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] to components [N, C, H/8, W/8] of unit root-mean-square."""
        return ((_patches(images) - self.mean) @ self.basis / self.scale).permute(0, 3, 1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode` within the span of the components."""
        patches = latents.permute(0, 2, 3, 1) * self.scale @ self.basis.T + self.mean
        patches = patches.unflatten(3, (3, PATCH, PATCH))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _patches(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] to [N, H/8, W/8, 192], channel-major inside a patch."""
    blocks = images.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)


def encode(autoencoder: nn.Module, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Latents of unit scale from images [N, 3, H, W] in [-1, 1]; works for tiny, KL and DC autoencoders."""
    output = autoencoder.encode(images)
    raw = output.latents if hasattr(output, "latents") else output.latent_dist.sample(generator)
    return raw * autoencoder.config.scaling_factor


def decode(autoencoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] from latents of unit scale."""
    return autoencoder.decode(latents / autoencoder.config.scaling_factor).sample


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def peak_signal_noise_ratio(images: np.ndarray, references: np.ndarray) -> float:
    """PSNR in dB from the mean squared error over all uint8 images together."""
    error = np.mean((images.astype(np.float32) - references.astype(np.float32)) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / error))


def scene_balanced_weights(corpus: Corpus) -> np.ndarray:
    """Sampling weights float64 [N] that give every scene the same share; unreadable images get none."""
    codes, _ = corpus.manifest["scene"].factorize()
    weights = corpus.readable / np.bincount(codes)[codes]
    return weights / weights.sum()


def flip(images: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Mirror and turn a whole batch by one of the eight symmetries of the square."""
    if generator.random() < 0.5:
        images = images.flip(3)
    return torch.rot90(images, int(generator.integers(4)), (2, 3))


def fit_pca(corpus: Corpus, components: int, seed: int, images: int = 4000) -> PatchPCA:
    """PCA of scene-balanced training tiles: the autoencoder's start and the one it has to beat."""
    generator = np.random.default_rng([seed, len(corpus)])
    sample = generator.choice(len(corpus), images, p=scene_balanced_weights(corpus))
    return PatchPCA.fit(to_tensor(corpus.images[np.sort(sample)]), components)
