"""Small inputs in the layouts that docs/corpora.md describes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter

RANDOM = np.random.default_rng(14)
#: Sentinel-2's 10 m bands and, per product, a preview, a class map and a mask.
GRANULE = "GRANULE/L2A_T36KVU_A012345_20200101T081234"
LANDSAT = "LC09_L2SP_{path:03d}024_20220518_20220520_02_T1"


def land(bands: int, side: int, high: int = 255, kind: str = "uint8") -> np.ndarray:
    """Smooth values [bands, side, side] with some grain, 1 to `high`."""
    smooth = gaussian_filter(RANDOM.normal(size=(bands, side, side)), (0, side / 12, side / 12))
    values = 0.5 + 0.2 * smooth / smooth.std() + RANDOM.normal(0, 0.02, smooth.shape)
    return (1 + values.clip(0, 1) * (high - 1)).astype(kind)


def raster(path: Path, values: np.ndarray, x: float = 500_000, pixel: int = 10, driver: str = "GTiff") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype.name}
    place = {"crs": "EPSG:32636", "transform": from_origin(x, 5_000_000, pixel, pixel)}
    lossless = {"QUALITY": "100", "REVERSIBLE": "YES"} if driver != "GTiff" else {}
    with rasterio.open(path, "w", driver=driver, **shape, **place, **lossless) as file:
        file.write(values)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(land(3, 64).transpose(1, 2, 0)).save(path)


def encoded() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(land(3, 64).transpose(1, 2, 0)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def make_inputs(folder: Path) -> None:
    """`tiles`, `classes`, `naip`, `sentinel`, `landsat`, `bigearthnet`, `shards`, `table.parquet`, `scenes`, `pairs`,
    `captioned` in a folder."""
    rows = []
    for number in range(24):
        picture(folder / "tiles" / f"{number:03d}.jpg")
        picture(folder / "classes" / ("Beach", "Farmland")[number % 2] / f"{number:03d}.png")
        raster(folder / "naip" / f"m_{number:03d}.tif", land(4, 64), x=500_000 + 20_000 * number, pixel=1)
        picture(folder / "captioned" / "Beach" / f"{number:03d}.jpg")
        rows += [{"file_name": f"Beach/{number:03d}.jpg", "text": f"a beach, no. {number}, {kind}"} for kind in "ab"]
        picture(folder / "pairs" / "images" / f"{number:03d}.png")
        mask = np.repeat(np.repeat(RANDOM.choice([0, 10, 20], (1, 8, 8)), 8, 1), 8, 2).astype(np.uint8)
        raster(folder / "pairs" / "masks" / f"{number:03d}.tif", mask)
    (folder / "captioned" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(
        {"image": [{"bytes": encoded(), "path": None} for _ in range(24)], "text": [f"a field {n}" for n in range(24)]}
    ).to_parquet(folder / "table.parquet")
    products(folder)
    patches(folder / "bigearthnet")
    shards(folder / "shards")
    for number in range(3):
        raster(folder / "scenes" / f"s{number}.tif", land(3, 200), x=500_000 + 40_000 * number)


def products(folder: Path) -> None:
    """Three Sentinel-2 products and three Landsat products, with one file per band."""
    for number in range(3):
        x = 300_000 + 40_000 * number
        granule = folder / "sentinel" / f"S2A_MSIL2A_2020010{number + 1}T081234_T36KVU.SAFE" / GRANULE
        name = f"T36KVU_2020010{number + 1}T081234"
        for band in ("B02", "B03", "B04", "B08"):
            path = granule / "IMG_DATA" / "R10m" / f"{name}_{band}_10m.jp2"
            raster(path, land(1, 192, 4000, "uint16"), x, driver="JP2OpenJPEG")
            path = granule / "QI_DATA" / f"MSK_QUALIT_{band}.jp2"
            raster(path, np.zeros((1, 96, 96), np.uint8), x, 20, "JP2OpenJPEG")
        for band, kind in (("B04", "uint16"), ("SCL", "uint8")):
            path = granule / "IMG_DATA" / "R20m" / f"{name}_{band}_20m.jp2"
            raster(path, land(1, 96, 11, kind), x, 20, "JP2OpenJPEG")
        product = LANDSAT.format(path=190 + number)
        for band in ("SR_B2", "SR_B3", "SR_B4", "SR_B5", "QA_PIXEL", "ST_B10"):
            raster(folder / "landsat" / product / f"{product}_{band}.TIF", land(1, 192, 20_000, "uint16"), x, 30)


def patches(folder: Path) -> None:
    for number in range(20):
        name = f"S2A_MSIL2A_20170613T101031_{number}_41"
        for band, side in (("B01", 20), ("B02", 120), ("B03", 120), ("B04", 120), ("B05", 60), ("B08", 120)):
            values = land(1, side, 3000, "uint16")
            raster(folder / name / f"{name}_{band}.tif", values, 500_000 + 15_000 * number, 1200 // side)
        (folder / name / f"{name}_labels_metadata.json").write_text(json.dumps({"labels": ["Pastures"]}))


def shards(folder: Path) -> None:
    """Shards as written by img2dataset: keys of nine digits, with caption, metadata and its statistics files."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(12):
                key = f"{shard:05d}{number:04d}"
                metadata = {"caption": f"a town {key}", "url": f"https://example.org/{key}.jpg", "key": key,
                         "status": "success", "error_message": None, "width": 64, "exif": "{}"}  # fmt: skip
                for suffix, data in (
                    ("jpg", encoded()),
                    ("txt", metadata["caption"].encode()),
                    ("json", json.dumps(metadata).encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 12, "successes": 12}))
        pd.DataFrame({"key": [1]}).to_parquet(folder / f"{shard:05d}.parquet")
