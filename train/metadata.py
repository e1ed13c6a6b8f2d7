"""Numeric metadata of an image (location, ground sampling distance, date, …) as tokens in addition to the caption's.

After DiffusionSat (Khanna et al. 2024, section 3.1): sinusoidal features of a number scaled to 0..1000, and a small MLP
per field. DiffusionSat adds them to the embedding of the time, which requires a fork of diffusers. Here each is a token
of the cross-attention, so the networks are unchanged and a plain pipeline can draw without metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from safetensors.torch import load_file, save_file
from torch import nn

from runtime.errors import UserError

FOLDER = "metadata_encoder"
FEATURES = 256


@dataclass(frozen=True)
class MetadataField:
    """One numeric field of a manifest.

    Args:
        low, high: the values scaled to 0 and 1000; values outside are clipped.
        log: scale the logarithm.
        column: column of the manifest; None: the field's name. `year` and `day_of_year` are taken from the column
            `date` (any date pandas reads) if there is no column with their name.
    """

    low: float
    high: float
    log: bool = False
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(
                f"a metadata field from low={self.low} to high={self.high}: give low < high, and with log a low above 0"
            )

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """Scale values of any shape to 0..1000; NaN stays NaN."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        values = values.clamp(self.low, self.high)
        return 1000 * ((values.log() if self.log else values) - low) / (high - low)


class MetadataEncoder(nn.Module):
    """Encodes each field that an image has as one token.

    Args:
        fields: by name, in the order of the tokens.
        width: width of the text encoder's hidden states.
    """

    def __init__(self, fields: Mapping[str, MetadataField], width: int) -> None:
        super().__init__()
        self.fields = dict(fields)
        self.width = width
        self.embedders = nn.ModuleDict({name: TimestepEmbedding(FEATURES, width) for name in fields})
        # like the text encoder's last layer: attention would hardly see tokens a tenth as large as its hidden states
        self.norm = nn.LayerNorm(width)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of metadata.

        Args:
            values: float32 [B, F] in the fields' own units, NaN where an image lacks a field.
        Returns:
            tokens [B, F, width], and their mask bool [B, F], false for missing fields.
        """
        known = ~values.isnan()
        dtype = next(self.parameters()).dtype
        tokens = []
        for index, (name, field) in enumerate(self.fields.items()):
            scaled = field.scaled(values[:, index]).nan_to_num(0.0)
            features = get_timestep_embedding(scaled, FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
            tokens.append(self.embedders[name](features.to(dtype)))
        return self.norm(torch.stack(tokens, dim=1)), known

    def save(self, directory: Path) -> None:
        """Write config.json and the weights to a folder, which plain diffusers ignores."""
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"width": self.width, "fields": {name: asdict(field) for name, field in self.fields.items()}}
        (directory / "config.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        save_file(state, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path) -> MetadataEncoder:
        """Load an encoder written by `save`, frozen."""
        metadata = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        fields = {name: MetadataField(**field) for name, field in metadata["fields"].items()}
        encoder = cls(fields, metadata["width"])
        encoder.load_state_dict(load_file(directory / "model.safetensors"))
        return encoder.eval().requires_grad_(False)


def new_encoder(fields: Mapping[str, MetadataField], width: int, seed: int) -> MetadataEncoder:
    """A randomly initialised encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MetadataEncoder(fields, width)


def metadata_values(manifest: pd.DataFrame, fields: Mapping[str, MetadataField]) -> np.ndarray:
    """The fields' values in a manifest, float32 [N, F], NaN where a row has none.

    Raises:
        UserError: a field's column is missing, holds no numbers, or is empty.
    """
    columns = []
    for name, field in fields.items():
        column = field.column or name
        if column in manifest:
            values = pd.to_numeric(manifest[column], errors="coerce").to_numpy(dtype=np.float32, na_value=np.nan)
        elif name in ("year", "day_of_year") and "date" in manifest:
            dates = pd.to_datetime(manifest["date"], errors="coerce", utc=True, format="mixed").dt
            values = (dates.year if name == "year" else dates.dayofyear).to_numpy(dtype=np.float32, na_value=np.nan)
        else:
            known = ", ".join(str(column) for column in manifest.columns)
            raise UserError(
                f"metadata.fields.{name}: the corpus has no column {column}, only {known}: "
                f"leave the field out (~metadata.fields.{name}) or choose metadata=none"
            )
        if np.isnan(values).all():
            raise UserError(f"metadata.fields.{name}: column {column} of the corpus contains no numbers")
        columns.append(values)
    return np.stack(columns, axis=1) if columns else np.empty((len(manifest), 0), dtype=np.float32)


def drop(values: np.ndarray, random: np.random.Generator, fraction: float) -> np.ndarray:
    """A copy of float32 [B, F] in which each value is set to NaN (missing) with probability `fraction`."""
    return np.where(random.random(values.shape) < fraction, np.float32(np.nan), values)


@torch.no_grad()
def prompt_embeddings(
    pipeline: nn.Module,
    encoder: MetadataEncoder,
    prompts: Sequence[str],
    metadata: Mapping[str, float | Sequence[float]],
    *,
    negative_prompt: str = "",
) -> dict[str, torch.Tensor]:
    """Arguments for a StableDiffusionPipeline in place of `prompt`, so that it draws with these metadata.

    The empty prompt of classifier-free guidance gets the same metadata, so guidance amplifies only the caption.

    Args:
        metadata: some of the encoder's fields, in their own units; one number for all prompts, or one per prompt.
    Returns:
        prompt_embeds and negative_prompt_embeds, [B, L + given fields, width].
    Raises:
        UserError: the encoder has no such field, or a number is not finite.
    """
    unknown = set(metadata) - set(encoder.fields)
    if unknown:
        raise UserError(
            f"this model has no field {', '.join(sorted(unknown))}: its fields are {', '.join(encoder.fields)}"
        )
    device, dtype = pipeline.device, pipeline.text_encoder.dtype
    given = [name for name in encoder.fields if name in metadata]
    values = torch.full((len(prompts), len(encoder.fields)), math.nan)
    for name in given:
        numbers = torch.as_tensor(np.broadcast_to(np.asarray(metadata[name], dtype=np.float32), (len(prompts),)).copy())
        if not numbers.isfinite().all():
            raise UserError(f"metadata {name}: {metadata[name]} is not a finite number")
        values[:, list(encoder.fields).index(name)] = numbers
    tokens, known = encoder.to(device)(values.to(device))
    tokens = tokens[:, known[0]].to(dtype)
    embeddings = {}
    for key, texts in (("prompt_embeds", list(prompts)), ("negative_prompt_embeds", [negative_prompt] * len(prompts))):
        ids = pipeline.tokenizer(
            texts,
            padding="max_length",
            max_length=pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        embeddings[key] = torch.cat([pipeline.text_encoder(ids.to(device))[0], tokens], dim=1)
    return embeddings
