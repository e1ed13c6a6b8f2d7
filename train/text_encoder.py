"""A small CLIP trained on the tiles and captions of the corpus, with CLIP's original byte-pair vocabulary."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from corpus.index import Corpus
from encoders.clip_scores import tokenize
from encoders.pixels import to_tensor
from runtime.artefacts import stage
from runtime.notices import notice
from runtime.progress import progress
from train.captions import Captions
from train.latents import flip, scene_balanced_weights
from train.loop import Batch, LoopOptions, Modules, train_loop

PROMPT_BATCH = 256


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer (49,408 byte-pair tokens) from the vocabulary that `open_clip_torch` ships."""
    packed = resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    with packed.open("rb") as handle, gzip.open(handle, "rt", encoding="utf-8") as lines:
        merges = lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in merges]
    tokens = [*byte_tokens(), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def byte_tokens() -> list[str]:
    """CLIP's first 512 tokens: every byte inside a word and at its end."""
    alphabet = list(_byte_alphabet().values())
    return [*alphabet, *(letter + "</w>" for letter in alphabet)]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable substitutes for the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def small_clip(resolution: int, *, width: int, layers: int, patch: int, max_length: int, seed: int) -> CLIPModel:
    """A randomly initialised CLIPModel for images of `resolution` px and captions of `max_length` tokens."""
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "projection_dim": width,
    }
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": 49408,
            "max_position_embeddings": max_length,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
        vision_config={**shared, "image_size": resolution, "patch_size": patch},
        projection_dim=width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(config)


@torch.no_grad()
def encode_prompts(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Last hidden states float32 [N, L, D] of captions, as StableDiffusionPipeline computes them."""
    device = next(text_encoder.parameters()).device
    batches = tokenize(tokenizer, captions).split(256)
    return torch.cat([text_encoder(batch.to(device))[0].float().cpu() for batch in batches])


def cached_prompts(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    key: str,
    texts: list[str],
    runs: Path | str,
    *,
    half: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of texts, encoded once, memory-mapped.

    Args:
        key: fingerprint of the text encoder.
        half: store float16 instead of float32.
    Returns:
        [T, L, D], and the number of tokens before the padding, int64 [T].
    """

    def build(directory: Path) -> None:
        array = None
        for start in progress(range(0, len(texts), PROMPT_BATCH), "encode captions", unit="batch"):
            states = encode_prompts(text_encoder, tokenizer, texts[start : start + PROMPT_BATCH]).numpy()
            if array is None:
                dtype = np.float16 if half else np.float32
                shape = (len(texts), *states.shape[1:])
                array = np.lib.format.open_memmap(directory / "prompts.npy", mode="w+", dtype=dtype, shape=shape)
            array[start : start + len(states)] = states
        array.flush()
        np.save(directory / "lengths.npy", caption_lengths(tokenizer, texts))

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    directory = stage(runs, "prompts", {"text_encoder": key, "texts": digest, "half": half}, build)
    lengths = np.load(directory / "lengths.npy")
    tell_cut(tokenizer, texts, lengths)
    return np.load(directory / "prompts.npy", mmap_mode="r"), lengths


def caption_lengths(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Number of tokens of each text without padding, including start and end tokens, int64 [T]."""
    encoded = tokenizer(texts, max_length=tokenizer.model_max_length, truncation=True).input_ids
    return np.array([len(ids) for ids in encoded], dtype=np.int64)


def tell_cut(tokenizer: CLIPTokenizer, texts: Sequence[str], lengths: np.ndarray) -> int:
    """Print on stderr how many texts exceed the encoder's length and are truncated; returns the number.

    Args:
        lengths: from `caption_lengths`.
    """
    full = [texts[at] for at in np.flatnonzero(lengths >= tokenizer.model_max_length)]
    whole = tokenizer(full, truncation=False, verbose=False).input_ids if full else []
    cut = sum(len(ids) > tokenizer.model_max_length for ids in whole)
    if cut:
        notice(
            f"{cut} of {sum(map(bool, texts))} different captions are longer than the {tokenizer.model_max_length} "
            "tokens of the text encoder, and are truncated: to train a text encoder for longer captions, raise "
            "text_encoder.max_length"
        )
    return cut


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy; every image with the same caption counts as a positive.

    Args:
        images, texts: unit embeddings [B, D].
        same: bool [B, B], whether caption i equals caption j.
        scale: inverse temperature.
    """
    logits = scale * images @ texts.T
    targets = same.float() / same.float().sum(1, keepdim=True)
    by_image = nn.functional.cross_entropy(logits, targets)
    by_text = nn.functional.cross_entropy(logits.T, targets)
    return (by_image + by_text) / 2


def train_clip(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    corpus: Corpus,
    accelerator: Accelerator,
    options: LoopOptions,
    directory: Path,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> CLIPModel:
    """Train on scene-balanced tiles of the training split and all their captions; returns the averaged weights."""
    captions = Captions.of(corpus.manifest)
    tokens = tokenize(tokenizer, captions.texts)
    tell_cut(tokenizer, captions.texts, caption_lengths(tokenizer, captions.texts))
    weights = scene_balanced_weights(corpus)

    def draw(random: np.random.Generator, rows: slice) -> Batch:
        picked = random.choice(len(corpus), options.batch_size, p=weights)
        codes = captions.pick(picked, random)
        return flip(to_tensor(corpus.images[picked[rows]]), random), torch.from_numpy(codes[rows])

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        pixels, code = batch
        # one forward pass per distinct caption, because a batch holds few distinct ones
        distinct, position = torch.unique(code, return_inverse=True)
        output = modules["clip"](input_ids=tokens[distinct.cpu()].to(accelerator.device), pixel_values=pixels)
        texts = output.text_embeds[position]
        same = code[:, None] == code[None]
        scale = modules["clip"].logit_scale.exp().clamp(max=100)
        with torch.autocast(accelerator.device.type, enabled=False):  # half precision would round the scaled cosines
            return contrastive_loss(output.image_embeds.float(), texts.float(), same, scale)

    best = train_loop(accelerator, {"clip": model}, draw, loss, options, directory, label="text encoder", log=log)
    return best["clip"]
