"""A subset as the training loop reads it: memory-mapped latents, hidden states and metadata; no decoding of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from corpus.index import Corpus
from runtime.errors import UserError
from train.captions import Captions, caption_mask
from train.components import TextParts
from train.latents import Views, cached_latents
from train.loop import Batch, ComputeLoss, DrawBatch, Modules
from train.metadata import FOLDER, MetadataField, drop, metadata_values
from train.networks import diffusion_loss
from train.objective import Objective
from train.text_encoder import cached_prompts

NETWORK = "network"


@dataclass(frozen=True)
class Subset:
    """Encoded images of a corpus.

    Attributes:
        latents: [V, K, C or 2 C, h, w], every view of every image; mean and deviation (2 C) for a variational
            autoencoder.
        latent_shape: (C, h, w).
        captions: captions of the K images.
        prompts: [T, L, D], hidden states of the captions' texts.
        lengths: int64 [T], number of tokens of the texts.
        metadata: float32 [K, F], NaN where an image lacks a field.
        fractions: float64 [K], probability of drawing each image, sum 1; None: all equal.
    """

    latents: np.ndarray
    latent_shape: tuple[int, int, int]
    captions: Captions
    prompts: np.ndarray
    lengths: np.ndarray
    metadata: np.ndarray
    fractions: np.ndarray | None = None


def encode_subset(
    corpus: Corpus,
    rows: np.ndarray,
    autoencoder: nn.Module,
    autoencoder_key: str,
    text: TextParts,
    runs: Path | str,
    *,
    views: Views,
    fields: Mapping[str, MetadataField],
    seed: int,
    half: bool,
    fractions: np.ndarray | None = None,
) -> Subset:
    """Encode latents and captions of rows of a corpus; cached.

    Args:
        half: store float16.
        fractions: as in `Subset`.
    """
    latents = cached_latents(autoencoder, autoencoder_key, corpus, rows, runs, views=views, seed=seed, half=half)
    kept = corpus.manifest.iloc[rows]
    captions = Captions.of(kept)
    prompts, lengths = cached_prompts(
        text.text_encoder, text.tokenizer, text.fingerprint, captions.texts, runs, half=half
    )
    shape = (autoencoder.config.latent_channels, *latents.shape[3:])
    return Subset(latents, shape, captions, prompts, lengths, metadata_values(kept, fields), fractions)


def sampling_fractions(weights: np.ndarray, weighting: float) -> np.ndarray | None:
    """Probability of drawing each kept image, proportional to its weight to the power `weighting`; None if all are
    equal.

    Args:
        weights: float [K], number of images of the corpus that each kept image represents, at least 1.
        weighting: 0 (uniform: the selection's own distribution) to 1 (natural: the corpus's).
    Raises:
        UserError: `weighting` is outside [0, 1].
    """
    if not 0 <= weighting <= 1:
        raise UserError(
            f"train.weighting={weighting}: give a number from 0 (uniform) to 1 (in proportion to the weights)"
        )
    if weighting == 0:
        return None
    powers = np.asarray(weights, dtype=np.float64) ** weighting
    return powers / powers.sum()


def subset_batches(
    subset: Subset, objective: Objective, size: int, *, hide_padding: bool = False, metadata_dropout: float = 0.0
) -> DrawBatch:
    """Batches of `size` images for `train_loop`: latents, hidden states, their mask, metadata, noise, times.

    Args:
        hide_padding: mask the padding of captions, as PixArt's pipeline does.
        metadata_dropout: probability that each metadata value is dropped.
    """
    width = subset.prompts.shape[1]
    varies = subset.latents.shape[2] > subset.latent_shape[0]
    steps = None if subset.fractions is None else np.cumsum(subset.fractions)

    def draw(random: np.random.Generator, part: slice) -> Batch:
        if steps is None:
            picked = random.integers(subset.latents.shape[1], size=size)
        else:
            picked = np.searchsorted(steps, random.random(size) * steps[-1], side="right")
        view = random.integers(len(subset.latents), size=size)
        noise, times, dropped = objective.draw(random, (size, *subset.latent_shape))
        caption = subset.captions.pick(picked, random)
        caption[dropped.numpy()] = subset.captions.empty
        latents = torch.from_numpy(subset.latents[view[part], picked[part]]).float()
        if varies:  # drawn again for every batch
            mean, deviation = latents.chunk(2, dim=1)
            eps = random.standard_normal((size, *subset.latent_shape), dtype=np.float32)
            latents = mean + deviation * torch.from_numpy(eps[part])
        metadata = subset.metadata[picked]
        if metadata.shape[1]:
            metadata = drop(metadata, random, metadata_dropout)
        text = torch.from_numpy(subset.prompts[caption[part]]).float()
        lengths = subset.lengths[caption[part]] if hide_padding else np.full(len(text), width)
        mask = caption_mask(lengths, width)
        return latents, text, mask, torch.from_numpy(metadata[part]), noise[part], times[part]

    return draw


def subset_loss(objective: Objective, *, hide_padding: bool = False) -> ComputeLoss:
    """The loss of such a batch, for the module `network` and the metadata encoder, if there is one."""

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        latents, text, mask, values, noise, time = batch
        masked = hide_padding or FOLDER in modules
        if FOLDER in modules:
            tokens, known = modules[FOLDER](values)
            text, mask = torch.cat([text, tokens.to(text.dtype)], dim=1), torch.cat([mask, known], dim=1)
        return diffusion_loss(modules[NETWORK], objective, latents, text, noise, time, mask=mask if masked else None)

    return loss
