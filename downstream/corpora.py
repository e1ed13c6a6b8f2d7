"""The images for training and measuring of tasks; the same for all pruning methods."""

from __future__ import annotations

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus, index_corpus
from eval.held_out import HeldOut
from eval.measuring import evaluation_sets
from train.latents import scene_balanced_weights


def corpus_of(cfg: DictConfig, split: str) -> Corpus:
    """A complete split of the configured corpus: train, val or test."""
    return index_corpus(instantiate(cfg.corpus[split]), cfg.runs)


def training_rows(corpus: Corpus, size: int, seed: int) -> np.ndarray:
    """Up to `size` different readable rows, with the same chance for every scene; int64, ascending."""
    weights = scene_balanced_weights(corpus)
    size = min(size, np.count_nonzero(weights))
    return np.sort(np.random.default_rng([seed, 10]).choice(len(corpus), size, replace=False, p=weights))


def held_out_images(cfg: DictConfig) -> HeldOut:
    """The first `downstream.images` of the balanced held-out set."""
    return evaluation_sets(cfg)["balanced"].first(int(cfg.downstream.images))
