"""Training of the frozen autoencoder: an AutoencoderTiny, initialised as PCA of 8 x 8 patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus, index_corpus
from encoders.efficientnet import EfficientNetLite0
from encoders.pixels import to_tensor, to_uint8
from eval.measuring import compare, embed_rows, encoders_of, evaluation_sets
from eval.metrics import Quantity, compute
from runtime.application import run
from runtime.artefacts import file_digest, process_count, stage
from runtime.errors import UserError
from runtime.tracking import track
from train.adversarial import Critic, adversarial_losses
from train.channel_scale import channel_deviations, scale_channels
from train.components import REPOSITORY
from train.latents import (
    PATCH,
    PatchPCA,
    decode,
    encode,
    fit_pca,
    flip,
    scene_balanced_weights,
)
from train.loop import Batch, LoopOptions, Modules, train_loop
from train.shipped import forget_origin

#: Number of training images that determine the scales of the latent channels.
SCALE_IMAGES = 2000
#: Largest loss of PSNR against PCA, in dB, that a training with a critic may have: a critic improves texture at the
#: expense of pixel error.
MOST_PSNR_LOSS = 3.0


@torch.no_grad()
def start_from_pca(autoencoder: AutoencoderTiny, pca: PatchPCA) -> None:
    """Set the encoder to compute `pca.encode(x) / scaling_factor` exactly; spare channels stay random.

    Two strided 3 x 3 convolutions gather 2 x 2 pixels each. The third computes +v and -v of every component, and the
    last convolution subtracts their ReLUs. Pixels enter as [0, 1], so no ReLU clips them before. Requires four encoder
    stages, a block in the last one, and a width of at least max(48, 2 C).
    """
    layers = list(autoencoder.encoder.layers)
    components = pca.basis.shape[1]
    blocks = [layer for layer in layers if not isinstance(layer, nn.Conv2d)]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for block in blocks:  # identity on non-negative input
        nn.init.zeros_(block.conv[-1].weight)
        nn.init.zeros_(block.conv[-1].bias)
    first, second, third, fourth, last = convolutions
    first.weight[:3] = 0
    first.bias[:3] = 0
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    for convolution, channels in ((second, 3), (third, 12)):
        convolution.weight[: 4 * channels] = 0
        for channel in range(channels):
            for row in range(2):
                for column in range(2):
                    convolution.weight[4 * channel + 2 * row + column, channel, 1 + row, 1 + column] = 1
    # input channel of `fourth` = (colour, row bits 2^1, column bit 2^1, row bit 2^2 ...) as gathered above
    basis = pca.basis.unflatten(0, (3, PATCH, PATCH))
    fourth.weight[: 2 * components] = 0
    for colour in range(3):
        for row in range(PATCH):
            for column in range(PATCH):
                inner = 4 * colour + 2 * (row % 2) + column % 2
                middle = 4 * inner + 2 * (row // 2 % 2) + column // 2 % 2
                weights = basis[colour, row, column]
                fourth.weight[:components, middle, 1 + row // 4, 1 + column // 4] = weights
                fourth.weight[components : 2 * components, middle, 1 + row // 4, 1 + column // 4] = -weights
    # pixels are (x + 1) / 2 inside the network: v = 2 basis'(p - 1/2) - basis'mean
    gain = 2 / (pca.scale * autoencoder.config.scaling_factor)
    offset = pca.basis.T @ (pca.mean + 1)
    last.weight.zero_()
    for component in range(components):
        last.weight[component, component, 1, 1] = gain
        last.weight[component, components + component, 1, 1] = -gain
    last.bias.copy_(-offset * gain / 2)


@dataclass(frozen=True)
class Phase:
    """One phase of the autoencoder's training.

    Args:
        trains: "decoder" (the encoder is frozen) or "both".
        perceptual_weight: weight of the relative feature distance, which is added to the pixel loss.
        perceptual_fraction: fraction of each batch on which the perceptual loss is computed, because it is more
            expensive.
        loop: options of the training loop.
        adversarial_weight: weight of the critic's loss on textures (`train.adversarial`); 0: there is no critic.
        latent_noise: noise on the decoder's latents; its standard deviation is drawn for every image from 0 to this
            value, in units of the latents that the diffusion model sees.
    """

    trains: str
    perceptual_weight: float
    perceptual_fraction: float
    loop: LoopOptions
    adversarial_weight: float = 0.0
    latent_noise: float = 0.0


def train_phases(
    autoencoder: AutoencoderTiny,
    corpus: Corpus,
    accelerator: Accelerator,
    phases: Sequence[Phase],
    directory: Path,
    *,
    perceptual: EfficientNetLite0,
    label: str = "autoencoder",
    log: Callable[[dict[str, float], int], None] | None = None,
) -> AutoencoderTiny:
    """Train phase by phase on scene-balanced tiles of the training split.

    The pixel loss is the squared error plus a tenth of the absolute error; the perceptual loss is the relative L1
    distance of feature maps. Every phase starts from the averaged weights of the preceding phase.

    Args:
        directory: folder for `phase_<index>/` with checkpoints, from which an interrupted training continues.
    """
    weights = scene_balanced_weights(corpus)
    autoencoder = autoencoder.to(accelerator.device, memory_format=torch.channels_last)
    perceptual.network().to(accelerator.device)
    for index, phase in enumerate(phases):
        modules: dict[str, nn.Module] = {"decoder": autoencoder.decoder}
        if phase.trains == "both":
            modules = {"encoder": autoencoder.encoder, **modules}
        if phase.adversarial_weight:
            modules["critic"] = Critic().to(accelerator.device, memory_format=torch.channels_last)

        def draw(random: np.random.Generator, rows: slice, phase: Phase = phase) -> Batch:
            picked = random.choice(len(corpus), phase.loop.batch_size, p=weights)[rows]
            return (flip(to_tensor(corpus.images[picked]), random),)

        best = train_loop(
            accelerator,
            modules,
            draw,
            partial(_phase_loss, phase, autoencoder, perceptual, accelerator),
            phase.loop,
            directory / f"phase_{index}",
            label=f"{label}, phase {index + 1} of {len(phases)}",
            log=log,
        )
        for name, module in modules.items():
            module.load_state_dict(best[name].state_dict())
    perceptual.network().cpu()
    return autoencoder.cpu().to(memory_format=torch.contiguous_format).eval()


def _phase_loss(
    phase: Phase,
    autoencoder: AutoencoderTiny,
    perceptual: EfficientNetLite0,
    accelerator: Accelerator,
    modules: Modules,
    batch: Batch,
) -> torch.Tensor:
    """The loss of a phase on a batch of images: the sum of the pixel, feature and texture losses."""
    images = batch[0].contiguous(memory_format=torch.channels_last)
    with accelerator.autocast(), torch.set_grad_enabled("encoder" in modules):
        latents = modules.get("encoder", autoencoder.encoder)(images)
    if phase.latent_noise:
        deviation = phase.latent_noise / autoencoder.config.scaling_factor
        latents = latents + deviation * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(
            latents
        )
    with accelerator.autocast():
        output = modules["decoder"](latents).float()
    difference = output - images
    total = difference.square().mean() + 0.1 * difference.abs().mean()
    if phase.perceptual_weight:
        part = slice(max(1, round(phase.perceptual_fraction * len(images))))
        with accelerator.autocast():
            with torch.no_grad():
                requested = perceptual.feature_pyramid(images[part])
            result = perceptual.feature_pyramid(output[part])
        distances = [
            (a.float() - b.float()).abs().mean() / b.float().abs().mean()
            for a, b in zip(result, requested, strict=True)
        ]
        total = total + phase.perceptual_weight * sum(distances) / len(distances)
    if phase.adversarial_weight:
        with accelerator.autocast():
            of_decoder, of_critic = adversarial_losses(modules["critic"], images, output)
        total = total + phase.adversarial_weight * of_decoder + of_critic
    return total


def phases_of(configs: Sequence[DictConfig], seed: int) -> list[Phase]:
    """The phases of a recipe."""
    return [Phase(**{**phase, "loop": LoopOptions(**phase.loop, seed=seed)}) for phase in configs]


def build_autoencoder(cfg: DictConfig, corpus: Corpus, directory: Path) -> AutoencoderTiny:
    """Train by the recipe: from PCA or `start`, run the phases, scale the channels, run the decoder's own phases."""
    recipe, seed = cfg.autoencoder.recipe, int(cfg.seed)
    set_seed(seed)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    perceptual = instantiate(cfg.encoder)
    with track(cfg, "autoencoder", corpus.name) as tracker:
        train = partial(train_phases, corpus=corpus, accelerator=accelerator, perceptual=perceptual, log=tracker.log)
        if recipe.start is not None:
            trained = AutoencoderTiny.from_pretrained(recipe.start, use_safetensors=True)
        else:
            trained = AutoencoderTiny(
                encoder_block_out_channels=(recipe.width,) * 4,
                decoder_block_out_channels=(recipe.width,) * 4,
                latent_channels=recipe.latent_channels,
                num_encoder_blocks=tuple(recipe.encoder_blocks),
                num_decoder_blocks=tuple(recipe.decoder_blocks),
                scaling_factor=recipe.scaling_factor,
            )
            start_from_pca(trained, fit_pca(corpus, recipe.latent_channels, seed))
            trained = train(trained, phases=phases_of(recipe.phases, seed), directory=directory)
        if recipe.channel_scale is not None:
            scale_channels(trained, channel_deviations(trained, some_images(corpus, seed)), recipe.channel_scale)
        return train(
            trained,
            phases=phases_of(recipe.decoder_phases, seed),
            directory=directory / "decoder",
            label="autoencoder, decoder only",
        )


def main(cfg: DictConfig) -> None:
    """`make autoencoder`: train by the recipe, compare with PCA on the training split, write weights and model card."""
    if process_count() > 1:
        raise UserError("train/autoencoder.py runs in one process: start it without `accelerate launch`")
    recipe = cfg.autoencoder.recipe
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)

    def build(directory: Path) -> None:
        build_autoencoder(cfg, corpus, directory).save_pretrained(directory / "autoencoder")

    inputs = {"corpus": corpus.fingerprint, "recipe": recipe, "encoder": cfg.encoder, "seed": cfg.seed}
    if recipe.start is not None:
        inputs["start"] = file_digest(Path(recipe.start) / "diffusion_pytorch_model.safetensors")
    directory = stage(cfg.runs, "autoencoder", inputs, build, resumable=True)
    trained = AutoencoderTiny.from_pretrained(directory / "autoencoder", use_safetensors=True)
    trained.eval().requires_grad_(False)
    figures = measure(cfg, trained, corpus)
    for name, values in figures.items():
        print(name, {key: round(value, 3) for key, value in values.items()})
    ours, pca = figures["autoencoder"], figures["pca"]
    distance = Quantity("fd", encoders_of(cfg)[0].name).name
    textured = any(phase.get("adversarial_weight") for phase in [*recipe.phases, *recipe.decoder_phases])
    needed = pca["psnr"] - (MOST_PSNR_LOSS if textured else 0)
    if ours[distance] >= pca[distance] or ours["psnr"] <= needed:
        raise UserError(
            f"the autoencoder in {directory} is not better than PCA of the same latent size in Fréchet distance with a "
            f"PSNR above {needed:.1f} dB, so {cfg.autoencoder.path} is unchanged: train it longer (autoencoder.recipe)"
        )
    target = REPOSITORY / cfg.autoencoder.path
    trained.save_pretrained(target)
    forget_origin(target / "config.json")
    (target / "README.md").write_text(_card(cfg, figures, trained.config.scaling_factor), encoding="utf-8")
    print(f"run: {directory}")


def some_images(corpus: Corpus, seed: int) -> torch.Tensor:
    """Random readable images of a corpus, float32 [N, 3, R, R] in [-1, 1] with N <= `SCALE_IMAGES`."""
    rows = np.random.default_rng([seed, 6]).permutation(np.flatnonzero(corpus.readable))[:SCALE_IMAGES]
    return to_tensor(corpus.images[np.sort(rows)])


@torch.inference_mode()
def measure(cfg: DictConfig, autoencoder: AutoencoderTiny, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Metrics of reconstructions of the balanced held-out set, by the autoencoder and by PCA of its latent size."""
    encoders = encoders_of(cfg)
    held = evaluation_sets(cfg)["balanced"]
    pca = fit_pca(corpus, autoencoder.config.latent_channels, cfg.seed)
    rebuilt: dict[str, list[np.ndarray]] = {"autoencoder": [], "pca": []}
    for start in range(0, len(held.rows), 100):
        images = to_tensor(held.images[start : start + 100])
        rebuilt["autoencoder"].append(to_uint8(decode(autoencoder, encode(autoencoder, images))))
        rebuilt["pca"].append(to_uint8(pca.decode(pca.encode(images))))
    figures = {}
    for name, batches in rebuilt.items():
        images = np.concatenate(batches)
        figures[name] = compare({encoder.name: embed_rows(encoder, images) for encoder in encoders}, held)
        figures[name] |= compute({"images": images, "truth": held.images}, of={}, only=("psnr", "ssim"))
    return figures


def _card(cfg: DictConfig, figures: dict[str, dict[str, float]], scaling_factor: float) -> str:
    """The model card, with the figures of this run."""
    recipe = cfg.autoencoder.recipe
    judge = encoders_of(cfg)[0].name
    keys = ("psnr", Quantity("fd", judge).name, Quantity("kid_x1000", judge).name)
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{values[key]:.2f}" for key in keys) + " |" for name, values in figures.items()
    )
    phases = ", ".join(
        f"{phase.loop.steps} steps of {phase.trains}"
        + (" with a critic of textures" if phase.get("adversarial_weight") else "")
        for phase in [*recipe.phases, *recipe.decoder_phases]
    )
    return f"""---
library_name: diffusers
license: apache-2.0
---
# {Path(cfg.autoencoder.path).name}

The frozen autoencoder of the corpus {cfg.corpus.name}: `diffusers.AutoencoderTiny`, {cfg.corpus.train.resolution} px,
8-fold, {recipe.latent_channels} channels, `scaling_factor` {scaling_factor:g}.

- **Data**: the training split of {cfg.corpus.name}, scene-balanced; no held-out pixel. Its licence:
  {cfg.corpus.get("licence") or "not stated (corpus.licence)"}.
- **Start**: PCA of 8 x 8 patches in the encoder. **Then**, with a perceptual loss on EfficientNet-Lite0 (ImageNet
  weights, Apache-2.0): {phases}.
- **Regenerate**: `make autoencoder` (recipe in `configs/autoencoder/{Path(cfg.autoencoder.path).name}.yaml`).
- **Load**: `AutoencoderTiny.from_pretrained("{cfg.autoencoder.path}")`.
- **Limits**: other sensors, resolutions and cloud are outside what it has seen.

Reconstructions of {cfg.eval.images} scene-balanced held-out tiles:

| | {" | ".join(keys)} |
| --- | --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    run(main)
