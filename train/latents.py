"""Images and latents: array conversions, autoencoder calls, the cache of latents, and PCA of patches as a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from corpus.index import Corpus
from encoders.pixels import to_tensor
from eval.processes import first_process_decides, from_first_process, gathered, place_in_launch
from runtime.artefacts import read_json, stage, write_json
from runtime.errors import UserError
from runtime.progress import progress

PATCH = 8
ENCODE_BATCH = 128
#: Number of batches between two records of progress.
NOTE_EVERY = 20
LATENTS = "latents.npy"


@dataclass(frozen=True)
class PatchPCA:
    """Principal components of non-overlapping 8 x 8 x 3 patches, the baseline of an autoencoder.

    Attributes:
        mean: float32 [192].
        basis: float32 [192, C], orthonormal.
        scale: root-mean-square of all components together.
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
        basis = basis * basis.sum(0).sign()  # fixes the sign, which depends on the LAPACK
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
    """Latents of unit scale of images [N, 3, H, W] in [-1, 1]; supports tiny, KL and DC autoencoders."""
    output = autoencoder.encode(images)
    raw = output.latents if hasattr(output, "latents") else output.latent_dist.sample(generator)
    return raw * autoencoder.config.scaling_factor


def encode_moments(autoencoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Latents of unit scale [N, C, h, w]; for a variational autoencoder mean and standard deviation, [N, 2 C, h, w]."""
    output = autoencoder.encode(images)
    if hasattr(output, "latents"):
        return output.latents * autoencoder.config.scaling_factor
    distribution = output.latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1) * autoencoder.config.scaling_factor


def decode(autoencoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] from latents of unit scale."""
    return autoencoder.decode(latents / autoencoder.config.scaling_factor).sample


def scene_balanced_weights(corpus: Corpus) -> np.ndarray:
    """Sampling weights float64 [N] with an equal sum for every scene; 0 for unreadable images."""
    codes, _ = corpus.manifest["scene"].factorize()
    weights = corpus.readable / np.bincount(codes)[codes]
    return weights / weights.sum()


def flip(images: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Apply a random one of the eight symmetries of the square to a whole batch."""
    if generator.random() < 0.5:
        images = images.flip(3)
    return torch.rot90(images, int(generator.integers(4)), (2, 3))


def fit_pca(corpus: Corpus, components: int, seed: int, images: int = 4000) -> PatchPCA:
    """PCA of scene-balanced training tiles: the autoencoder's initialisation and baseline."""
    generator = np.random.default_rng([seed, len(corpus)])
    sample = generator.choice(len(corpus), images, p=scene_balanced_weights(corpus))
    return PatchPCA.fit(to_tensor(corpus.images[np.sort(sample)]), components)


def symmetric(images: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Apply one of the eight symmetries of the square: 0 none, 1 mirrored, 2-3 turned by 180 degrees, 4-7 by 90."""
    images = images.flip(3) if symmetry % 2 else images
    return torch.rot90(images, (0, 2, 1, 3)[symmetry // 2], (2, 3))


@dataclass(frozen=True)
class Views:
    """The views of each image that are encoded.

    Args:
        symmetries: number of symmetries of the square to use, 1 to 8, in the order of `symmetric`.
        crops: number of random square crops per image and symmetry, if `crop` is given.
        crop: side of the crops in pixels; None: the whole image.
    """

    symmetries: int = 1
    crops: int = 1
    crop: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.symmetries <= 8 or self.crops < 1 or (self.crop is not None and self.crop < 1):
            raise UserError(
                f"train.views: symmetries={self.symmetries}, crops={self.crops}, crop={self.crop}: give 1 to 8 "
                "symmetries, at least one crop, and a crop of at least 1 px or null"
            )

    def __len__(self) -> int:
        return self.symmetries * (self.crops if self.crop else 1)

    def side(self, resolution: int) -> int:
        """Side of the encoded views in pixels.

        Raises:
            UserError: the crop is larger than the images.
        """
        if self.crop and self.crop > resolution:
            raise UserError(
                f"train.views.crop={self.crop} is larger than the corpus images of {resolution} px: "
                "lower it or raise corpus.train.resolution"
            )
        return self.crop or resolution

    def take(self, images: torch.Tensor, rows: np.ndarray, view: int, seed: int) -> torch.Tensor:
        """One view of images [B, 3, R, R]; the crop of an image depends only on its row and the view."""
        if self.crop:
            room = images.shape[-1] - self.crop + 1
            corners = [np.random.default_rng([seed, 20, int(row), view]).integers(room, size=2) for row in rows]
            squares = [
                image[:, y : y + self.crop, x : x + self.crop] for image, (y, x) in zip(images, corners, strict=True)
            ]
            images = torch.stack(squares)
        return symmetric(images, view % self.symmetries)


def cached_latents(
    autoencoder: nn.Module,
    key: str,
    corpus: Corpus,
    rows: np.ndarray,
    runs: Path | str,
    *,
    views: Views | None = None,
    seed: int = 0,
    half: bool = False,
) -> np.ndarray:
    """Latents of rows of a corpus, encoded once, [V, K, C or 2 C, h, w], memory-mapped (see `encode_moments`).

    In a launch every process must call it: the processes divide the batches among them (see `_encode_jobs`).

    Args:
        key: fingerprint of the autoencoder.
        views: the views to encode; None: only the unchanged image.
        half: store float16 instead of float32.
    """
    views = views or Views()
    device = next(autoencoder.parameters()).device
    dtype = np.float16 if half else np.float32
    views.side(corpus.resolution)

    @torch.no_grad()
    def encoded(view: int, start: int) -> np.ndarray:
        part = rows[start : start + ENCODE_BATCH]
        images = views.take(to_tensor(corpus.images[part]), part, view, seed)
        return encode_moments(autoencoder, images.to(device)).float().cpu().numpy().astype(dtype)

    def build(directory: Path) -> None:
        jobs = [(view, start) for view in range(len(views)) for start in range(0, len(rows), ENCODE_BATCH)]
        _encode_jobs(directory, jobs, encoded, (len(views), len(rows)), dtype)

    inputs = {
        "corpus": corpus.fingerprint,
        "rows": np.asarray(rows).tolist(),
        "autoencoder": key,
        "views": views,
        "half": half,
        **({"seed": seed} if views.crop else {}),
    }
    directory = stage(runs, "latents", inputs, build, resumable=True, together=first_process_decides)
    return np.load(directory / LATENTS, mmap_mode="r")


def _encode_jobs(
    directory: Path,
    jobs: Sequence[tuple[int, int]],
    encoded: Callable[[int, int], np.ndarray],
    shape: tuple[int, int],
    dtype: type,
) -> None:
    """Fill latents.npy in rounds of one batch per process of the launch; the last round may have fewer batches.

    Only whole batches are distributed, so that any number of processes computes the same products and writes the same
    bytes. The first process writes all results: if several machines write to one file, NFS may lose some of their
    pages.

    Args:
        jobs: (view, first row) of every batch; an earlier try, with other processes, may have finished the first ones.
        encoded: returns the latents [B, C, h, w] of a batch.
        shape: (V, K).
    """
    state, (own, processes) = directory / "progress.json", place_in_launch()
    (done,) = from_first_process([read_json(state)["done"] if state.exists() else 0])
    array, inner = (np.lib.format.open_memmap(directory / LATENTS, mode="r+") if done and own == 0 else None), None
    noted, total = done, -(-len(jobs) // processes)
    rounds = range(done, len(jobs), processes)
    bar = {"total": total, "initial": total - len(rounds), "unit": "batch", "unit_scale": processes}
    for first in progress(rounds, "encode latents", **bar):
        dealt = jobs[first : first + processes]
        latents = encoded(*dealt[own]) if own < len(dealt) else np.empty((0, 0, 0, 0), dtype)
        inner = inner or tuple(from_first_process(latents.shape[1:]))  # processes without a batch lack the shape
        whole = np.zeros((ENCODE_BATCH, *inner), dtype)
        whole[: len(latents)] = latents.reshape(-1, *inner)
        parts = gathered(whole)
        if own > 0:
            continue
        if array is None:
            array = np.lib.format.open_memmap(directory / LATENTS, mode="w+", dtype=dtype, shape=(*shape, *inner))
        for (view, start), part in zip(dealt, parts, strict=False):
            array[view, start : start + ENCODE_BATCH] = part[: shape[1] - start]
        done = first + len(dealt)
        if done - noted >= NOTE_EVERY or done == len(jobs):
            array.flush()
            write_json(state, {"done": done})
            noted = done
