"""Parts of a Stable Diffusion pipeline from a folder: only safetensors, and only code of diffusers.

`from_pretrained` of a pipeline would import the modules that its index names, and those of the other systems are not
installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPTextModel, CLIPTokenizer

from eval.models import INDEX, UNLOADABLE
from runtime.errors import UserError

#: Suffixes of files that can run code when they are read.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: Files that are downloaded from a hub repository.
WANTED = ("*.safetensors", "*.json", "*.txt")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
DOCS = "docs/comparison.md"
Loaded = TypeVar("Loaded")


def place_of(of: str) -> Path:
    """The path itself if it exists, else a local copy of safetensors and configs of a hub repository (`owner/name`).

    Raises:
        UserError: there is no such path or repository, or the hub cannot be reached.
    """
    path = Path(of).expanduser()
    if path.exists():
        return path
    if of.count("/") != 1 or of[0] in ".~/":
        raise UserError(f"of={of} does not exist: give the folder of the peer's weights ({DOCS})")
    try:
        return Path(snapshot_download(of, allow_patterns=list(WANTED)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"of={of} is not a folder, and it cannot be fetched as a hub name ({one_line(error)}): give the folder of "
            f"the peer's weights ({DOCS})"
        ) from error


def weights_of(folder: Path) -> Path:
    """The safetensors file in a part's folder.

    Raises:
        UserError: there is no such file, or there is a pickle instead.
    """
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    tensors = [path for path in files if path.suffix == ".safetensors"]
    if chosen := [path for path in tensors if path.name in WEIGHTS] or tensors:
        return chosen[0]
    for path in files:
        if path.suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, which can run code when it is read: convert it to safetensors once with the "
                f"script in {DOCS} (Weights)"
            )
    raise UserError(f"{folder} has no weights: a .safetensors file is needed ({DOCS})")


def check_parts(folder: Path, peer: str, classes: Sequence[str]) -> None:
    """Check that a folder holds a pipeline of one of these classes; the U-Net is not checked.

    Raises:
        UserError: it does not, or its autoencoder or text encoder has no weights in a supported format.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"of={folder} has no {INDEX}: give the folder of {peer}'s pipeline ({DOCS})")
    named = read(folder / INDEX).get("_class_name")
    kind = named[-1] if isinstance(named, list) and named else named
    if kind not in classes:
        raise UserError(f"of={folder} is a {kind}: peer={peer} reads a {' or a '.join(classes)}")
    for part in ("vae", "text_encoder"):
        weights_of(folder / part)


def network_config(folder: Path, peer: str, kind: str) -> dict[str, Any]:
    """Content of the config.json of a U-Net.

    Raises:
        UserError: the file or the weights do not exist, or the U-Net is of another class.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give the folder of {peer}'s pipeline ({DOCS})")
    config = read(folder / "config.json")
    if config.get("_class_name") != kind:
        raise UserError(f"{folder} is a {config.get('_class_name')}: peer={peer} reads a {kind}")
    weights_of(folder)
    return config


def plain_network(folder: Path) -> UNet2DConditionModel:
    """A U-Net of diffusers in float32, frozen.

    Raises:
        UserError: it cannot be loaded.
    """

    def load() -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )

    return loaded(folder, load).eval().requires_grad_(False)


def pipeline_of(
    kind: type[StableDiffusionPipeline], folder: Path, unet: UNet2DConditionModel, scheduler: str | None
) -> StableDiffusionPipeline:
    """A pipeline made from a U-Net and the other parts in a folder, on the accelerator, float32, no safety checker.

    Args:
        kind: class of the pipeline.
        folder: folder with the parts.
        unet: the U-Net.
        scheduler: name of a scheduler class of diffusers, which uses the settings of the folder's scheduler; None: the
            scheduler of the folder.
    Raises:
        UserError: a part cannot be loaded or is of another class.
    """

    def load() -> StableDiffusionPipeline:
        autoencoder = read(folder / "vae" / "config.json")["_class_name"]
        if autoencoder not in AUTOENCODERS:
            raise ValueError(f"{folder / 'vae'} is a {autoencoder}, no {' or '.join(AUTOENCODERS)}")
        settings = read(folder / "scheduler" / "scheduler_config.json")
        return kind(
            vae=getattr(diffusers, autoencoder).from_pretrained(
                folder / "vae", use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
            ),
            text_encoder=CLIPTextModel.from_pretrained(
                folder / "text_encoder", use_safetensors=True, local_files_only=True, dtype=torch.float32
            ),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            unet=unet,
            scheduler=getattr(diffusers, scheduler or settings["_class_name"]).from_config(settings),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    pipeline = loaded(folder, load)
    return pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


def loaded(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """Call a function that loads something from a folder, and convert its errors.

    Raises:
        UserError: a file is missing or broken.
    """
    try:
        return load()
    except UNLOADABLE as error:
        raise UserError(f"{folder} does not load: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The first line of an error's text, shortened."""
    return " ".join(str(error).split())[:200]


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file holds no JSON object.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} contains no JSON object")
    return result
