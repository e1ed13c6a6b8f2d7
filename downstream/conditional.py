"""Image-conditioned latent diffusion: the network and the pipeline that all tasks share.

The U-Net receives the latents of the condition picture concatenated to the noisy ones (Brooks et al. 2023,
InstructPix2Pix, section 3.2), and is saved as a StableDiffusionInstructPix2PixPipeline. That pipeline passes the
autoencoder's raw latents, not multiplied by `scaling_factor`. Training passes latents of unit scale, so that Adam's
step size suits all inputs. When the pipeline is saved, the factor is folded into the weights of the first convolution,
which leaves the function unchanged. A task with its own encoder for conditions (masks) has unit scale already.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from corpus.index import Corpus
from encoders.pixels import to_tensor
from eval.models import UNLOADABLE
from prune.selection import method_name
from runtime.artefacts import plain, read_json
from runtime.errors import UserError
from runtime.progress import progress
from train.components import load_autoencoder, load_text_parts
from train.foundation import pretrain
from train.networks import new_unet
from train.objective import prediction_of
from train.shipped import foundation_path

#: Name of the network in the pipeline, and of its folder.
NETWORK = "unet"
#: Method name of a run without a foundation.
SCRATCH = "scratch"


@dataclass(frozen=True)
class Parts:
    """The parts of a foundation model; `unet` and `foundation` are None for a network without a foundation."""

    unet: UNet2DConditionModel | None
    autoencoder: nn.Module
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    foundation: Path | None = None


def resolve_foundation(cfg: DictConfig) -> tuple[Path | None, str]:
    """The run that `foundation` names.

    null pretrains a model, `scratch` means no foundation, and `shipped` is the model that comes with the repository.

    Returns:
        the directory of the run (None for `scratch`), and the name of its pruning method (`scratch` for `scratch`).
    Raises:
        UserError: the folder is not a pretraining run.
    """
    if cfg.foundation is None:
        name = method_name()
        return pretrain(cfg, name), name
    if str(cfg.foundation) == SCRATCH:
        return None, SCRATCH
    directory = foundation_path(cfg.foundation)
    _pipeline_folder(directory)
    summary = directory / "summary.json"
    return directory, read_json(summary)["method"] if summary.is_file() else directory.resolve().name


def _pipeline_folder(directory: Path) -> Path:
    """The text-to-image pipeline of a pretraining run, or the folder itself if it is such a pipeline."""
    for folder in (directory / "pipeline", directory):
        index = folder / "model_index.json"
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
        if kind == "StableDiffusionPipeline":
            return folder
        if kind is not None:
            raise UserError(
                f"foundation={directory} is no pretraining run of a U-Net, but a {kind}: "
                "give a run of model=ldm_tiny, ldm_small or ldm_base"
            )
    raise UserError(
        f"foundation={directory} is no pretraining run: give the directory that `python train/pretrain.py` prints "
        "(run: DIR), foundation=null to pretrain one now, or foundation=scratch to start from random weights"
    )


def load_parts(cfg: DictConfig, foundation: Path | None, corpus: Corpus) -> Parts:
    """Load all networks of a foundation run; without a foundation, the configured frozen networks.

    Raises:
        UserError: the folder is not a pretraining run, or its pipeline does not load.
    """
    if foundation is None:
        autoencoder, _ = load_autoencoder(cfg)
        text = load_text_parts(cfg, corpus)
        return Parts(None, autoencoder, text.text_encoder, text.tokenizer)
    folder = _pipeline_folder(foundation)
    try:
        # local files only: otherwise diffusers asks the hub for missing parts
        pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"foundation={foundation} does not load: {reason}") from error
    learned = prediction_of(pipeline.scheduler)
    if learned != cfg.train.objective.prediction:
        raise UserError(
            f"foundation={foundation} predicts {learned}, train.objective.prediction={cfg.train.objective.prediction} "
            f"asks for another: give train.objective.prediction={learned}"
        )
    for part in (pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    return Parts(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, foundation)


def weights_digest(module: nn.Module) -> str:
    """A hash of all weights, 16 hex digits; it does not depend on the file that they were loaded from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def widen(unet: UNet2DConditionModel, condition_channels: int) -> UNet2DConditionModel:
    """The same network with further input channels of weight zero, so they have no effect before training."""
    with torch.random.fork_rng():
        wide = UNet2DConditionModel.from_config(unet.config, in_channels=unet.config.in_channels + condition_channels)
    state = unet.state_dict()
    known = state["conv_in.weight"]
    added = known.new_zeros(len(known), condition_channels, *known.shape[2:])
    state["conv_in.weight"] = torch.cat([known, added], dim=1)
    wide.load_state_dict(state)
    return wide


def conditioned_network(
    cfg: DictConfig, parts: Parts, latent_shape: tuple[int, int, int], text_width: int
) -> UNet2DConditionModel:
    """The foundation's network with twice the input channels, for the condition; without a foundation a new network.

    Raises:
        UserError: the side of the foundation's latents differs from `latent_shape`.
    """
    channels, size, _ = latent_shape
    if parts.unet is None:
        return new_unet(plain(cfg.model.unet), channels, size, text_width, cfg.seed, channels)
    if (learned := parts.unet.config.sample_size) != size:
        raise UserError(
            f"foundation={parts.foundation} was trained on latents of side {learned}, "
            f"those of this corpus have {size}: give the foundation's corpus.train.resolution"
        )
    return widen(parts.unet, channels)


@torch.no_grad()
def for_raw_condition(unet: UNet2DConditionModel, scaling_factor: float) -> UNet2DConditionModel:
    """A copy of a network that takes raw latents of the condition, where the given network takes unit-scale ones.

    Args:
        scaling_factor: factor from raw latents to unit scale.
    """
    unet = copy.deepcopy(unet)
    unet.conv_in.weight[:, unet.config.out_channels :] *= scaling_factor
    return unet


def condition_reader(
    autoencoder: nn.Module, encoder: Callable[[nn.Module], nn.Module] | None
) -> tuple[nn.Module, float]:
    """The autoencoder that encodes condition pictures, and the factor from its raw latents to unit scale.

    Args:
        encoder: `Task.encoder`.
    """
    if encoder is None:
        return autoencoder, float(autoencoder.config.scaling_factor)
    return encoder(autoencoder), 1.0


@torch.no_grad()
def encode_condition(autoencoder: nn.Module, pictures: np.ndarray) -> torch.Tensor:
    """Raw latents float32 [N, C, h, w] of uint8 [N, H, W, 3], as in the pipeline: the mode, unscaled."""
    device = next(autoencoder.parameters()).device
    parts = []
    for start in progress(range(0, len(pictures), 128), "encode conditions", unit="batch"):
        output = autoencoder.encode(to_tensor(pictures[start : start + 128]).to(device))
        raw = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        parts.append(raw.float().cpu())
    return torch.cat(parts)


def conditional_pipeline(
    parts: Parts,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    encoder: Callable[[nn.Module], nn.Module] | None = None,
) -> StableDiffusionInstructPix2PixPipeline:
    """Assemble the parts and a network into a pipeline that loads with plain diffusers.

    Call it with `image=` (PIL, or [0, 1] arrays) and guidance_scale=1; larger values also guide by the image.

    Args:
        unet: network that was trained on conditions of unit scale.
        encoder: `Task.encoder`; the pipeline's autoencoder then encodes conditions only, and decodes as before.
    """
    autoencoder, scale = condition_reader(parts.autoencoder, encoder)
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=for_raw_condition(unet, scale),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
