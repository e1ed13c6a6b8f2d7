"""Images that were drawn with the code of another system, for systems whose networks are not those of diffusers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from corpus.decoding import decode_image
from eval.peers.parts import PICKLES
from eval.peers.peer import IMAGES, Peer
from runtime.errors import UserError
from runtime.progress import progress

#: File next to the images with one caption per line, in the order of the images' names.
CAPTIONS = "captions.txt"


@dataclass(frozen=True)
class Drawn:
    """Images in a folder.

    Attributes:
        files: image files, sorted by name.
        captions: captions of the files; empty if the folder has no `captions.txt`.
    """

    files: tuple[Path, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class DrawnImages(Peer):
    """A folder with one image for every held-out caption.

    An image belongs to the caption of the held-out image with the same name (`airport_1.png` to
    `airport/airport_1.jpg`), or to the caption in its line of `captions.txt`; equal captions get successive images.
    """

    #: Reason why the weights are not read.
    reason: ClassVar[str] = "its networks do not exist in diffusers"

    def check(self, folder: Path) -> None:
        files = [folder] if folder.is_file() else sorted(folder.glob("*"))
        images = self._images(folder)
        for path in files:
            if not images and path.suffix in (".safetensors", *PICKLES):
                raise UserError(f"{path} is not read, because {self.reason}: {self._advice}")
        if not images:
            raise UserError(f"of={folder} has no images: {self._advice}")
        lines = self.load(folder).captions
        if lines and len(lines) != len(images):
            raise UserError(
                f"{folder / CAPTIONS} has {len(lines)} lines for {len(images)} images: give one line per image, in the "
                "order of the file names"
            )

    def load(self, folder: Path) -> Drawn:
        table = folder / CAPTIONS
        lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
        return Drawn(tuple(self._images(folder)), tuple(line.strip() for line in lines))

    def draw(
        self, loaded: Drawn, captions: Sequence[str], rows: pd.DataFrame, numbers: np.ndarray, side: int, **_: Any
    ) -> np.ndarray:
        """The images of some captions, cropped to central squares and resized to `resolution`, uint8 [K, R, R, 3]."""
        files = self.files_of(loaded, captions, rows["id"].tolist())
        images = np.empty((len(numbers), self.resolution, self.resolution, 3), np.uint8)
        for position, row in enumerate(progress(numbers, f"read {self.name}", unit="image")):
            image = decode_image(files[row].read_bytes(), self.resolution)
            if isinstance(image, str):
                raise UserError(f"{files[row]} cannot be read ({image}): generate it again")
            images[position] = image
        return images

    def files_of(self, loaded: Drawn, captions: Sequence[str], ids: Sequence[str]) -> list[Path]:
        """The file of every caption.

        Raises:
            UserError: a caption has no file.
        """
        named = {path.stem: path for path in loaded.files}
        given: dict[str, list[Path]] = defaultdict(list)
        for caption, path in zip(loaded.captions, loaded.files, strict=False):
            given[caption].append(path)
        files = []
        for caption, identifier in zip(captions, ids, strict=True):
            path = named.get(PurePosixPath(identifier).stem)
            if path is None and given[caption.strip()]:
                path = given[caption.strip()].pop(0)
            if path is None:
                folder = loaded.files[0].parent
                raise UserError(f"of={folder} has no image for the caption of {identifier}: {self._advice}")
            files.append(path)
        return files

    @property
    def _advice(self) -> str:
        return (
            f"generate an image for every caption of the split with {self.name}'s own code and give their folder; each "
            f"file has the name of the image with this caption, or {CAPTIONS} has one line per image"
        )

    @staticmethod
    def _images(folder: Path) -> list[Path]:
        """Image files, sorted; files whose names begin with an underscore are contact sheets and left out."""
        return sorted(path for path in folder.glob("[!_.]*") if path.suffix.lower() in IMAGES)
