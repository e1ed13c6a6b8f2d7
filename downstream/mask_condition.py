"""Masks as conditions: class fractions per latent cell, and an autoencoder with an encoder that reads them from a
picture.

For every latent cell the network receives the fraction of pixels of each class. A pixel without a class counts for no
class. So an unknown mask is all zeros, which is also the unconditional input of the pipeline's guidance.

A StableDiffusionInstructPix2PixPipeline encodes its condition with its autoencoder, and uses the autoencoder's encoder
for nothing else. So the saved pipeline holds a copy of the autoencoder with another encoder of the same class,
AutoencoderTiny, with weights set by hand: it maps a picture of the mask in the colours of a palette to class fractions.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from corpus.masks import IGNORED
from runtime.errors import UserError

#: Number of directions that are tried to find the one that separates the colours best.
DIRECTIONS = 4000


def class_codes(classes: int, channels: int) -> np.ndarray:
    """The contribution of each class to the channels of a condition, float32 [K, C].

    If there are enough channels, channel k is the fraction of class k. Otherwise the codes are unit vectors in random
    directions; for up to a few dozen classes no two of them are similar.
    """
    if classes <= channels:
        return np.eye(classes, channels, dtype=np.float32)
    codes = np.random.default_rng(0).standard_normal((classes, channels))
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


def class_fractions(masks: np.ndarray, codes: np.ndarray, cell: int) -> np.ndarray:
    """The mean of the codes of each cell's pixels, float32 [N, C, H / cell, W / cell].

    Args:
        masks: uint8 [N, H, W]; `IGNORED` means no class and adds nothing.
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
    """The autoencoder with an encoder that maps pictures in the palette's colours to `class_fractions`.

    The decoder is unchanged. The first layers of the encoder project the colour of a pixel to an axis on which all
    colours differ, and apply a piecewise linear function: at a class's colour its value is the class's code, at the
    colour of unknown pixels it is zero. The strided convolutions then compute means.

    Args:
        palette: uint8 [K + 1, 3], all different; the last colour is that of pixels without a class.
        codes: float32 [K, C].
    Raises:
        UserError: the autoencoder is not an AutoencoderTiny.
    """
    if not isinstance(autoencoder, AutoencoderTiny):
        raise UserError(
            f"masks cannot be read by an autoencoder of class {type(autoencoder).__name__}: give an AutoencoderTiny "
            "(autoencoder=bluemarble_f8c16 or corpus_f8c16), or downstream.semantic_synthesis.network=controlnet"
        )
    stages = len(autoencoder.config.encoder_block_out_channels)
    width = len(palette) + 4  # one hinge per colour, one more below them, and the colour itself
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
    """Set the weights of conv, block, strided convs and conv of an EncoderTiny; see `mask_autoencoder`."""
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
    # the block's first convolution: hinges, and the unchanged colour
    block.conv[0].weight[:hinges, colour, 1, 1] = torch.from_numpy(direction).float()
    block.conv[0].bias[:hinges] = torch.from_numpy(-knots).float()
    block.conv[0].weight[colour, colour, 1, 1] = torch.eye(3)
    # the second: one hat function per class, a sum of hinges; and the colour again
    hats = torch.from_numpy(_hats(knots)).float()  # [colours in order, hinges]
    classes = len(codes)
    for position, number in enumerate(order):
        if number < classes:
            block.conv[2].weight[number, :hinges, 1, 1] = hats[position]
    block.conv[2].weight[colour, colour, 1, 1] = torch.eye(3)
    # the third: the hats pass, and the colour of the skip connection is subtracted
    block.conv[4].weight[:classes, :classes, 1, 1] = torch.eye(classes)
    block.conv[4].weight[colour, colour, 1, 1] = -torch.eye(3)
    for layer in strided:  # of stride 2 with a padding of 1: rows 1 and 2 of the kernel cover the cell
        layer.weight[range(classes), range(classes), 1:, 1:] = 0.25
    last.weight[:, :classes, 1, 1] = torch.from_numpy(codes.T).float()


def _axis(palette: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find an axis in the colour cube [0, 1]^3 on which all colours of the palette have different positions.

    Returns:
        the unit vector of the axis, float64 [3]; the knots on it, float64 [K + 2], ascending: one below all colours,
        then the position of each colour; and the number of the colour at each knot except the first, int64 [K + 1].
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

    Row i holds the coefficients of relu(x - knot j). From the last knot on a hat is constant.
    """
    values = np.maximum(knots[1:, None] - knots[None], 0)  # of every hinge at every knot except the first
    requested = np.eye(len(knots) - 1)
    return np.linalg.lstsq(values, requested, rcond=None)[0].T
