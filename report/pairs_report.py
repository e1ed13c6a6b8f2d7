"""The page about image-text pairs: scores with the cut of every scene, its best and its worst pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from report.page import write_report

PAIRS_PAGE = "pairs.html"


def write_pairs_report(path: Path | str, captions: Path, kept: np.ndarray, images: np.ndarray, name: str) -> None:
    """Write the page of one pruning run."""
    table = pd.read_parquet(captions / "captions.parquet")
    write_report(path, title=f"{name}: pairs", intro=f"{len(table)} candidates")
