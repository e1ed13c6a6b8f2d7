"""Models that score pairs: CLIP-like networks of the hub, and linear CLIPs that are fitted to the corpus itself.

A scorer converts images and captions into unit vectors of one space. A scorer that learns from the corpus uses folds:
the pairs of the images of a fold are embedded by a model that was fitted to the other folds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from captioning.dual_encoder import CHUNK, DualEncoder, FittedEncoder, Reduction, fit_dual_encoder
from captioning.pairs import Pairs
from corpus.index import Corpus, Scan, over_images
from encoders.clip_scores import ClipScorer, load_clip
from encoders.embedding import device
from encoders.pixels import LOAD_ERRORS
from eval.processes import over_processes
from runtime.artefacts import fingerprint
from runtime.engine import Step, engine
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress

#: Number of texts that are embedded at once.
TEXTS = 1024
#: Number of images that a network embeds together.
IMAGES = 256


@dataclass(frozen=True)
class Material:
    """The data that scorers may use.

    Attributes:
        corpus: the images.
        features: float [N, F], features of a frozen image encoder, usually a memory map.
        features_key: fingerprint of the encoder.
        scene: int64 [N], scene of every image; images without a scene form a separate scene.
        scenes: names of the scenes.
        labelled: whether the scenes are labels of the corpus, not found from the features.
        fold: int64 [N], fold of every image.
    """

    corpus: Corpus
    features: np.ndarray
    features_key: str
    scene: np.ndarray
    scenes: tuple[str, ...]
    labelled: bool
    fold: np.ndarray

    @property
    def key(self) -> str:
        """A key that changes with the images, their features and their scenes."""
        return fingerprint(
            corpus=self.corpus.fingerprint, features=self.features_key, scenes=self.scenes,
            scene=fingerprint(of=self.scene.tolist()), fold=fingerprint(of=self.fold.tolist()),
        )  # fmt: skip


class PairScorer(Protocol):
    """Interface of scorers: a frozen dataclass that Hydra makes from configs/scorer.

    Attributes:
        name: name of its column in captions.parquet.
        joint: whether all processes of a launch take part.
    """

    name: str
    joint: bool

    @property
    def key(self) -> str:
        """Fingerprint of its weights; "" if it learns from the corpus."""

    def embed(self, material: Material, given: Pairs, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of all images, float [N, D] (zeros if unreadable), and of the captions of `pairs`, [P, D].

        Args:
            material: the images and their features.
            given: the pairs that the scorer may learn from.
            pairs: the pairs to embed.
        """


@dataclass(frozen=True)
class FittedScorer:
    """A linear CLIP on the features that pruning clusters with, fitted fold by fold to the pairs of the corpus.

    Args:
        options: options of the fit.
        name: name of its column.
        seed: seed of the fit.
    """

    joint = False

    options: DualEncoder
    name: str = "fitted"
    seed: int = 0

    @property
    def key(self) -> str:
        return ""

    def embed(self, material: Material, given: Pairs, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        options = self.options
        generator = np.random.default_rng([self.seed, 600])
        learned = np.sort(generator.permutation(len(given))[: options.most_pairs])
        rows = given.image[learned]
        reduction = Reduction.of(options, material.features[np.unique(rows)], given.text[learned].tolist(), generator)
        known = _with_scene(reduction, material, options, rows)
        words = reduction.texts(given.text[learned].tolist())
        weights = 1 / np.bincount(given.image, minlength=len(material.corpus))[rows]
        if not words.any():
            notice(f"no word occurs in two captions: captioning.scorers.{self.name} cannot distinguish pairs")
        folds = [np.flatnonzero(material.fold == fold) for fold in range(int(material.fold.max()) + 1)]
        encoders = []
        for fold in progress(range(len(folds)), f"fit {self.name}", unit="fold"):
            others = np.flatnonzero(material.fold[rows] != fold)
            if len(others) < 2:
                raise UserError(
                    f"{len(given)} captions are too few to fit captioning.scorers.{self.name} in "
                    f"{options.folds} folds: give more images with captions, or score with a network from the hub "
                    "(scorer@captioning.scorers.fitted=openai_clip)"
                )
            encoders.append(fit_dual_encoder(options, known[others], words[others], weights[others]))
        return self._images(material, reduction, encoders, folds), self._texts(material, reduction, encoders, pairs)

    def _images(
        self, material: Material, reduction: Reduction, encoders: Sequence[FittedEncoder], folds: Sequence[np.ndarray]
    ) -> np.ndarray:
        result = np.zeros((len(material.corpus), encoders[0].image_map.shape[1]), np.float32)
        for encoder, rows in zip(encoders, folds, strict=True):
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                result[part] = encoder.images(_with_scene(reduction, material, self.options, part))
        result[~material.corpus.readable] = 0
        return result

    def _texts(
        self, material: Material, reduction: Reduction, encoders: Sequence[FittedEncoder], pairs: Pairs
    ) -> np.ndarray:
        result = np.zeros((len(pairs), encoders[0].text_map.shape[1]), np.float32)
        fold = material.fold[pairs.image]
        for start in range(0, len(pairs), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(pairs)))
            reduced = reduction.texts(pairs.text[rows].tolist())
            for number, encoder in enumerate(encoders):
                own = fold[rows] == number
                result[rows[own]] = encoder.texts(reduced[own])
        return result


def _with_scene(reduction: Reduction, material: Material, options: DualEncoder, rows: np.ndarray) -> np.ndarray:
    """Reduced features float32 [n, R] of some images, followed by the code of their labelled scene."""
    reduced = reduction.images(material.features[rows])
    if not options.scene_scale or not material.labelled:
        return reduced
    length = options.scene_scale * np.sqrt(reduction.length)
    codes = np.zeros((len(rows), len(material.scenes)), np.float32)
    named = np.array([bool(name) for name in material.scenes])[material.scene[rows]]
    codes[np.flatnonzero(named), material.scene[rows][named]] = length
    return np.concatenate([reduced, codes], axis=1)


class NetworkScorer(ABC):
    """A pretrained CLIP from the hub or a file; a frozen dataclass with `name` and `path`."""

    joint = True

    name: str
    path: str

    @abstractmethod
    def load(self) -> ClipScorer:
        """Load the network.

        Raises:
            one of `encoders.pixels.LOAD_ERRORS`: the network cannot be loaded.
        """

    @property
    def key(self) -> str:
        return self.clip().fingerprint

    def clip(self) -> ClipScorer:
        """The network on this machine's accelerator, loaded once.

        Raises:
            UserError: the network cannot be loaded.
        """
        return _loaded(self)

    def embed(self, material: Material, given: Pairs, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        return embed_with_clip(self, material, pairs)


@dataclass(frozen=True)
class HubScorer(NetworkScorer):
    """A CLIP of `transformers` in a folder or on the hub.

    Args:
        name: name of its column.
        path: folder or hub name, with safetensors weights.
        revision: commit on the hub; None: the newest.
    """

    name: str
    path: str
    revision: str | None = None

    def load(self) -> ClipScorer:
        return load_clip(self.path, self.path, self.name, revision=self.revision)


@dataclass(frozen=True)
class OpenClipScorer(NetworkScorer):
    """A CLIP in the format of open_clip, in which RemoteCLIP and GeoRSCLIP are published.

    Args:
        name: name of its column.
        architecture: name of the architecture in open_clip, for example "ViT-B-32".
        path: the file of weights (.pt, .pth or .safetensors), or its name in `repository`.
        repository: hub name; None: `path` is a local file.
        revision: commit on the hub; None: the newest.
    """

    name: str
    architecture: str
    path: str
    repository: str | None = None
    revision: str | None = None

    def load(self) -> ClipScorer:
        from captioning.open_clip_networks import load_open_clip

        return load_open_clip(
            self.name, self.architecture, self.path, repository=self.repository, revision=self.revision
        )


@lru_cache(maxsize=4)
def _loaded(scorer: NetworkScorer) -> ClipScorer:
    try:
        result = scorer.load()
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no CLIP for captioning.scorers.{scorer.name} at {scorer.path} ({reason}): give a file, a folder or a hub "
            "name that can be reached, or leave it out and use the scorers that are fitted to the corpus"
        ) from error
    result.model.to(device())
    return result


def embed_with_clip(scorer: NetworkScorer, material: Material, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """`PairScorer.embed` over all processes of a launch, or by the engine's workers.

    The captions with more tokens than the network reads are counted.
    """
    corpus, clip = material.corpus, scorer.clip()
    width = clip.text_embeddings(["a"]).shape[1]
    distinct, position = np.unique(
        pairs.text, return_inverse=True
    )  # an object array: one long text does not widen the others
    cut = clip.cut(distinct.tolist()) if len(distinct) else 0
    if cut:
        notice(f"{cut} of {len(distinct)} different captions are longer than {clip.name} reads, and are truncated")
    scan = Scan("", partial(_image_embeddings, scorer), IMAGES, np.float16, (width,))

    def images(rows: np.ndarray) -> np.ndarray:
        result = np.zeros((len(rows), width), np.float16)
        groups = [rows[start : start + IMAGES] for start in range(0, len(rows), IMAGES)]
        parts = over_images(corpus, groups, scan)
        for at, part in enumerate(progress(parts, f"{clip.name}: images", total=len(groups), unit="batch")):
            result[at * IMAGES : (at + 1) * IMAGES] = part.value[1]
        result[~corpus.readable[rows]] = 0
        return result

    def texts(rows: np.ndarray) -> np.ndarray:
        groups = [distinct[rows[start : start + TEXTS]].tolist() for start in range(0, len(rows), TEXTS)]
        parts = engine().run([Step(partial(_text_embeddings, scorer), network=True)], groups, workers=0)
        bar = progress(parts, f"{clip.name}: captions", total=len(groups), unit="batch")
        return np.concatenate([np.zeros((0, width), np.float16), *(part.value for part in bar)])

    return over_processes(images, len(corpus)), over_processes(texts, len(distinct))[position]


def _image_embeddings(scorer: NetworkScorer, images: np.ndarray) -> np.ndarray:
    return scorer.clip().image_embeddings(images).cpu().numpy()


def _text_embeddings(scorer: NetworkScorer, texts: list[str]) -> np.ndarray:
    return scorer.clip().text_embeddings(texts).cpu().numpy().astype(np.float16)
