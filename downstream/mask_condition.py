"""Masks as conditions: class fractions per latent cell, and an autoencoder whose encoder reads them from a picture.

The network is given, for every latent cell, the fraction of its pixels that each class has. A pixel without a class
counts for none, so that an unknown mask is all zeros, which is also what the pipeline guides away from.

A StableDiffusionInstructPix2PixPipeline encodes its condition with its autoencoder and uses that encoder for nothing
else. So the saved pipeline holds a copy of the autoencoder with another encoder of the same class, AutoencoderTiny,
whose weights are set by hand: it takes the mask as a picture in the colours of a palette and gives the class fractions.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from corpus.masks import IGNORED
from runtime.errors import UserError

#: Directions that are tried for the one that tells colours best apart.
DIRECTIONS = 4000


def class_codes(classes: int, channels: int) -> np.ndarray:
    """What each class adds to the channels of a condition, float32 [K, C].

    One channel a class where there are enough, so that channel k is the fraction of class k. Otherwise unit vectors in
    random directions, of which no two of up to some dozens are alike.
    """
    if classes <= channels:
        return np.eye(classes, channels, dtype=np.float32)
    codes = np.random.default_rng(0).standard_normal((classes, channels))
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def class_fractions(masks: np.ndarray, codes: np.ndarray, cell: int) -> np.ndarray:
    """The mean of the codes of each cell's pixels, float32 [N, C, H / cell, W / cell].

    Args:
        masks: uint8 [N, H, W]; `IGNORED` has no class and adds nothing.
        codes: float32 [K, C].
        cell: side of a latent cell in pixels.
    """
    count, height, width = masks.shape
    table = np.zeros((256, codes.shape[1]), np.float32)
    table[: len(codes)] = codes
    table[IGNORED] = 0
    rows = masks.reshape(count, height // cell, cell, width // cell, cell)
    fractions = np.empty((count, height // cell, width // cell, codes.shape[1]), np.float32)
    for start in range(0, count, 256):
        part = slice(start, start + 256)
        fractions[part] = table[rows[part]].mean(axis=(2, 4))
    return np.ascontiguousarray(fractions.transpose(0, 3, 1, 2))


def mask_autoencoder(autoencoder: nn.Module, palette: np.ndarray, codes: np.ndarray) -> nn.Module:
    """The autoencoder with an encoder that turns pictures in the palette's colours into `class_fractions`.

    Its decoder is the given one's. The first layers project a pixel's colour on one axis, on which all colours differ,
    and interpolate between them: a piecewise linear function of the axis that is a class's code at its colour and zero
    at the unknown one's. The strided convolutions then take means.

    Args:
        palette: uint8 [K + 1, 3], all different; the last colour is that of pixels without a class.
        codes: float32 [K, C].
    Raises:
        UserError: the autoencoder is no AutoencoderTiny.
    """
    if not isinstance(autoencoder, AutoencoderTiny):
        raise UserError(
            f"masks cannot enter through a {type(autoencoder).__name__}: give an AutoencoderTiny "
            "(autoencoder=bluemarble_f8c16 or corpus_f8c16), or downstream.semantic_synthesis.network=controlnet"
        )
    stages = len(autoencoder.config.encoder_block_out_channels)
    width = len(palette) + 4  # a hinge a colour, one more below them, and the colour itself
    config = {
        **{key: value for key, value in autoencoder.config.items() if key != "block_out_channels"},
        "encoder_block_out_channels": (width,) * stages,
        "num_encoder_blocks": (1, *(0,) * (stages - 1)),
    }
    with torch.random.fork_rng():
        made = AutoencoderTiny.from_config(config)
    made.decoder = autoencoder.decoder
    _set_weights(made.encoder.layers, palette, codes)
    made.to(next(autoencoder.parameters()).device)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def _set_weights(layers: nn.Sequential, palette: np.ndarray, codes: np.ndarray) -> None:
    """Weights of conv, block, strided convs and conv of an EncoderTiny, as `mask_autoencoder` says."""
    first, block, *strided, last = layers
    for layer in (first, *block.conv, *strided, last):
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    direction, knots, order = _axis(palette)
    hinges = len(knots)  # hinge j is relu(position - knot j); knot 0 lies below all colours
    colour = slice(hinges, hinges + 3)
    first.weight[colour, :, 1, 1] = torch.eye(3)
    # the block's first convolution: hinges, and the colour as it is
    block.conv[0].weight[:hinges, colour, 1, 1] = torch.from_numpy(direction).float()
    block.conv[0].bias[:hinges] = torch.from_numpy(-knots).float()
    block.conv[0].weight[colour, colour, 1, 1] = torch.eye(3)
    # its second: one hat a class, made of hinges; the colour again
    hats = torch.from_numpy(_hats(knots)).float()  # [colours in their order, hinges]
    classes = len(codes)
    for position, number in enumerate(order):
        if number < classes:
            block.conv[2].weight[number, :hinges, 1, 1] = hats[position]
    block.conv[2].weight[colour, colour, 1, 1] = torch.eye(3)
    # its third: the hats pass, the colour is taken from the skip connection
    block.conv[4].weight[:classes, :classes, 1, 1] = torch.eye(classes)
    block.conv[4].weight[colour, colour, 1, 1] = -torch.eye(3)
    for layer in strided:  # of stride 2 with a padding of 1: rows 1 and 2 of the kernel cover the cell
        layer.weight[range(classes), range(classes), 1:, 1:] = 0.25
    last.weight[:, :classes, 1, 1] = torch.from_numpy(codes.T).float()


def _axis(palette: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A unit vector on which all colours of [0, 1]^3 lie apart, the knots of a function on it, and their colours.

    Returns:
        float64 [3]; float64 [K + 2], ascending: one below all colours, then the colours'; int64 [K + 1], the colour of
        each knot but the first.
    Raises:
        UserError: two colours are the same.
    """
    colours = palette.astype(np.float64) / 255
    candidates = np.random.default_rng(0).standard_normal((DIRECTIONS, 3))
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    positions = np.sort(candidates @ colours.T, axis=1)
    gaps = np.diff(positions, axis=1).min(axis=1)
    best = candidates[int(gaps.argmax())]
    if gaps.max() < 1e-4:
        raise UserError("two classes of the palette have the same colour: raise colour_distance")
    order = np.argsort(colours @ best)
    knots = (colours @ best)[order]
    return best, np.concatenate([[knots[0] - 1], knots]), order


def _hats(knots: np.ndarray) -> np.ndarray:
    """Hat functions as sums of hinges, float64 [K + 1, K + 2]: hat i is 1 at knot i + 1 and 0 at all other knots.

    Row i holds the coefficients of relu(x - knot j). At and above its last knot a hat stays constant.
    """
    values = np.maximum(knots[1:, None] - knots[None], 0)  # of every hinge at every knot but the first
    requested = np.eye(len(knots) - 1)
    return np.linalg.lstsq(values, requested, rcond=None)[0].T
