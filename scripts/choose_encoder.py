"""Choice of the evaluation encoder: whose distances grow with known damage? `python scripts/choose_encoder.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus, index_corpus
from encoders.embedding import Encoder, embed
from eval.damage import DAMAGES, Pool, PoolFeatures, damage_curve, deal, kernel_alignment, verdict
from report.figures import damage_figure
from report.page import figure_bytes
from runtime.application import run
from runtime.artefacts import stage, write_json
from runtime.errors import UserError


def pool_of(corpus: Corpus, size: int, seed: int) -> Pool:
    """Two disjoint scene-balanced sets of a corpus, and its other images.

    Raises:
        UserError: the corpus has no scenes, or a scene has too few images.
    """
    scenes = corpus.manifest["scene"].to_numpy(dtype=str)
    rows = np.flatnonzero(corpus.readable & (scenes != ""))
    if len(set(scenes[rows].tolist())) < 2:
        raise UserError(f"the corpus {corpus.name} has fewer than two scenes: choose one whose images have labels")
    return deal(np.asarray(corpus.images)[rows], scenes[rows], size, np.random.default_rng([seed, 400]))


def curves_of(cfg: DictConfig, encoder: Encoder, corpus: Corpus, pool: Pool) -> pd.DataFrame:
    """Distances at every strength of every damage: encoder, damage, step, and the columns of `damage_curve`; cached."""
    features = PoolFeatures(encoder, pool)
    tables = []
    for name, damage in DAMAGES.items():

        def build(directory: Path, name: str = name) -> None:
            damage_curve(features, name, DAMAGES[name].strengths, cfg.seed).to_parquet(directory / "curve.parquet")

        inputs = {"corpus": corpus.fingerprint, "encoder": encoder, "images": cfg.damage.images, "seed": cfg.seed}
        directory = stage(cfg.runs, "damage", {**inputs, "damage": name, "strengths": damage.strengths}, build)
        table = pd.read_parquet(directory / "curve.parquet")
        tables.append(table.assign(encoder=encoder.name, damage=name, step=np.arange(len(table))))
    return pd.concat(tables, ignore_index=True)


def metadata_of(encoder: Encoder, selecting: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Images per second, and the alignment with the features [N, D] of the encoder for selection."""
    encoder(images[: encoder.batch_size])  # loads the network
    start = time.perf_counter()
    features = embed(encoder, images, batch_size=encoder.batch_size)
    rate = len(images) / (time.perf_counter() - start)
    return {"images_per_second": rate, "alignment": kernel_alignment(features, selecting)}


def orderings(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per encoder and damage, with the columns of `verdict`."""
    groups = curves.groupby(["encoder", "damage"], sort=False)
    return pd.DataFrame([{"encoder": one, "damage": two, **verdict(curve)} for (one, two), curve in groups])


def summary(result: pd.DataFrame, metadata: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """One row per encoder, the best first: by the fewest pairs in the wrong order by KID, then by the earliest
    detection.

    A damage that is never detected counts as detected one step after the strongest.
    """
    late = result["damage"].map(lambda name: len(DAMAGES[name].strengths) + 1)
    result = result.assign(seen_at=result["seen_at"].fillna(late), ordered=result["kid_x1000_inversions"] == 0)
    columns = {
        "damages_ordered": ("ordered", "sum"),
        "kid_x1000_inversions": ("kid_x1000_inversions", "sum"),
        "beyond_intervals": ("beyond_intervals", "sum"),
        "fd_inversions": ("fd_inversions", "sum"),
        "kid_x1000_spearman": ("kid_x1000_spearman", "mean"),
        "seen_at": ("seen_at", "mean"),
    }
    table = result.groupby("encoder").agg(**columns).join(pd.DataFrame.from_dict(metadata, orient="index"))
    return table.sort_values(["kid_x1000_inversions", "seen_at"])


def page(title: str, table: pd.DataFrame, result: pd.DataFrame, curves: pd.DataFrame, chosen: str) -> str:
    """All measurements as Markdown."""
    pairs = len(DAMAGES) * 15
    lines = [f"# {title}", "", f"Chosen: `{chosen}`.", ""]
    lines += _rows(
        ["encoder", f"damages in order, of {len(DAMAGES)}", f"pairs in the wrong order, of {pairs}: KID",
         "of them beyond the intervals", "FD",
         "Spearman, KID", "seen at step", "alignment with the selecting encoder", "img/s"],
        [[f"`{name}`", f"{row.damages_ordered:.0f}", f"{row.kid_x1000_inversions:.0f}", f"{row.beyond_intervals:.0f}",
          f"{row.fd_inversions:.0f}", f"{row.kid_x1000_spearman:.3f}", f"{row.seen_at:.2f}", f"{row.alignment:.2f}",
          f"{row.images_per_second:.0f}"] for name, row in table.iterrows()],
    )  # fmt: skip
    names = list(table.index)
    lines += ["", "Pairs in the wrong order by KID / by FD, and the first step whose KID interval leaves the undamaged "
              "one (–: none).", ""]  # fmt: skip
    keyed = result.set_index(["damage", "encoder"])
    cells = [
        [damage, *(_ordering(keyed.loc[(damage, name)]) for name in names)] for damage in result["damage"].unique()
    ]
    lines += _rows(["damage", *(f"`{name}`" for name in names)], cells)
    lines += ["", "KID × 1000 with its 95 % interval, strength by strength.", ""]
    cells = []
    for (damage, strength), rows in curves.groupby(["damage", "strength"], sort=False):
        rows = rows.set_index("encoder")
        cells.append([f"{damage} ({DAMAGES[damage].unit})", f"{strength:g}", *(_interval(rows.loc[n]) for n in names)])
    lines += _rows(["damage", "strength", *(f"`{name}`" for name in names)], cells)
    return "\n".join(lines) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _ordering(row: pd.Series) -> str:
    seen = f"step {row.seen_at:.0f}" if np.isfinite(row.seen_at) else "–"
    return f"{row.kid_x1000_inversions:.0f} / {row.fd_inversions:.0f}, {seen}"


def _interval(row: pd.Series) -> str:
    return f"{row.kid_x1000:.1f} [{row.kid_x1000_low:.1f}, {row.kid_x1000_high:.1f}]"


def main(cfg: DictConfig) -> None:
    corpus = index_corpus(instantiate(cfg.corpus.test), cfg.runs)
    pool = pool_of(corpus, cfg.damage.images, cfg.seed)
    selecting = instantiate(cfg.encoder)
    clean = pool.images[pool.clean]
    features = embed(selecting, clean, batch_size=selecting.batch_size)
    tables, metadata = [], {}
    for node in cfg.damage.encoders.values():
        encoder = instantiate(node)
        tables.append(curves_of(cfg, encoder, corpus, pool))
        metadata[encoder.name] = metadata_of(encoder, features, clean)
        print(f"{encoder.name}: {metadata[encoder.name]['images_per_second']:.0f} img/s", flush=True)
    curves = pd.concat(tables, ignore_index=True)
    result = orderings(curves)
    table = summary(result, metadata)
    others = [name for name in table.index if name != selecting.name]
    if not others:
        raise UserError(f"damage.encoders contains only {selecting.name}, which selects images: add another encoder")
    title = f"Known damage to {len(clean)} images of {cfg.corpus.name}"
    results = Path(cfg.results) / cfg.profile.name / "encoders" / str(cfg.corpus.name)
    results.mkdir(parents=True, exist_ok=True)
    curves.to_csv(results / "curves.csv", index=False)
    (results / "encoders.md").write_text(page(title, table, result, curves, others[0]), encoding="utf-8")
    (results / "encoders.png").write_bytes(figure_bytes(damage_figure(curves)))
    records = {"encoders": table.reset_index().to_dict("records"), "damages": result.to_dict("records")}
    write_json(results / "encoders.json", {"chosen": others[0], **records})
    print(table.to_string(float_format=lambda value: f"{value:.3g}"))
    print(f"chosen: {others[0]}, among the encoders that do not select images")
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
