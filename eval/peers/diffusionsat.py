"""DiffusionSat (Khanna et al. 2024, arXiv 2312.03606): Stable Diffusion 2.1 with seven numbers besides the time.

Its U-Net, the `SatUNet` of github.com/samar-khanna/DiffusionSat, is the U-Net of diffusers with one more embedding.
Each number gets sinusoidal features, like the time, and a separate MLP; the results are added to the embedding of the
time. Here the U-Net of diffusers holds this embedding in place of its class embedding, which it adds in the same way.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from safetensors.torch import load_file
from torch import nn

from eval.peers.labels import LabelledPipeline
from eval.peers.parts import check_parts, loaded, network_config, pipeline_of, read, weights_of
from eval.peers.peer import Peer, metres, number
from runtime.errors import UserError

#: The numbers, in the order of their embeddings.
FIELDS = ("lon", "lat", "ground_sampling_distance", "cloud_fraction", "year", "month", "day")
#: For each number, the value that is scaled to 0, and the range from it that is scaled to 1000: `metadata_normalize` in
#: its data_util.py, after the offsets that its training adds. Metres per pixel go beyond 1000.
LOW = (-180.0, -90.0, 0.0, 0.0, 1980.0, 0.0, 0.0)
SPAN = (360.0, 180.0, 1.0, 1.0, 120.0, 12.0, 31.0)
#: Prefixes of the embedding's weights, in the files of DiffusionSat and in the U-Net of diffusers.
THEIRS, OURS = "metadata_embedding.", "class_embedding."


class MetadataEmbedding(nn.ModuleList):
    """The sum of the embeddings of several numbers.

    Args:
        count: number of numbers.
        features: number of sinusoidal features of each number.
        width: width of the time's embedding.
        flip_sin_to_cos, shift: settings of the sinusoidal features, as for the time.
    """

    def __init__(self, count: int, features: int, width: int, *, flip_sin_to_cos: bool, shift: float) -> None:
        super().__init__(TimestepEmbedding(features, width) for _ in range(count))
        self.features = features
        self.options = {"flip_sin_to_cos": flip_sin_to_cos, "downscale_freq_shift": shift}

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, count] scaled numbers to [B, width]."""
        result = [
            embed(get_timestep_embedding(column, self.features, **self.options).to(numbers.dtype))
            for embed, column in zip(self, numbers.unbind(1), strict=True)
        ]
        return torch.stack(result).sum(0)


@dataclass(frozen=True)
class DiffusionSat(Peer):
    """The single-image model of DiffusionSat.

    Unknown values of an image's location, resolution, clouds and date are 0, the value of a number that was dropped in
    its training.

    Args:
        unet: folder of the U-Net inside the pipeline's folder; None: `unet`, else that of the last `checkpoint-N`.
    """

    unet: str | None = None

    def check(self, folder: Path) -> None:
        check_parts(folder, self.name, ("DiffusionSatPipeline", "StableDiffusionPipeline"))
        place = self._network(folder)
        config = network_config(place, self.name, "SatUNet")
        count = config.get("num_metadata") if config.get("use_metadata") else 0
        if count != len(FIELDS):
            raise UserError(f"{place} takes {count} numbers: peer={self.name} gives {len(FIELDS)}, {', '.join(FIELDS)}")

    def load(self, folder: Path) -> LabelledPipeline:
        place = self._network(folder)
        unet = loaded(place, lambda: network_of(read(place / "config.json"), load_file(weights_of(place))))
        return pipeline_of(LabelledPipeline, folder, unet, self.scheduler)

    def extra(self, row: Mapping[str, Any], side: int) -> dict[str, list[float]]:
        """`labels`: the seven numbers, scaled."""
        return {"labels": scaled(metadata_of(row, side, self.resolution))}

    def _network(self, folder: Path) -> Path:
        if self.unet is not None:
            return folder / self.unet
        steps = {
            int(path.parent.name.partition("-")[2]): path
            for path in folder.glob("checkpoint-*/unet")
            if path.parent.name.partition("-")[2].isdecimal()
        }
        return steps[max(steps)] if steps and not (folder / "unet").is_dir() else folder / "unet"


def network_of(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> UNet2DConditionModel:
    """The U-Net of diffusers with the embedding, made from the config.json and weights of a `SatUNet`; float32, frozen.

    Raises:
        RuntimeError: a weight is missing, unknown or of another shape.
    """
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    network = UNet2DConditionModel(**{key: value for key, value in config.items() if key in known})
    options = network.config
    network.class_embedding = MetadataEmbedding(
        int(config["num_metadata"]),
        options.block_out_channels[0],
        4 * options.block_out_channels[0],
        flip_sin_to_cos=options.flip_sin_to_cos,
        shift=options.freq_shift,
    )
    network.load_state_dict(
        {OURS + key.removeprefix(THEIRS) if key.startswith(THEIRS) else key: value for key, value in weights.items()}
    )
    return network.float().eval().requires_grad_(False)


def metadata_of(row: Mapping[str, Any], side: int, resolution: int) -> dict[str, float]:
    """The seven numbers of a row of a manifest in their original units, NaN where a value is missing.

    The date is taken from the columns `year`, `month` and `day`, else from `date`, else from `year` and `day_of_year`.

    Args:
        row: row of the manifest.
        side: side of the row's image in pixels.
        resolution: side in pixels of the image to draw, which shows the same ground.
    """
    metadata = {name: number(row, name) for name in FIELDS}
    metadata["ground_sampling_distance"] = metres(row, side, resolution)
    date = pd.to_datetime(row.get("date"), errors="coerce", utc=True)
    day_of_year = number(row, "day_of_year")
    if pd.isna(date) and not math.isnan(metadata["year"] + day_of_year):
        date = pd.Timestamp(year=int(metadata["year"]), month=1, day=1) + pd.Timedelta(days=int(day_of_year) - 1)
    for name in ("year", "month", "day"):
        if math.isnan(metadata[name]) and not pd.isna(date):
            metadata[name] = float(getattr(date, name))
    return metadata


def scaled(metadata: Mapping[str, float]) -> list[float]:
    """The values of `FIELDS`, scaled for the network; 0 for NaN."""
    values = np.array([metadata[name] for name in FIELDS])
    return np.nan_to_num((values - LOW) / SPAN * 1000, nan=0.0).tolist()
