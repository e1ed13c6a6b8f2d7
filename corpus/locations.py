"""Locations and dates of the images of a manifest: which pairs show the same ground, and which have different dates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from corpus.ground import DEGREE

#: Values of `Locations.ground_of` for a pair.
UNKNOWN, SAME, ELSEWHERE = 0, 1, 2
#: Names of manifest columns, in order of preference; case is ignored.
LONGITUDE, LATITUDE = ("lon", "longitude"), ("lat", "latitude")
DATE = ("date", "datetime", "acquired", "year")
PIXEL = ("ground_sampling_distance",)
#: Distances in metres between the centres of images of unknown size: below `ONE_PLACE` they show the same location;
#: above `NO_IMAGE` they do not, because no image is that large.
ONE_PLACE, NO_IMAGE = 10.0, 100_000.0


@dataclass(frozen=True)
class Locations:
    """Locations and dates of N images; unknown values are NaN, "" and 0.

    Attributes:
        lon, lat: float64 [N], longitude and latitude of the centre in degrees.
        side: float64 [N], side of the image in metres.
        cell: object [N], the column `ground` of the manifest.
        year: int32 [N].
        day: int32 [N], day of the year, counted from 1.
    """

    lon: np.ndarray
    lat: np.ndarray
    side: np.ndarray
    cell: np.ndarray
    year: np.ndarray
    day: np.ndarray

    def __len__(self) -> int:
        return len(self.lon)

    def __getitem__(self, rows: np.ndarray | slice) -> Locations:
        return Locations(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def of(cls, manifest: pd.DataFrame, resolution: int) -> Locations:
        """Read locations and dates from a manifest; a side is `resolution` times the ground sampling distance."""
        lon, lat, pixel = (_numbers(manifest, names) for names in (LONGITUDE, LATITUDE, PIXEL))
        known = np.isfinite(lon) & np.isfinite(lat) & (np.abs(lat) <= 90)
        cell = manifest["ground"].fillna("").astype(str) if "ground" in manifest else pd.Series("", manifest.index)
        year, day = _dates(manifest)
        return cls(
            lon=np.where(known, lon, np.nan),
            lat=np.where(known, lat, np.nan),
            side=np.where(pixel > 0, pixel * resolution, np.nan),
            cell=cell.to_numpy(dtype=object),
            year=year,
            day=day,
        )

    @classmethod
    def together(cls, parts: Sequence[Locations]) -> Locations:
        """Concatenate the locations of several corpora, without cells, because each corpus has a different grid."""
        joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        return cls(**{**joined, "cell": np.full(len(joined["lon"]), "", dtype=object)})

    def ground_of(self, others: Locations, one_grid: bool) -> np.ndarray:
        """Whether the two images of each pair share ground, int8 [N]: `SAME`, `ELSEWHERE` or `UNKNOWN`.

        Images are treated as squares around their centres. If the size of an image is unknown, two images closer than
        `ONE_PLACE` share ground, and two images farther apart than `NO_IMAGE` do not.

        Args:
            others: locations of the N other images.
            one_grid: whether the cells of both are of one grid, as for splits of one corpus; images of different cells
                then share no ground.
        """
        east = ((others.lon - self.lon + 180) % 360 - 180) * np.cos(np.radians((self.lat + others.lat) / 2))
        apart = np.maximum(np.abs(east), np.abs(others.lat - self.lat)) * DEGREE
        reach = (self.side + others.side) / 2 * (1 - 1e-6)  # images that only touch share no ground
        sized = np.isfinite(reach)
        result = np.full(len(self), UNKNOWN, dtype=np.int8)
        with np.errstate(invalid="ignore"):
            result[np.where(sized, apart < reach, apart < ONE_PLACE)] = SAME
            result[np.where(sized, apart >= reach, apart > NO_IMAGE)] = ELSEWHERE
        if one_grid:
            cells = (self.cell != others.cell) & (self.cell != "") & (others.cell != "")
            result[(result == UNKNOWN) & cells.astype(bool)] = ELSEWHERE
        return result

    def on_other_date(self, others: Locations) -> np.ndarray:
        """Whether the dates of each pair are known and differ, bool [N]; if one is only a year, years are compared."""
        days = (self.day != others.day) & (self.day > 0) & (others.day > 0)
        return (self.year > 0) & (others.year > 0) & ((self.year != others.year) | days)


def _column(manifest: pd.DataFrame, names: Sequence[str]) -> pd.Series | None:
    by_name = {str(name).lower(): name for name in reversed(list(manifest.columns))}
    return next((manifest[by_name[name]] for name in names if name in by_name), None)


def _numbers(manifest: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    column = _column(manifest, names)
    if column is None:
        return np.full(len(manifest), np.nan)
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _dates(manifest: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Year and day of the year, int32 [N] each, 0: unknown; a number of four digits is a year without a day."""
    year, day = np.zeros(len(manifest), np.int32), np.zeros(len(manifest), np.int32)
    column = _column(manifest, DATE)
    if column is None:
        return year, day
    texts = column.astype("string").fillna("").str.strip().str.replace(r"\.0$", "", regex=True)
    alone = texts.str.fullmatch(r"\d{4}").to_numpy(dtype=bool)
    year[alone] = texts[alone].astype(int)
    dates = pd.to_datetime(texts.where(~alone, ""), errors="coerce", utc=True, format="mixed")
    known = dates.notna().to_numpy()
    year[known], day[known] = dates[known].dt.year, dates[known].dt.dayofyear
    return year, day
