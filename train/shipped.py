"""The models that come with the repository: reduced copies of finished runs, and their folders."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from runtime.artefacts import read_json, write_json
from runtime.errors import UserError
from train.components import REPOSITORY
from train.metadata import FOLDER as METADATA
from train.text_encoder import byte_tokens

#: Value of the option `foundation` that selects the shipped model.
SHIPPED = "shipped"
WEIGHTS = REPOSITORY / "train" / "weights"
FOUNDATION = "foundation"
FOLDER = WEIGHTS / f"bluemarble_{FOUNDATION}"
#: Keys of a run's summary that a shipped model keeps.
SUMMARY = (
    "task", "method", "ratio", "images", "training_images", "parameters", "seed", "images_seen", "seconds", "steps",
    "split", "metrics",
)  # fmt: skip


def shipped_folder(name: str) -> Path:
    """The folder of the shipped foundation, or of the network of a task; it may not exist."""
    return WEIGHTS / f"bluemarble_{name}"


def foundation_path(foundation: object) -> Path:
    """The folder that an option `foundation` names: a run, a pipeline, or the shipped model.

    Raises:
        UserError: the shipped model is requested, but this copy of the repository has none.
    """
    if str(foundation) != SHIPPED:
        return Path(str(foundation)).expanduser()
    if not (FOLDER / "model_index.json").is_file():
        raise UserError(
            f"foundation={SHIPPED}: {FOLDER} does not exist: train it with `make foundation`, or give foundation=DIR"
        )
    return FOLDER


def merges_of(pieces: Iterable[str], ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding (Sennrich et al. 2016, section 3.2) applies to pieces of text.

    With only these merges the same pieces give the same tokens, because the first pair by rank is the same in every
    step.

    Args:
        pieces: as the tokenizer splits them, in its byte alphabet.
        ranks: rank of every merge; the lowest is applied first.
    """
    applied = set()
    for piece in set(pieces):
        parts = [*piece[:-1], piece[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                break
            applied.add(pair)
            parts = list(_merged(parts, pair))
    return applied


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> Iterator[str]:
    """The parts with every occurrence of the pair joined, from the left."""
    at = 0
    while at < len(parts):
        together = tuple(parts[at : at + 2]) == pair
        yield "".join(parts[at : at + 2]) if together else parts[at]
        at += 2 if together else 1


def trimmed(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> tuple[CLIPTokenizer, np.ndarray]:
    """Reduce a tokenizer to the tokens that these texts need and the tokens of all bytes.

    These texts keep their tokens; other words are split into smaller ones.

    Returns:
        The tokenizer, and the former number of each token, int64 [tokens].
    """
    backend = tokenizer.backend_tokenizer
    pieces = {
        piece
        for text in set(texts)
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    }
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer_merges(tokenizer))}
    merges = sorted(merges_of(pieces, ranks), key=ranks.__getitem__)
    tokens = [*byte_tokens(), *("".join(pair) for pair in merges), tokenizer.bos_token, tokenizer.eos_token]
    former = np.array(tokenizer.convert_tokens_to_ids(tokens), dtype=np.int64)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokenizer.model_max_length), former


def tokenizer_merges(tokenizer: CLIPTokenizer) -> list[list[str]]:
    """The merges of a tokenizer in the order of their ranks."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def with_tokens(text_encoder: CLIPTextModel, former: np.ndarray) -> CLIPTextModel:
    """A copy of a text encoder with only some tokens, renumbered; the last two begin and end a text.

    Args:
        former: int64 [tokens], the former number of each token.
    """
    small = copy.deepcopy(text_encoder)
    weight = small.get_input_embeddings().weight.detach()[torch.from_numpy(former)]
    small.set_input_embeddings(nn.Embedding(*weight.shape, _weight=weight))
    last = len(former) - 1
    small.config.update({"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last})
    return small


def ship(run: Path, target: Path, texts: Iterable[str], card: str) -> None:
    """Write a finished run's pipeline in float16, with the vocabulary of `texts`, the card and facts about the
    training.

    Args:
        texts: the captions that the model was trained on.
        card: Markdown.
    """
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", use_safetensors=True, local_files_only=True)
    pipeline.tokenizer, former = trimmed(pipeline.tokenizer, texts)
    pipeline.text_encoder = with_tokens(pipeline.text_encoder, former)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(target, safe_serialization=True)
    for path in (target / "model_index.json", target / "unet" / "config.json", target / "vae" / "config.json"):
        forget_origin(path)
    config = target / "text_encoder" / "config.json"
    # transformers loads weights in the dtype of the config; the pipeline computes in float32 by default
    write_json(config, {**read_json(config), "dtype": "float32"})
    (target / "README.md").write_text(card, encoding="utf-8")
    summary = read_json(run / "summary.json")
    write_json(target / "summary.json", {key: summary[key] for key in SUMMARY if key in summary})
    if (metadata := run / "pipeline" / METADATA).is_dir():
        shutil.copytree(metadata, target / METADATA)


def forget_origin(config: Path) -> None:
    """Remove the path from which the network was loaded from a config; it is a path of the machine that wrote it."""
    write_json(config, {key: value for key, value in read_json(config).items() if key != "_name_or_path"})


def size_of(folder: Path) -> int:
    """Total size of a folder's files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def training_captions(corpus_captions: Sequence[str], cfg: DictConfig) -> list[str]:
    """The texts that a shipped model must tokenize as in training: all captions, and words for prompts."""
    return [*corpus_captions, "", *cfg.shipped.words]
