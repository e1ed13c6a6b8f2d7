"""The frozen autoencoder: an AutoencoderTiny that starts as PCA of 8 x 8 patches and is trained from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from corpus.application import run
from corpus.artefacts import stage
from corpus.encoder import EfficientNetLite0
from corpus.index import Corpus, index_corpus
from corpus.tracking import track
from train.latents import PATCH, PatchPCA, flip, scene_balanced_weights, to_tensor
from train.loop import LoopOptions, train_loop


@torch.no_grad()
def start_from_pca(autoencoder: AutoencoderTiny, pca: PatchPCA) -> None:
    """Set the encoder to compute `pca.encode(x) / scaling_factor` exactly; spare channels stay random.

    Strided 3 x 3 convolutions gather 2 x 2 pixels each, twice; the third computes +v and -v of every component, whose
    ReLUs the last convolution subtracts. Pixels enter as [0, 1], so no ReLU cuts on the way.
    Needs four encoder stages, a last one with a block, and a width of at least max(48, 2 C).
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


def train_autoencoder(
    autoencoder: AutoencoderTiny,
    corpus: Corpus,
    accelerator: Accelerator,
    warm_start: LoopOptions,
    joint: LoopOptions,
    directory: Path,
    *,
    perceptual_weight: float,
    perceptual: EfficientNetLite0,
    pca_images: int = 4000,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> tuple[AutoencoderTiny, PatchPCA]:
    """Train in two phases on scene-balanced tiles of the training split.

    `warm_start`: the encoder is PCA and frozen, the decoder learns to invert it (squared and absolute error).
    `joint`: both learn, with a perceptual loss on the encoder's feature pyramid added.
    Returns the averaged weights and the PCA it has to beat.
    """
    weights = scene_balanced_weights(corpus)
    generator = np.random.default_rng([warm_start.seed, len(corpus)])
    sample = np.sort(generator.choice(len(corpus), pca_images, p=weights))
    pca = PatchPCA.fit(to_tensor(corpus.images[sample]), autoencoder.config.latent_channels)
    start_from_pca(autoencoder, pca)
    autoencoder = autoencoder.to(memory_format=torch.channels_last)

    def batch(random: np.random.Generator, rows: slice, size: int) -> torch.Tensor:
        picked = random.choice(len(corpus), size, p=weights)[rows]
        images = flip(to_tensor(corpus.images[picked]), random)
        return images.to(accelerator.device).contiguous(memory_format=torch.channels_last)

    def pixel_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        difference = output.float() - target
        return difference.square().mean() + 0.1 * difference.abs().mean()

    def warm_loss(modules: dict[str, nn.Module], random: np.random.Generator, rows: slice) -> torch.Tensor:
        images = batch(random, rows, warm_start.batch_size)
        with accelerator.autocast():
            latents = pca.encode(images) / autoencoder.config.scaling_factor
            output = modules["decoder"](latents.contiguous(memory_format=torch.channels_last))
        return pixel_loss(output, images)

    def joint_loss(modules: dict[str, nn.Module], random: np.random.Generator, rows: slice) -> torch.Tensor:
        images = batch(random, rows, joint.batch_size)
        with accelerator.autocast():
            output = modules["decoder"](modules["encoder"](images)).float()
            with torch.no_grad():
                wanted = perceptual.feature_pyramid(images)
            found = perceptual.feature_pyramid(output)
        distance = sum(
            (a.float() - b.float()).abs().mean() / b.float().abs().mean() for a, b in zip(found, wanted, strict=True)
        )
        return pixel_loss(output, images) + perceptual_weight * distance / len(wanted)

    decoder = train_loop(
        accelerator, {"decoder": autoencoder.decoder}, warm_loss, warm_start, directory / "warm_start",
        label="autoencoder, decoder", log=log,
    )["decoder"]  # fmt: skip
    autoencoder.decoder.load_state_dict(decoder.state_dict())
    modules = {"encoder": autoencoder.encoder, "decoder": autoencoder.decoder}
    best = train_loop(accelerator, modules, joint_loss, joint, directory / "joint", label="autoencoder, joint", log=log)
    for name, module in modules.items():
        module.load_state_dict(best[name].state_dict())
    return autoencoder.eval(), pca


def main(cfg: DictConfig) -> None:
    """`make autoencoder`: train by the recipe, check against PCA on the training split, write weights and card."""
    recipe = cfg.autoencoder.recipe
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    set_seed(int(cfg.seed))
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(recipe.width,) * 4,
        decoder_block_out_channels=(recipe.width,) * 4,
        latent_channels=recipe.latent_channels,
        num_encoder_blocks=tuple(recipe.encoder_blocks),
        num_decoder_blocks=tuple(recipe.decoder_blocks),
        scaling_factor=recipe.scaling_factor,
    )
    encoder = instantiate(cfg.encoder)

    def build(directory: Path) -> None:
        accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
        with track(cfg, "autoencoder", corpus.name) as tracker:
            trained, _ = train_autoencoder(
                autoencoder,
                corpus,
                accelerator,
                LoopOptions(**recipe.warm_start, seed=cfg.seed),
                LoopOptions(**recipe.joint, seed=cfg.seed),
                directory,
                perceptual_weight=recipe.perceptual_weight,
                perceptual=encoder,
                log=tracker.log,
            )
        trained.to(memory_format=torch.contiguous_format).save_pretrained(directory / "autoencoder")

    inputs = {"corpus": corpus.fingerprint, "recipe": recipe, "encoder": cfg.encoder, "seed": cfg.seed}
    directory = stage(cfg.runs, "autoencoder", inputs, build, resumable=True)
    print(f"run: {directory}")


if __name__ == "__main__":
    run(main)
