"""The data card of an exported subset: what was kept and why, licence, bias, leaks, and how to repeat the pruning.

The functions depend only on the tables and records of a selection. The same selection gives the same bytes, because the
card contains neither times nor paths of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from runtime.redaction import ACCESS, public

#: Name of the card in an export. It is not README.md, because `datasets` would read the beginning of it as settings.
DATA_CARD = "DATA_CARD.md"
#: Largest number of scenes with a separate row, the largest of the corpus first.
MOST_SCENES = 40
#: A scene counts as over- or under-represented beyond this factor.
EVEN = 1.1
#: Meanings of the reasons in selection.parquet.
REASONS = {
    "low_entropy": "lowest local information entropy of the corpus (the fraction `prune.entropy_quantile`)",
    "redundant": "similar images fill the budget",
    "not_drawn": "not selected in a random draw",
}
MEANINGS = {"kept": "in this subset", "unreadable": "could not be used; see Quarantine", **REASONS}
FORMS = {
    "folder": "image files in `images/`, with `images/metadata.jsonl`",
    "symlinks": "links to the corpus's files in `images/`, with `images/metadata.jsonl`",
    "webdataset": "tar shards `subset-*.tar` in the WebDataset format",
    "huggingface": "a Hugging Face data set for `datasets.load_from_disk`",
    "list": "the ids in `kept.txt`, and one row per image in `kept.jsonl`",
}


@dataclass(frozen=True)
class Record:
    """The records of a selection; except for the two tables, they may be empty for selections of earlier versions.

    Attributes:
        name: name of the corpus.
        scenes: str [N], labels of the corpus, "": unknown.
        selection: the N rows of selection.parquet.
        summary: the content of summary.json.
        stage: the content of stage.json: configuration, commit and versions.
        defaults: default values of the groups corpus, prune, entropy and encoder of `configs/`, by name.
        given_licence: licence of the data in the options of the export.
    """

    name: str
    scenes: np.ndarray
    selection: pd.DataFrame
    summary: Mapping[str, Any] = field(default_factory=dict)
    stage: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    given_licence: str | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.stage.get("config") or {}

    @property
    def licence(self) -> str | None:
        """The licence in the options of the export, else `corpus.licence` of the pruning run; None: not given."""
        return self.given_licence or (self.config.get("corpus") or {}).get("licence")


def data_card(record: Record, form: str) -> str:
    """The data card of a subset as Markdown.

    Args:
        record: the records of the selection.
        form: the form of the export, a key of `FORMS`.
    """
    kept, images = int(record.selection["kept"].sum()), len(record.selection)
    method = record.summary.get("method", "an unknown method")
    parts = [
        f"# Data card: {kept:,} of {images:,} images of {record.name}",
        f"A subset of the corpus `{record.name}`, chosen by the pruning method `{method}` of RS-Prune "
        f"({kept / max(images, 1):.1%} of the images kept). Form: {FORMS.get(form, form)}.",
        "## What was kept, and why",
        *_why(record),
        "## Bias",
        *_bias(record),
        "## Quarantine",
        _quarantine(record),
        "## Leaks between the splits",
        _leaks(record),
        "## Licence",
        record.licence or "Not given. Find out the licence before you publish, and give it with `export.licence=NAME`.",
        "## How to repeat it",
        *_repeat(record, form),
    ]
    return "\n\n".join(parts) + "\n"


def scene_balance(scenes: Sequence[str], kept: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """How often each scene occurs before and after pruning, the largest of the corpus first.

    Args:
        scenes: str [N].
        kept: bool [N].
        weight: float [N], weights of the kept images.
    Returns:
        a table with the columns scene, before, after (numbers of images), factor (the scene's fraction of the subset
        divided by its fraction of the corpus: 1 is proportional, 0 is lost) and weighted (the same factor for the
        weighted subset).
    """
    frame = pd.DataFrame(
        {"scene": np.asarray(scenes, dtype=object), "after": kept, "weight": np.where(kept, weight, 0)}
    )
    table = frame.groupby("scene", sort=True).agg(
        before=("after", "size"), after=("after", "sum"), weight=("weight", "sum")
    )
    fraction = table["before"] / table["before"].sum()
    table["factor"] = table["after"] / max(table["after"].sum(), 1) / fraction
    table["weighted"] = table["weight"] / max(float(table["weight"].sum()), 1e-12) / fraction
    table = table.reset_index().sort_values(["before", "scene"], ascending=[False, True], ignore_index=True)
    return table[["scene", "before", "after", "factor", "weighted"]]


def repeat_command(record: Record) -> str:
    """The command that prunes the same corpus again, with the options that differ from the defaults in `configs/`.

    Folders are written as `DIR`, because they differ between machines.
    """
    corpus = record.config.get("corpus") or {}
    kind = str((corpus.get("train") or {}).get("_target_", "")).split(".")[-2:-1]
    method, ratio = record.summary.get("method"), (record.stage.get("inputs") or {}).get("ratio", "RATIO")
    words = [f"corpus={kind[0] if kind else 'CORPUS'}", *_changed("corpus", corpus, record.defaults.get("corpus"))]
    words += _reference(record.config)
    words += [
        f"prune={method or 'METHOD'}",
        *_changed("prune", record.config.get("prune"), record.defaults.get("prune")),
    ]
    for group in ("entropy", "encoder"):
        words += _changed(group, record.config.get(group), record.defaults.get(group))
    words += [f"ratio={'null' if ratio is None else ratio}", f"seed={record.summary.get('seed', 'SEED')}"]
    return "python prune/run.py " + " ".join(words)


# ---------------------------------------------------------------- parts of the card


def _why(record: Record) -> Iterator[str]:
    summary, inputs = record.summary, record.stage.get("inputs") or {}
    metadata = {
        "method": summary.get("method", "unknown"),
        "ratio (fraction removed)": "set by the method" if inputs.get("ratio", 0) is None else summary.get("ratio"),
        "seed": summary.get("seed"),
        "scenes": _strata(record),
        "encoder": str((inputs.get("encoder") or {}).get("_target_", "unknown")).rpartition(".")[2],
        "entropy threshold (bits)": _threshold(record),
    }
    rows = [{"": name, "value": _text(value)} for name, value in metadata.items() if value is not None]
    yield _markdown(pd.DataFrame(rows))
    if "reason" not in record.selection:
        return
    counts = record.selection["reason"].value_counts()
    rows = [
        {"reason": name, "images": f"{count:,}", "meaning": MEANINGS.get(name, "see the documentation of the method")}
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    yield _markdown(pd.DataFrame(rows))


def _strata(record: Record) -> str | None:
    result, config = record.summary.get("strata"), record.config
    if not result:
        return None
    source, own = ((config.get(group) or {}).get(key) for group, key in (("reference", "source"), ("corpus", "train")))
    if result["source"] == "reference" and source is not None and source == own:
        return f"{result['count']} scene labels of the corpus itself"
    if result["source"] == "corpus":
        return f"{result['count']} strata by k-means on the corpus (no labels)"
    return f"{result['count']} classes of a labelled reference set"


def _threshold(record: Record) -> str | None:
    """The entropy below which images were removed, and the fraction that this is; None for methods without one."""
    threshold = record.summary.get("entropy_threshold")
    if threshold is None:
        return None
    fraction = (record.config.get("prune") or {}).get("entropy_quantile")
    return f"{threshold:.3f}" + (
        f": the lowest {fraction:.0%} are removed (`prune.entropy_quantile`)" if fraction else ""
    )


def _bias(record: Record) -> Iterator[str]:
    labelled = np.asarray(record.scenes, dtype=object)
    scenes, named = labelled, "the corpus's own scene labels"
    if not (labelled != "").any() and "scene" in record.selection:
        scenes, named = record.selection["scene"].fillna("").to_numpy(dtype=object), "the scenes that the method used"
    kept, weights = record.selection["kept"].to_numpy(dtype=bool), record.selection["weight"].to_numpy(dtype=float)
    readable = np.ones(len(kept), dtype=bool)
    if "reason" in record.selection:
        readable = (record.selection["reason"] != "unreadable").to_numpy()
    table = scene_balance(np.where(scenes == "", "(none)", scenes)[readable], kept[readable], weights[readable])
    yield (
        f"Readable images by {named}. `factor`: the scene's fraction of the subset, divided by its fraction of the "
        "corpus (2: twice as frequent as in the corpus). `weighted`: the same if each image counts `weight` times."
    )
    shown = table.head(MOST_SCENES)
    columns = {
        "scene": shown["scene"],
        "in the corpus": shown["before"].map("{:,}".format),
        "in the subset": shown["after"].map("{:,}".format),
        "factor": shown["factor"].map("{:.2f}".format),
        "weighted": shown["weighted"].map("{:.2f}".format),
    }
    if scenes is not labelled and (typical := _typical(record.selection)):
        columns["typical images"] = shown["scene"].map(typical).fillna("")
    yield _markdown(pd.DataFrame(columns))
    if len(table) > MOST_SCENES:
        yield f"{len(table) - MOST_SCENES:,} smaller scenes are not listed."
    yield _sentence(table)
    weights = weights[kept]
    yield (
        "Every image has a `weight`: the number of corpus images that it represents, including itself. Weights go up "
        f"to {weights.max(initial=0):,.0f}. Sample in proportion to `weight` to get the proportions of the corpus, "
        "uniformly to get those of this table. Sampled by weight, the subset estimates a mean as precisely as "
        f"{weights.sum() ** 2 / max((weights**2).sum(), 1e-12):,.0f} images of equal weight (effective size; Kish "
        "1965)."
    )


def _typical(selection: pd.DataFrame, count: int = 2) -> dict[str, str]:
    """The ids of the kept images that are most similar to their scene, by scene; empty where none is recorded."""
    if not {"id", "scene_similarity"} <= set(selection):
        return {}
    kept = selection[selection["kept"] & selection["scene_similarity"].notna()]
    kept = kept.sort_values(["scene_similarity", "id"], ascending=[False, True], kind="stable")
    first = kept.groupby("scene")["id"].apply(lambda ids: ", ".join(f"`{name}`" for name in ids.head(count)))
    return {str(scene): names for scene, names in first.items()}


def _sentence(table: pd.DataFrame) -> str:
    """Sentence about the scenes that are over-represented, under-represented or lost in the subset."""
    over = table[table["factor"] > EVEN].sort_values(["factor", "scene"], ascending=[False, True])
    under = table[(table["factor"] < 1 / EVEN) & (table["after"] > 0)].sort_values(["factor", "scene"])
    lost = table.loc[table["after"] == 0, "scene"].astype(str).tolist()

    def listed(rows: pd.DataFrame) -> str:
        names = [f"{row.scene} (× {row.factor:.2f})" for row in rows.head(5).itertuples()]
        return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")

    parts = [f"Over-represented: {listed(over)}."] if len(over) else []
    parts += [f"Under-represented: {listed(under)}."] if len(under) else []
    parts += [f"Not in the subset at all: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}."] if lost else []
    return " ".join(parts) or f"No scene is more or less frequent than in the corpus by a factor of {EVEN:g}."


def _quarantine(record: Record) -> str:
    reasons = record.summary.get("quarantined")
    if reasons is None:
        return "Not recorded."
    if not reasons:
        return "Every image of the corpus could be used."
    lines = [f"- {reason}: {count:,}" for reason, count in reasons.items()]
    return "\n".join([f"{sum(reasons.values()):,} images could not be used and are never kept.", "", *lines])


def _leaks(record: Record) -> str:
    result = record.summary.get("leaks")
    if not result:
        source = (record.config.get("corpus") or {}).get("train") or {}
        at_once = isinstance(source, Mapping) and source.get("split") == "all"
        why = "all splits were pruned at once (`corpus.train.split=all`)" if at_once else "`leaks=0` was given"
        return f"Not searched: {why}."
    lines = [f"- exact copies across splits: {result.get('exact_copies', 0):,}"]
    for name, counts in result.get("held_out", {}).items():
        lines.append(
            f"- `{name}`: {counts['near_duplicates']:,} near-duplicates of other splits among "
            f"{counts['looked_at']:,} compared images"
        )
    if result.get("val_test"):
        counts = result["val_test"]
        lines.append(
            f"- `val` and `test`: {counts['near_duplicates']:,} near-duplicates of each other among "
            f"{counts['looked_at']:,} compared images"
        )
    return "\n".join(lines)


def _repeat(record: Record, form: str) -> Iterator[str]:
    command = repeat_command(record)
    yield f"```sh\n{command}\npython scripts/export.py selection=DIR to={form}\n```"
    yield "`DIR`: a folder on your machine; in the second line, the folder that the first command prints."
    versions = record.summary.get("versions") or {}
    rows = [{"code": "RS-Prune, commit", "version": record.stage.get("commit", "unknown")}]
    rows += [{"code": "stage `selection`", "version": str(record.stage.get("version", "unknown"))}]
    rows += [{"code": name, "version": str(version)} for name, version in sorted(versions.items())]
    yield _markdown(pd.DataFrame(rows))


def _changed(group: str, own: Any, defaults: Any) -> list[str]:
    """Overrides for values that differ from a group's file; interpolated values follow from others and are left out."""
    if not own or not defaults:
        return []
    words = []
    for key, default in _leaves(defaults):
        result: Any = own
        for part in key.split("."):
            result = result.get(part) if isinstance(result, Mapping) else None
        derived = isinstance(default, str) and "${" in default
        if derived or result == default or set(key.split(".")) & {"_target_", *ACCESS}:
            continue
        words.append(_override(f"{group}.{key}", result))
    return words


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(key: str, value: Any) -> str:
    """`key=value`, quoted for Hydra and the shell."""
    folder = key.rpartition(".")[2] in ("root", "masks", "path", "class_names") and isinstance(value, str)
    if folder and (PurePath(value).is_absolute() or key.endswith(".root")):
        return f"{key}=DIR"
    text = _hydra(value)
    return (
        f"{key}={text}"
        if all(character.isalnum() or character in "._-/:" for character in text)
        else ("'" + f"{key}={text}".replace("'", "'\\''") + "'")
    )


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra(key)}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_hydra, value)) + "]"
    text = public(str(value))
    plain_text = text and all(character.isalnum() or character in "._-/:" for character in text)
    return text if plain_text or not isinstance(value, str) else '"' + text.replace('"', '\\"') + '"'


def _reference(config: Mapping[str, Any]) -> list[str]:
    """The option that names the labelled reference set; none if it is the corpus itself, which is the default."""
    if "reference" not in config:
        return []
    source = (config["reference"] or {}).get("source")
    if source is None:
        return ["reference=none"]
    if source == (config.get("corpus") or {}).get("train"):
        return []
    name = source.get("name")
    if name and "hub" in source:
        return [f"reference={name}"]
    return ["reference=folder", "reference.root=DIR"]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(table: pd.DataFrame) -> str:
    """A table of texts in GitHub's Markdown."""
    escaped = table.map(lambda text: str(text).replace("|", "\\|").replace("\n", " "))
    return escaped.to_markdown(index=False, tablefmt="pipe", disable_numparse=True)
