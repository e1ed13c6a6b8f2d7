"""Image-text-to-text networks of `transformers`, from the hub or a folder: BLIP, BLIP-2, Qwen2.5-VL, LLaVA."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from captioning.captioners.captioner import ImageMetadata, Undescribed, scene_words
from encoders.embedding import device
from encoders.pixels import LOAD_ERRORS
from runtime.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
NO_TEXT = Undescribed("the captioner wrote no text")


@dataclass(frozen=True)
class ImageTextToText:
    """Captions by any network that `AutoModelForImageTextToText` knows.

    A network with a chat template receives a message with the image and the prompt. A network without one, such as
    BLIP, continues the prompt as a prefix, or starts without a prefix if the prompt is "". The prompt is not part of
    the caption.

    Images with the same prompt are described together, without padding. The noise of an image depends on its seed only,
    so the other images in a batch change a text only if rounding in a larger matrix product decides a near tie.

    Args:
        name: the source of its captions.
        path: hub name (`owner/name`) or folder, with safetensors weights and the processor's files.
        revision: commit on the hub; None: the newest. A folder has no revision.
        prompts: one prompt for each attempt. `{scene}` is replaced by the scene's words; a sentence with it is left out
            if the scene is unknown.
        temperatures: temperature of each attempt; 0: always take the most probable token. After the last attempt, the
            attempts that sample are repeated in turn.
        top_p: sample from the most probable tokens with this total probability (Holtzman et al. 2020); 1: all tokens.
        max_new_tokens: largest number of tokens of a caption; a sentence that is cut off there is left out unless it is
            the only one.
        batch_size: images per call.
        dtype: key of `DTYPES`; auto: the type in which the weights are stored.
        side: smaller images are enlarged (bicubic) so that their longer side has this number of pixels, before the
            preprocessing of the network; 0: never.
    Raises:
        UserError: options contradict each other; on first use, the network cannot be loaded.
    """

    name: str
    path: str
    revision: str | None = None
    prompts: Sequence[str] = ("",)
    temperatures: Sequence[float] = (0.0,)
    top_p: float = 0.9
    max_new_tokens: int = 60
    batch_size: int = 8
    dtype: str = "auto"
    side: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(str(prompt) for prompt in self.prompts))
        object.__setattr__(self, "temperatures", tuple(float(value) for value in self.temperatures))
        if not self.prompts or len(self.prompts) != len(self.temperatures):
            raise UserError(
                f"captioner.prompts has {len(self.prompts)} entries, captioner.temperatures {len(self.temperatures)}: "
                "give one of each for every attempt"
            )
        if min(self.temperatures) < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise UserError(
                f"captioner.temperatures={list(self.temperatures)}, top_p={self.top_p} and max_new_tokens="
                f"{self.max_new_tokens}: give temperatures from 0, top_p in (0, 1] and at least one token"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"captioner.dtype={self.dtype}: choose one of {', '.join(DTYPES)}")

    @property
    def attempts(self) -> int:
        return len(self.prompts)

    def __call__(
        self, images: np.ndarray, metadata: Sequence[ImageMetadata], attempt: int, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        plan = self.plan(attempt)
        requested = [prompt(self.prompts[plan], known.scene) for known in metadata]
        texts: list[str | Undescribed] = [NO_TEXT] * len(requested)
        for question in dict.fromkeys(requested):
            rows = [row for row, other in enumerate(requested) if other == question]
            noise = [int(np.random.SeedSequence((attempt, seeds[row])).generate_state(1, np.uint64)[0]) for row in rows]
            result = self._describe(images[rows], question, self.temperatures[plan], noise)
            for row, text in zip(rows, result, strict=True):
                texts[row] = text
        return texts

    def plan(self, attempt: int) -> int:
        """Index of the prompt and temperature of an attempt; after the last one, an index of those that sample."""
        if attempt < self.attempts:
            return attempt
        again = [at for at, value in enumerate(self.temperatures) if value > 0] or list(range(self.attempts))
        return again[(attempt - self.attempts) % len(again)]

    @torch.inference_mode()
    def _describe(
        self, images: np.ndarray, question: str, temperature: float, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        processor, model = _loaded(self.path, self.revision, self.dtype)
        inputs = _inputs(processor, [enlarged(image, self.side) for image in images], question)
        given = inputs.get("input_ids")
        steps = LogitsProcessorList()
        if temperature > 0:
            steps = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(self.top_p)])
            steps.append(SeededNoise(seeds))
        written = model.generate(
            **inputs.to(model.device, dtype=model.dtype),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            logits_processor=steps,
        ).cpu()
        tokenizer = processor.tokenizer
        special = torch.tensor(tokenizer.all_special_ids)
        result = []
        for row in without_prompt(written, given):
            cut_off = len(row) >= self.max_new_tokens and not torch.isin(row[-1], special)
            row = row[row < len(tokenizer)]  # BLIP's decoder starts with an id that its tokenizer lacks
            result.append(caption(tokenizer.decode(row, skip_special_tokens=True), question, cut_off=bool(cut_off)))
        return result


class SeededNoise(LogitsProcessor):
    """Adds Gumbel noise to logits, so that the largest value of each row is a sample (Maddison et al. 2014).

    Each row has a separate generator on the CPU, so the samples depend neither on other rows nor on the device.

    Args:
        seeds: seed of each row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits, float [B, V], with noise, as float32."""
        width = scores.shape[1]
        drawn = torch.stack([torch.empty(width).exponential_(generator=one) for one in self.generators])
        return scores.float() - drawn.log().to(scores.device)


@lru_cache(maxsize=1)
def _loaded(path: str, revision: str | None, dtype: str) -> tuple[ProcessorMixin, PreTrainedModel]:
    place = os.path.expanduser(path)
    try:
        options = {"revision": revision, "trust_remote_code": False}  # otherwise it would prompt on the terminal
        config = AutoConfig.from_pretrained(place, **options)  # the first call that fails if the hub cannot be reached
        processor = AutoProcessor.from_pretrained(place, **options)
        model = AutoModelForImageTextToText.from_pretrained(
            place, config=config, dtype=dtype, use_safetensors=True, **options
        )
        if not hasattr(processor, "tokenizer"):
            raise ValueError("a processor without a tokenizer")
    except (*LOAD_ERRORS, ImportError) as error:
        commit = f" (captioner.revision={revision})" if revision else ""
        raise UserError(
            f"no image-text-to-text network at captioner.path={path}{commit}: give a hub name that can be reached, "
            "with a revision of its own or null, or a folder with config.json, model.safetensors and the files of its "
            "processor, or choose captioner=offline, which needs no network weights"
        ) from error
    return processor, model.eval().requires_grad_(False).to(device())


def _inputs(processor: ProcessorMixin, images: list[Image.Image], question: str) -> BatchFeature:
    """Input of the network: the images, all with the same question or prefix."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template is None:
        return processor(images=images, text=[question] * len(images) if question else None, return_tensors="pt")
    requested = [{"type": "text", "text": question}] if question else []
    talks = [[{"role": "user", "content": [{"type": "image", "image": image}, *requested]}] for image in images]
    return processor.apply_chat_template(
        talks,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def prompt(pattern: str, scene: str) -> str:
    """A prompt with the scene's words for `{scene}`; sentences with it are left out if the scene is unknown."""
    if known := scene_words(scene):
        return pattern.replace("{scene}", known)
    parts = re.split(r"(?<=[.!?])\s+", pattern)
    return " ".join(part for part in parts if "{scene}" not in part)


def enlarged(image: np.ndarray, side: int) -> Image.Image:
    """A uint8 image [H, W, 3], enlarged if necessary so that its longer side is at least `side` pixels."""
    picture = Image.fromarray(image)
    if max(picture.size) >= side:
        return picture
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)


def without_prompt(written: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Token ids [B, T] without the prompt [B, P] at their beginning; the first token is not compared.

    Some networks repeat the whole prompt and some nothing. BLIP repeats all but the last token, with another first
    token, which it writes into the prompt as well.
    """
    if given is None:
        return written
    for length in (given.shape[1], given.shape[1] - 1):
        if written.shape[1] >= length > 1 and torch.equal(written[:, 1:length], given[:, 1:length].cpu()):
            return written[:, length:]
    return written


def caption(text: str, question: str, *, cut_off: bool = False) -> str | Undescribed:
    """Convert the output of a network to a caption: single spaces, no prompt, no quotes, only complete sentences."""
    text, question = " ".join(text.split()), " ".join(question.split())
    text = "".join(letter for letter in text if letter.isprintable() and letter != "\ufffd")
    if question and text.casefold().startswith(question.casefold()):
        text = text[len(question) :]
    text = text.strip(" \"'“”‘’`*").lstrip(" .,:;-–—").rstrip(" ,:;-–—")
    if cut_off and (whole := re.match(r".*[.!?](?=\s)", text)):
        text = whole[0]
    return text if re.search(r"[^\W\d_]", text) else NO_TEXT
