"""Versions of the code of all stages, which are part of the fingerprints of results, and the modules of each stage."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Hashes of all modules and of every stage's code at its current version, written by scripts/stage_sources.py.
SOURCES = Path(__file__).with_name("stage_sources.json")


@dataclass(frozen=True)
class Stage:
    """The code of a stage.

    Attributes:
        version: to be raised when the same inputs give another result than before.
        modules: the modules that compute the result; a folder stands for all modules in it.
        after: preceding stages, with results that are used without being in the inputs; their versions count as well.
    """

    version: int
    modules: tuple[str, ...]
    after: tuple[str, ...] = ()


_NETWORKS = (
    "train.components",
    "train.networks",
    "train.objective",
    "train.loop",
    "train.ema",
    "train.checkpoint",
    "train.processes",
)
STAGES = {
    "corpus": Stage(version=4, modules=("corpus",)),
    "entropy": Stage(version=1, modules=("prune.entropy", "prune.features")),
    "embedding": Stage(version=1, modules=("encoders", "prune.features")),
    "descriptions": Stage(version=1, modules=("captioning.describing", "captioning.captioners")),
    "pair_embeddings": Stage(
        version=1,
        modules=(
            "captioning.scoring",
            "captioning.scorers",
            "captioning.dual_encoder",
            "captioning.open_clip_networks",
            "captioning.pairs",
        ),
        after=("embedding",),
    ),
    "pair_scores": Stage(
        version=2, modules=("captioning.scoring", "captioning.pair_statistics", "captioning.evidence")
    ),
    "captions": Stage(version=2, modules=("captioning.loop",)),
    "selection": Stage(
        version=6,
        modules=(
            "prune.allocation",
            "prune.captioned",
            "prune.clusters",
            "prune.library",
            "prune.methods",
            "prune.neighbours",
            "prune.pool",
            "prune.ranks",
            "prune.scenes",
            "prune.selection",
            "prune.weights",
        ),
        after=("entropy", "embedding"),
    ),
    "arrival_index": Stage(
        version=2, modules=("prune.kept", "prune.neighbour_index", "prune.scenes"), after=("embedding",)
    ),
    "arrived": Stage(
        version=1,
        modules=(
            "prune.arrival_stages",
            "prune.arrivals",
            "prune.likeness",
            "prune.neighbour_index",
            "corpus.locations",
        ),
        after=("entropy", "embedding"),
    ),
    "arrivals": Stage(
        version=1, modules=("prune.arrival_stages", "prune.arrivals", "prune.likeness"), after=("arrived",)
    ),
    "page": Stage(
        version=1,
        modules=("prune.page_arrays", "prune.neighbours", "report.embedding_map"),
        after=("embedding",),
    ),
    "edited_selection": Stage(version=1, modules=("prune.decisions",), after=("entropy", "embedding")),
    "leaks": Stage(version=1, modules=("prune.leaks", "prune.likeness", "corpus.locations", "eval.waste")),
    "text_encoder": Stage(version=1, modules=("train.text_encoder", "train.captions", *_NETWORKS)),
    "prompts": Stage(version=1, modules=("train.text_encoder",)),
    "latents": Stage(version=1, modules=("train.latents",)),
    "autoencoder": Stage(
        version=1, modules=("train.autoencoder", "train.channel_scale", "train.latents", "encoders", *_NETWORKS)
    ),
    "pretrain": Stage(
        version=1,
        modules=(
            "train.foundation",
            "train.resume",
            "train.data",
            "train.captions",
            "train.latents",
            "train.metadata",
            *_NETWORKS,
        ),
        after=("latents", "prompts"),
    ),
    "held_out": Stage(version=1, modules=("eval.held_out", "encoders")),
    "generated": Stage(version=1, modules=("eval.generate", "eval.models", "eval.measuring", "eval.peers")),
    "measured": Stage(
        version=1,
        modules=(
            "eval.measuring",
            "eval.metrics",
            "eval.classification",
            "eval.distances",
            "eval.memorisation",
            "eval.pairs",
            "eval.restoration",
            "encoders",
        ),
        after=("held_out", "embedding"),
    ),
    "real_confusion": Stage(version=1, modules=("eval.measuring", "encoders.clip_scores")),
    "measure": Stage(version=1, modules=("eval.measuring_any",), after=("measured",)),
    "reference_rows": Stage(
        version=1, modules=("eval.reference_rows", "eval.subsets", "train.latents"), after=("measured",)
    ),
    "subset": Stage(
        version=2,
        modules=("eval.subset_quality", "eval.subsets", "eval.waste", "prune.measured_subset"),
        after=("embedding", "measured"),
    ),
    "condition_latents": Stage(
        version=2,
        modules=(
            "downstream.conditional",
            "downstream.degradation",
            "downstream.fine_tuning",
            "downstream.interpolation",
            "downstream.mask_condition",
            "downstream.tasks",
        ),
    ),
    "rebuilt_inputs": Stage(
        version=1, modules=("downstream.restoration", "downstream.interpolation", "downstream.tasks")
    ),
    "segmenter": Stage(version=1, modules=("downstream.segmenter",)),
    "downstream": Stage(
        version=2,
        modules=(
            "downstream.conditional",
            "downstream.controlnet",
            "downstream.degradation",
            "downstream.edges",
            "downstream.fine_tuning",
            "downstream.tasks",
            *_NETWORKS,
        ),
        after=("latents", "condition_latents"),
    ),
    "regression": Stage(
        version=1,
        modules=("downstream.regression", "downstream.degradation", "downstream.basicsr_parts", *_NETWORKS),
    ),
    "task_outputs": Stage(
        version=2,
        modules=(
            "downstream.consistency",
            "downstream.controlnet",
            "downstream.degradation",
            "downstream.edges",
            "downstream.interpolation",
            "downstream.measured_task",
            "downstream.restoration",
            "downstream.tasks",
            "eval.generate",
        ),
        after=("rebuilt_inputs",),
    ),
    "task_measured": Stage(
        version=2, modules=("downstream.edges", "downstream.measured_task"), after=("measured", "segmenter")
    ),
    "real_segmentation": Stage(version=1, modules=("downstream.measured_task",), after=("measured", "segmenter")),
    "augmentation_pool": Stage(version=1, modules=("downstream.augmentation", "eval.generate")),
    "augmentation_choice": Stage(version=1, modules=("downstream.augmentation",), after=("selection",)),
    "augmentation": Stage(version=1, modules=("downstream.augmentation", "downstream.segmenter")),
    "augmentation_measured": Stage(version=1, modules=("downstream.augmentation",), after=("measured",)),
    "damage": Stage(version=1, modules=("scripts.choose_encoder", "eval.damage", "encoders", "eval.distances")),
    "samples": Stage(version=1, modules=("scripts.sample", "train.sampler", "eval.generate")),
    "bench": Stage(version=1, modules=("scripts.bench_selection",)),
    "bench_jpegs": Stage(version=1, modules=("scripts.bench",)),
    "long_tail": Stage(version=2, modules=("scripts.long_tail",)),
}


def versions_of(name: str) -> dict[str, int]:
    """Versions of a stage and of all stages that precede it.

    Raises:
        LookupError: the table has no such stage.
    """
    if name not in STAGES:
        raise LookupError(f"stage {name!r} is not in runtime/versions.py: give it a version and its modules there")
    result = {name: STAGES[name].version}
    for before in STAGES[name].after:
        result |= versions_of(before)
    return result


def modules_of(name: str, root: Path = ROOT) -> dict[str, Path]:
    """Modules of a stage's code and their files.

    Raises:
        FileNotFoundError: the table names a module that does not exist.
    """
    result = {}
    for module in STAGES[name].modules:
        place = root.joinpath(*module.split("."))
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        result |= {".".join(path.relative_to(root).with_suffix("").parts): path for path in files}
    if missing := [str(path.relative_to(root)) for path in result.values() if not path.is_file()]:
        raise FileNotFoundError(f"stage {name} has no {missing[0]}: correct its modules in runtime/versions.py")
    return result


def code_hash(source: str) -> str:
    """12 hex digits that change with a module's code, but not with comments, docstrings or layout."""
    return _digest(_code(ast.parse(source)))


def _code(node: Any) -> Any:
    """A syntax tree as nested tuples, without empty fields, which differ between versions of Python."""
    if isinstance(node, list):
        return tuple(_code(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        fields["body"] = fields["body"][ast.get_docstring(node, clean=False) is not None :]
    result = ((name, _code(value)) for name, value in fields.items() if value not in (None, []))
    return (type(node).__name__, *result)


def sources(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The content of `SOURCES`: version and hash of every stage, as in "1 26af15daf3e9", and a hash of every module."""
    modules, stages = {}, {}
    for name, entry in STAGES.items():
        own = {
            module: modules.get(module) or code_hash(path.read_text(encoding="utf-8"))
            for module, path in modules_of(name, root).items()
        }
        modules |= own
        stages[name] = f"{entry.version} {_digest(sorted(own.items()))}"
    return {"stages": stages, "modules": dict(sorted(modules.items()))}


def outdated(stored: Mapping[str, Mapping[str, str]], root: Path = ROOT) -> list[str]:
    """One line for every stage with a code or version that differs from the stored one."""
    result, then = sources(root), "run `python scripts/stage_sources.py`"
    stages, modules = (
        [name for name in sorted({*stored[part], *result[part]}) if stored[part].get(name) != result[part].get(name)]
        for part in ("stages", "modules")
    )
    lines = []
    for name in stages:
        before, now = (part["stages"].get(name, "none").split()[0] for part in (stored, result))
        if before != now:
            lines.append(f"version of stage {name} is {now}, but {before} in {SOURCES.name}: {then}")
            continue
        files = [path.relative_to(root).as_posix() for key, path in modules_of(name, root).items() if key in modules]
        lines.append(
            f"code of stage {name} changed ({', '.join(files) or 'other modules'}): "
            f"raise its version in runtime/versions.py if existing results change, then {then}"
        )
    return lines


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
