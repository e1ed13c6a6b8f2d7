"""A named text-to-image system beside ours: what it must offer, and its images in the form that measuring takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpus.captions import words
from corpus.decoding import square
from eval.generate import generate
from runtime.artefacts import file_digest, fingerprint

#: Suffixes of images that another system's own code has drawn.
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
#: Files of a peer's folder that can change what is measured.
COUNTED = (".safetensors", ".json", ".txt", *IMAGES)


@dataclass(frozen=True)
class Peer(ABC):
    """A system and how its authors draw with it.

    A subclass has `check` and `load`, and `extra` where the system is given more of an image than its caption.

    Args:
        name: in messages and in the row.
        resolution: side in px of what it draws.
        steps: solver steps.
        guidance_scale: of classifier-free guidance; 1 switches it off.
        scheduler: class of diffusers; None: the one in its folder.
        template: the prompt, of `{caption}` and `{scene}`.
        batch_size: images drawn at once.
    """

    name: str
    resolution: int
    steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    template: str = "{caption}"
    batch_size: int = field(default=8, metadata={"fingerprint": False})

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Look at what is there before anything is computed.

        Raises:
            UserError: the folder holds no such system, or holds it as a pickle.
        """

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """What `draw` draws with, of a folder that `check` let pass.

        Raises:
            UserError: a file is broken.
        """

    def prompt(self, caption: str, row: Mapping[str, Any]) -> str:
        """What the system is requested.

        Args:
            row: of the manifest.
        """
        return self.template.format(caption=caption, scene=words(str(row.get("scene") or "")))

    def extra(self, row: Mapping[str, Any], side: int) -> dict[str, Any]:
        """Further arguments of the pipeline for one image.

        Args:
            row: of the manifest.
            side: of the corpus's images in px, which the row's `ground_sampling_distance` is of.
        """
        return {}

    def draw(
        self, loaded: Any, captions: Sequence[str], rows: pd.DataFrame, numbers: np.ndarray, side: int, **sampling: Any
    ) -> np.ndarray:
        """Images of some captions, uint8 [K, R, R, 3]. Image i starts from noise that depends on the seed and i alone.

        Args:
            captions: of the whole held-out set.
            rows: of the manifest, one a caption.
            numbers: int64 [K], which captions.
            side: of the corpus's images in px.
            sampling: steps, guidance_scale, seed and label of `generate`.
        """
        if not len(numbers):
            return np.empty((0, self.resolution, self.resolution, 3), np.uint8)
        chosen = rows.iloc[numbers].to_dict("records")
        extras = [self.extra(row, side) for row in chosen]
        return generate(
            loaded,
            [self.prompt(captions[number], row) for number, row in zip(numbers, chosen, strict=True)],
            batch_size=self.batch_size,
            noise_of=numbers,
            size=self.resolution,
            **sampling,
            **{name: [extra[name] for extra in extras] for name in extras[0]},
        )


@dataclass(frozen=True)
class PeerModel:
    """A peer with its weights; `eval.measuring` draws from it as from a `eval.models.Model`.

    Attributes:
        peer: the system.
        folder: its weights, or its images.
        side: of the held-out images in px, to which its images are resized.
    """

    peer: Peer
    folder: Path
    side: int

    @cached_property
    def key(self) -> str:
        """16 hex digits of all files that can change an image."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.suffix.lower() in COUNTED)
        return fingerprint(files={path.relative_to(self.folder).as_posix(): file_digest(path) for path in files})

    def load(self) -> Any:
        """As the peer loads it."""
        return self.peer.load(self.folder)

    def conditions(self, captions: Sequence[str], rows: pd.DataFrame) -> dict[str, Any]:
        """What its images of these captions depend on beside the captions."""
        requested = [
            [self.peer.prompt(caption, row), self.peer.extra(row, self.side)]
            for caption, row in zip(captions, rows.to_dict("records"), strict=True)
        ]
        return {"peer": {"system": self.peer, "side": self.side, "requested": requested}}

    def draw(
        self, loaded: Any, captions: Sequence[str], rows: pd.DataFrame, numbers: np.ndarray, **sampling: Any
    ) -> np.ndarray:
        """As the peer draws them, resized as the corpus's images were: uint8 [K, side, side, 3]."""
        images = self.peer.draw(loaded, captions, rows, numbers, self.side, **sampling)
        resized = [square(image, self.side) for image in images]
        return np.stack(resized) if resized else np.empty((0, self.side, self.side, 3), np.uint8)

    @property
    def metadata(self) -> dict[str, Any]:
        """What its row says of how its images were made."""
        return {
            "peer": self.peer.name,
            "weights": self.key,
            "drawn_px": self.peer.resolution,
            "measured_px": self.side,
            "steps": self.peer.steps,
            "guidance_scale": self.peer.guidance_scale,
            "scheduler": self.peer.scheduler or "its own",
        }


def number(row: Mapping[str, Any], name: str) -> float:
    """A number of a row; NaN where it has none of this name."""
    value = pd.to_numeric(row.get(name), errors="coerce")
    return math.nan if pd.isna(value) or not np.isfinite(value) else float(value)


def metres(row: Mapping[str, Any], side: int, resolution: int) -> float:
    """Metres a pixel of an image of the same ground at another side; NaN where the row does not know them.

    Args:
        side: in px of the image that the row is of.
        resolution: of the image that is requested.
    """
    return number(row, "ground_sampling_distance") * side / resolution
