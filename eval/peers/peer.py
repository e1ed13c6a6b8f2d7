"""Other text-to-image systems for comparison: their interface, and their images in the form that is measured."""

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

#: Suffixes of images that another system has drawn.
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
#: Suffixes of files in a peer's folder that can change the measured values.
COUNTED = (".safetensors", ".json", ".txt", *IMAGES)


@dataclass(frozen=True)
class Peer(ABC):
    """Another system, with the sampling settings of its authors.

    A subclass defines `check` and `load`, and `extra` if the system receives more than the caption of an image.

    Args:
        name: name of the system in messages and in the row of results.
        resolution: side of its images in pixels.
        steps: solver steps.
        guidance_scale: scale of classifier-free guidance; 1 switches it off.
        scheduler: name of a scheduler class of diffusers; None: the scheduler in its folder.
        template: template of the prompt, with `{caption}` and `{scene}`.
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
        """Check the files in a folder before anything is computed.

        Raises:
            UserError: the folder does not hold this system, or holds it as a pickle.
        """

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load the object that `draw` uses from a folder that passed `check`.

        Raises:
            UserError: a file is broken.
        """

    def prompt(self, caption: str, row: Mapping[str, Any]) -> str:
        """The prompt for a caption.

        Args:
            caption: the caption.
            row: row of the manifest.
        """
        return self.template.format(caption=caption, scene=words(str(row.get("scene") or "")))

    def extra(self, row: Mapping[str, Any], side: int) -> dict[str, Any]:
        """Further arguments of the pipeline for one image.

        Args:
            row: row of the manifest.
            side: side in pixels of the corpus's images, for which the row's `ground_sampling_distance` holds.
        """
        return {}

    def draw(
        self, loaded: Any, captions: Sequence[str], rows: pd.DataFrame, numbers: np.ndarray, side: int, **sampling: Any
    ) -> np.ndarray:
        """Images of some captions, uint8 [K, R, R, 3]; the noise of image i depends on the seed and on i only.

        Args:
            loaded: result of `load`.
            captions: captions of the whole held-out set.
            rows: rows of the manifest, one per caption.
            numbers: int64 [K], positions of the captions to draw.
            side: side of the corpus's images in pixels.
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
    """A peer with its weights; `eval.measuring` uses it like a `eval.models.Model`.

    Attributes:
        peer: the system.
        folder: folder of its weights or of its images.
        side: side in pixels of the held-out images, to which its images are resized.
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
        """The result of the peer's `load`."""
        return self.peer.load(self.folder)

    def conditions(self, captions: Sequence[str], rows: pd.DataFrame) -> dict[str, Any]:
        """Everything besides the captions that the images of these captions depend on."""
        requested = [
            [self.peer.prompt(caption, row), self.peer.extra(row, self.side)]
            for caption, row in zip(captions, rows.to_dict("records"), strict=True)
        ]
        return {"peer": {"system": self.peer, "side": self.side, "requested": requested}}

    def draw(
        self, loaded: Any, captions: Sequence[str], rows: pd.DataFrame, numbers: np.ndarray, **sampling: Any
    ) -> np.ndarray:
        """Images of the peer, resized in the same way as the corpus's images, uint8 [K, side, side, 3]."""
        images = self.peer.draw(loaded, captions, rows, numbers, self.side, **sampling)
        resized = [square(image, self.side) for image in images]
        return np.stack(resized) if resized else np.empty((0, self.side, self.side, 3), np.uint8)

    @property
    def metadata(self) -> dict[str, Any]:
        """Record of how its images were made, for its row of results."""
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
    """A number in a row; NaN if the row has no such column."""
    value = pd.to_numeric(row.get(name), errors="coerce")
    return math.nan if pd.isna(value) or not np.isfinite(value) else float(value)


def metres(row: Mapping[str, Any], side: int, resolution: int) -> float:
    """Metres per pixel of an image that shows the same ground with another side; NaN if the row has no value.

    Args:
        row: row of the manifest.
        side: side in pixels of the row's image.
        resolution: side in pixels of the requested image.
    """
    return number(row, "ground_sampling_distance") * side / resolution
