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

    One with a chat template is given a question: a message with the image and the prompt. One without, as BLIP, goes on
    from the prompt as a prefix, or starts from nothing where it is "". Neither is part of the caption.

    Images of one prompt are described together, and nothing is padded. An image's seed alone draws its noise, so that
    its neighbours in a batch change a text only where rounding in a larger matrix product tips a near tie.

    Args:
        name: the source of its captions.
        path: of the hub (`owner/name`) or a folder; weights as safetensors, with the processor's files.
        revision: commit of the hub; None: the newest. A folder has none.
        prompts: one for each attempt. `{scene}` stands for the scene's words; a sentence with it is left out where the
            scene is unknown.
        temperatures: of each attempt; 0: the likeliest token each time. After the last attempt those that sample are
            taken again in turn.
        top_p: the likeliest tokens of this total probability are sampled from (Holtzman et al. 2020); 1: all.
        max_new_tokens: of a caption; a sentence that is cut off there is left out unless it is the only one.
        batch_size: images a call.
        dtype: of `DTYPES`; auto: as the weights are stored.
        side: pixels to which the longer side of a smaller image is enlarged (bicubic) before the network's own
            preprocessing; 0: never.
    Raises:
        UserError: options that do not fit together; on first use, a network that cannot be loaded.
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
        """Position of an attempt's prompt and temperature: its own, or beyond the last one of those that sample."""
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
    """Adds Gumbel noise to logits, so that the largest of each row is a sample of it (Maddison et al. 2014).

    Each row has a generator of its own on the CPU: what is drawn depends neither on the other rows nor on the device.

    Args:
        seeds: of the rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """float [B, V] with noise, float32."""
        width = scores.shape[1]
        drawn = torch.stack([torch.empty(width).exponential_(generator=one) for one in self.generators])
        return scores.float() - drawn.log().to(scores.device)


@lru_cache(maxsize=1)
def _loaded(path: str, revision: str | None, dtype: str) -> tuple[ProcessorMixin, PreTrainedModel]:
    place = os.path.expanduser(path)
    try:
        options = {"revision": revision, "trust_remote_code": False}  # else it would ask on the terminal
        config = AutoConfig.from_pretrained(place, **options)  # without the hub, the first to give up
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
            "processor, or choose captioner=offline, which needs none"
        ) from error
    return processor, model.eval().requires_grad_(False).to(device())


def _inputs(processor: ProcessorMixin, images: list[Image.Image], question: str) -> BatchFeature:
    """What the network takes: the images, each with the same question or prefix."""
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
    """A prompt with the scene's words for `{scene}`; sentences with it are left out where the scene is unknown."""
    if known := scene_words(scene):
        return pattern.replace("{scene}", known)
    parts = re.split(r"(?<=[.!?])\s+", pattern)
    return " ".join(part for part in parts if "{scene}" not in part)


def enlarged(image: np.ndarray, side: int) -> Image.Image:
    """A uint8 image [H, W, 3] whose longer side is `side` pixels at least."""
    picture = Image.fromarray(image)
    if max(picture.size) >= side:
        return picture
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)


def without_prompt(written: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Token ids [B, T] without those of the prompt [B, P] that they begin with; the very first is not compared.

    Networks repeat all of the prompt, or none, or (BLIP) all but its last token with another first one, which it writes
    into the prompt as well.
    """
    if given is None:
        return written
    for length in (given.shape[1], given.shape[1] - 1):
        if written.shape[1] >= length > 1 and torch.equal(written[:, 1:length], given[:, 1:length].cpu()):
            return written[:, length:]
    return written


def caption(text: str, question: str, *, cut_off: bool = False) -> str | Undescribed:
    """What a network wrote, as a caption: single spaces, no prompt or quotes around it, whole sentences if cut off."""
    text, question = " ".join(text.split()), " ".join(question.split())
    text = "".join(letter for letter in text if letter.isprintable() and letter != "\ufffd")
    if question and text.casefold().startswith(question.casefold()):
        text = text[len(question) :]
    text = text.strip(" \"'“”‘’`*").lstrip(" .,:;-–—").rstrip(" ,:;-–—")
    if cut_off and (whole := re.match(r".*[.!?](?=\s)", text)):
        text = whole[0]
    return text if re.search(r"[^\W\d_]", text) else NO_TEXT
