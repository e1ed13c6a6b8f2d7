"""The data of a selection that new images are compared with: an index of the kept images, and scenes, as a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import load_file, save_file

from corpus.index import Corpus, open_corpus
from corpus.locations import Locations
from encoders.efficientnet import EfficientNetLite0
from prune.arrivals import ImageData
from prune.clusters import CHUNK, Clustering, Points, corpus_points, normalise
from prune.entropy import LocalEntropy
from prune.features import corpus_embeddings
from prune.methods.rsprune import nearest_similarities
from prune.neighbour_index import SAMPLE, new_index, read_index, write_index
from prune.pool import Pool
from prune.scenes import MOST_STRATA, OPEN_SCENE, Prototypes, assign_scenes, fit_prototypes
from prune.selection import CORPUS, REFERENCE, with_reference
from runtime.artefacts import COMPLETE, plain, read_json, stage, write_json
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress

#: Files that the index stage writes.
INDEX, SCENES, PARAMETERS, KEPT = "kept.faiss", "scenes.safetensors", "index.json", "kept.parquet"
#: Largest number of images per scene that prototypes are fitted to, if the scenes are those of the kept images.
OF_SCENE = 500
#: Tolerance between the similarity of a kept image to its scene and the value that the selection recorded.
AGREE = 0.01


@dataclass(frozen=True)
class Kept:
    """An opened selection.

    Attributes:
        directory: directory of the selection.
        runs: directory of its stages.
        inputs: inputs that the selection was made from.
        summary: content of its summary.json.
        table: the kept rows of selection.parquet, with the column `row`, their row in the corpus.
    """

    directory: Path
    runs: Path
    inputs: Mapping[str, Any]
    summary: Mapping[str, Any]
    corpus: Corpus
    table: pd.DataFrame

    @property
    def rows(self) -> np.ndarray:
        """Rows of the kept images in the corpus, int64 [K], ascending."""
        return self.table["row"].to_numpy()

    @property
    def encoder(self) -> EfficientNetLite0:
        return self.instantiated(self.inputs["encoder"])

    @property
    def measure(self) -> LocalEntropy:
        return self.instantiated(self.inputs["entropy"])

    def instantiated(self, config: Mapping[str, Any], **options: Any) -> Any:
        """The object of a configuration that is stored with the selection; `options` as for Hydra's `instantiate`.

        Raises:
            UserError: another version of this project made the selection, and the configuration has changed since.
        """
        try:
            return instantiate(OmegaConf.create(config), **options)
        except HydraException as error:
            reason = str(error).strip().splitlines()[-1] if error.__cause__ is None else str(error.__cause__)
            raise UserError(
                f"{self.directory} was made by another version of this project ({reason}): prune again"
            ) from None

    @property
    def embeddings(self) -> np.ndarray:
        """Embeddings of the whole corpus, float16 [N, D], memory-mapped."""
        return corpus_embeddings(self.corpus, self.encoder, self.runs)

    def image_data(self, centre: np.ndarray) -> ImageData:
        """All images of the corpus in the form that comparisons need."""
        locations = Locations.of(self.corpus.manifest, self.corpus.resolution)
        return ImageData(Points(self.embeddings, centre), self.corpus.images, Locations.together([locations]))


@dataclass(frozen=True)
class KeptIndex:
    """The opened index stage.

    Attributes:
        fingerprint: fingerprint of the stage.
        index: faiss index of the kept images, in their order.
        prototypes: prototypes of the scenes.
        counts: int64 [S], kept images of each scene; the last scene is the unknown one.
        similarity: two cosines from which an image is redundant, for known scenes and for the unknown scene; None: the
            method defines none.
        bytes: size of the index's file.
    """

    fingerprint: str
    index: faiss.Index
    prototypes: Prototypes
    counts: np.ndarray
    similarity: tuple[float | None, float | None]
    bytes: int

    def similarities(self, otherwise: float) -> np.ndarray:
        """Cosine from which an image is redundant, float32 [S], by scene; `otherwise` where the method defines none."""
        known, unknown = (otherwise if value is None else value for value in self.similarity)
        return np.array([known] * (len(self.counts) - 1) + [unknown], dtype=np.float32)


def open_selection(directory: str | Path | None) -> Kept:
    """Open the selection in a directory that `prune/run.py` printed.

    Raises:
        UserError: no directory is given, it holds no selection, the selection keeps no image, or its corpus is gone.
    """
    if directory is None:
        raise UserError("selection=null: give the selection to compare with, selection=DIR as prune/run.py prints it")
    selection = Path(directory).expanduser()
    if not (selection / "selection.parquet").is_file() or not (selection / COMPLETE).is_file():
        raise UserError(f"selection={directory} is not a selection: give the directory that prune/run.py prints")
    runs, inputs = selection.resolve().parent.parent, read_json(selection / COMPLETE)["inputs"]
    place = runs / "corpus" / inputs["corpus"]
    if not (place / COMPLETE).is_file():
        raise UserError(f"the corpus of {selection} is not in {place}: prune again")
    corpus, table = open_corpus(place), pd.read_parquet(selection / "selection.parquet")
    if table["id"].tolist() != corpus.manifest["id"].tolist():
        raise UserError(f"{selection} does not belong to {place}: prune again")
    kept = table.assign(row=np.arange(len(table)))[table["kept"]].reset_index(drop=True)
    if kept.empty:
        raise UserError(f"{selection} keeps no image: there is nothing to compare with")
    return Kept(selection, runs, inputs, read_json(selection / "summary.json"), corpus, kept)


def kept_index(kept: Kept) -> KeptIndex:
    """The index and the scenes of a selection; the stage is built when the first new corpus arrives."""
    inputs = {"selection": kept.directory.resolve().name}

    def build(directory: Path) -> None:
        prototypes, similarity, source = _scenes(kept)
        embeddings, rows = kept.embeddings, kept.rows
        scene, cosine = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            scene[part], cosine[part] = assign_scenes(embeddings[rows[part]], prototypes)
        points = Points(embeddings, prototypes.centre)
        size = write_index(_filled(points, rows), directory / INDEX)
        arrays = {"centre": prototypes.centre, "vectors": prototypes.vectors, "classes": prototypes.classes}
        counts = np.bincount(scene, minlength=len(prototypes.names) + 1)
        save_file({**arrays, "counts": counts}, str(directory / SCENES))
        kept.table[["id", "row"]].to_parquet(directory / KEPT, index=False)
        noted = kept.table["scene_similarity"].to_numpy(dtype=np.float32)
        parameters = {
            "names": prototypes.names, "threshold": prototypes.threshold, "similarity": similarity, "scenes": source,
            "kept": len(rows), "bytes": size, "scene_agreement": _agreement(cosine, noted, source),
        }  # fmt: skip
        write_json(directory / PARAMETERS, parameters)

    directory = stage(kept.runs, "arrival_index", inputs, build)
    parameters, arrays = read_json(directory / PARAMETERS), load_file(str(directory / SCENES))
    if (agreement := parameters["scene_agreement"]) is not None and agreement < 1:
        notice(
            f"{kept.directory}: only for {agreement:.1%} of the kept images, the similarity to their scene is the same "
            "as in the selection"
        )
    threshold = -np.inf if parameters["threshold"] is None else parameters["threshold"]
    prototypes = Prototypes(
        arrays["centre"], arrays["vectors"], arrays["classes"], tuple(parameters["names"]), threshold
    )
    index = read_index(directory / INDEX)
    return KeptIndex(
        directory.name, index, prototypes, arrays["counts"], tuple(parameters["similarity"]), parameters["bytes"]
    )


def _filled(points: Points, rows: np.ndarray) -> faiss.Index:
    """A new index of some rows, in the given order."""
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)]
    index = new_index(points[sample], len(rows))
    for start in progress(range(0, len(rows), CHUNK), "index kept images", unit="chunk"):
        index.add(np.ascontiguousarray(points[rows[start : start + CHUNK]]))
    return index


def _agreement(cosine: np.ndarray, noted: np.ndarray, source: str) -> float | None:
    """Fraction of the kept images whose scene similarity equals the recorded one; None if none was recorded."""
    known = np.isfinite(noted)
    if source != REFERENCE or not known.any():
        return None
    return float((np.abs(cosine[known] - noted[known]) <= AGREE).mean())


def _scenes(kept: Kept) -> tuple[Prototypes, tuple[float | None, float | None], str]:
    """Prototypes of the scenes, two cosines, and the source of the scenes.

    An image of a known scene is redundant from the first cosine, an image of an unknown scene from the second one. The
    scenes are those of the labelled set that the selection was made with, fitted with the same seed. If there was no
    labelled set, they are the scenes of the kept images: the strata that the selection names, the labels of the corpus,
    or new strata.
    """
    method, seed = kept.inputs["method"], int(kept.inputs["seed"])
    per_class, threshold = int(method.get("prototypes_per_class", 8)), float(method.get("threshold_quantile", 0.01))
    duplicate = method.get("duplicate_similarity")
    if kept.inputs.get("reference") is None:
        rows, labels = _own_labels(kept, seed)
        embeddings = np.asarray(kept.embeddings[rows], dtype=np.float32)
        return fit_prototypes(embeddings, labels, per_class, threshold or 0.01, seed), (duplicate, duplicate), CORPUS
    cfg = OmegaConf.create({"reference": kept.inputs["reference"], "seed": seed, "runs": str(kept.runs)})
    pool = with_reference(cfg, _pool(kept, kept.rows), REFERENCE, kept.encoder)
    reference, labels = pool.reference_embeddings, pool.reference_labels
    fit_seed = int(np.random.default_rng([seed, 2]).integers(2**31))  # the first draw of the methods' generator
    prototypes = fit_prototypes(reference, labels, per_class, threshold, fit_seed)
    quantile, known = method.get("reference_duplicates"), duplicate
    if quantile is not None and len(set(labels.tolist())) < len(labels):
        centred = normalise(np.asarray(reference, dtype=np.float32) - prototypes.centre)
        repeated = float(np.quantile(nearest_similarities(centred), quantile))
        known = repeated if duplicate is None else min(repeated, duplicate)
    return prototypes, (known, duplicate), REFERENCE


def _own_labels(kept: Kept, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `OF_SCENE` kept images of each scene, as int64 rows of the corpus, and the scene name of each image."""
    rows = kept.rows
    labels = kept.table["scene"].fillna("").to_numpy(dtype=object)
    if set(labels) <= {"", OPEN_SCENE}:
        labels = kept.corpus.manifest["scene"].to_numpy(dtype=object)[rows]
    generator = np.random.default_rng([seed, 6])
    if (labels == "").all():
        sample = np.sort(generator.permutation(rows)[: OF_SCENE * MOST_STRATA])
        inside, points = corpus_points(_pool(kept, sample))
        requested = max(1, min(MOST_STRATA, round((len(sample) / 2) ** 0.5)))
        result, _ = Clustering(requested, hierarchical=False)(points, inside, requested, generator)
        return sample, np.array([f"stratum {number:02d}" for number in result], dtype=object)
    groups = [np.flatnonzero(labels == name) for name in sorted(set(labels) - {""})]
    chosen = np.sort(np.concatenate([generator.permutation(group)[:OF_SCENE] for group in groups]))
    return rows[chosen], labels[chosen]


def _pool(kept: Kept, rows: np.ndarray) -> Pool:
    """Some rows of the corpus as a pool without a reference."""
    embeddings = kept.embeddings[rows] if len(rows) <= OF_SCENE * MOST_STRATA else kept.embeddings[:0]
    return Pool(
        ids=kept.corpus.manifest["id"].to_numpy()[rows],
        readable=np.ones(len(embeddings), dtype=bool),
        entropy=np.zeros(len(embeddings), np.float32),
        embeddings=embeddings,
        reference_embeddings=np.empty((0, embeddings.shape[1]), np.float32),
        reference_labels=np.empty(0, dtype=object),
    )


def as_selected(cfg: DictConfig, kept: Kept, given: Mapping[str, Any]) -> DictConfig:
    """The configuration with the selection's encoder, entropy and resolution, and with all splits of the new corpus.

    Args:
        cfg: configuration of the command.
        kept: the opened selection.
        given: options of the command line by key.
    Raises:
        UserError: an option of the command line contradicts the selection.
    """
    result = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for name in ("encoder", "entropy"):
        own, requested = plain(cfg[name]), kept.inputs[name]
        if any(key == name or key.startswith(f"{name}.") for key in given) and own != requested:
            raise UserError(
                f"{name} differs from that of {kept.directory}, so images could not be compared: leave this option out"
            )
        result[name] = requested
        if own != requested:
            notice(f"{name} is taken from {kept.directory}: {requested.get('name', requested.get('_target_'))}")
    resolution, train = kept.corpus.resolution, result.corpus.train
    if "corpus.train.resolution" in given and int(cfg.corpus.train.resolution) != resolution:
        raise UserError(
            f"corpus.train.resolution={cfg.corpus.train.resolution}: the images of {kept.directory} have "
            f"{resolution} px: leave this option out"
        )
    if "resolution" in train:
        if int(cfg.corpus.train.resolution) != resolution:
            notice(f"images are read at {resolution} px, as in {kept.directory}")
        train.resolution = resolution
    if "split" in train and "corpus.train.split" not in given:
        train.split = "all"
    return result
