"""Degradation of a high-resolution image to a low-resolution one: `area`, `bicubic`, or the random chain `blind`.

`blind` is the second-order model of Wang et al. 2021 (Real-ESRGAN, section 3 and figure 2): blur, resizing, noise and
JPEG, the same a second time, and a sinc filter before or after the last JPEG. Kernels and their probabilities are that
paper's, as implemented in basicsr; resizing by OpenCV and Poisson noise follow Zhang et al. 2021 (BSRGAN, sections 3.2
and 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch.nn.functional import interpolate

from runtime.artefacts import plain
from runtime.errors import UserError

LinearKind = Literal["area", "bicubic"]
Range = tuple[float, float]

#: Kinds of blur kernels and their probabilities (Real-ESRGAN, section 3.2 and its training options).
KERNELS = {
    "gaussian": 0.45,
    "gaussian_anisotropic": 0.25,
    "generalized": 0.12,
    "generalized_anisotropic": 0.03,
    "plateau": 0.12,
    "plateau_anisotropic": 0.03,
}
#: Shape parameter of the generalized Gaussian and of the plateau kernels (Real-ESRGAN, section 4.1).
SHAPES: dict[str, Range] = {"generalized": (0.5, 4.0), "plateau": (1.0, 2.0)}
RESIZINGS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
#: Second part of a generator's seed; the third part is the number of the image.
STREAM = 40


@dataclass(frozen=True)
class Linear:
    """A fixed linear reduction.

    Attributes:
        kind: `area`, means of factor x factor pixels, or `bicubic`, antialiased like PIL's.
    Raises:
        ValueError: there is no such kind.
    """

    kind: LinearKind = "area"

    def __post_init__(self) -> None:
        if self.kind not in get_args(LinearKind):
            raise ValueError(f"{self.kind} is no linear reduction")


@dataclass(frozen=True)
class Round:
    """Options of one of the two rounds of blur, resizing, noise and JPEG.

    A range is a pair of its smallest and largest value; numbers are drawn uniformly from it, except for `photons`.

    Attributes:
        blur_chance: probability of a blur.
        sides: range of the sides of blur kernels in pixels; odd.
        sigma: range of the sigma of blur kernels in pixels.
        enlarge_chance, reduce_chance: probability of resizing by a scale above or below 1; otherwise the side is kept.
        scale: range of the scale of the resizing, from below 1 to above 1.
        noise: range of the standard deviation of Gaussian noise in grey levels.
        photons: range of the number of photons of Poisson noise at a value of 255; its logarithm is drawn uniformly.
        jpeg: range of the JPEG quality.
    """

    blur_chance: float
    sides: tuple[int, int]
    sigma: Range
    enlarge_chance: float
    reduce_chance: float
    scale: Range
    noise: Range
    photons: Range
    jpeg: tuple[int, int]


@dataclass(frozen=True)
class Blind:
    """The random chain.

    Attributes:
        seed: seed of all random numbers.
        first, second: the two rounds. The resizing of the second round is relative to the low resolution.
        sinc_chance: probability of a sinc kernel in place of a blur kernel.
        last_sinc_chance: probability of a sinc filter at the low resolution.
        cutoff: range of the cutoff frequency of sinc kernels, in units of pi, the highest frequency that pixels can
            represent.
        last_sides: range of the side of the last sinc kernel in pixels; odd.
        gaussian_chance: probability of Gaussian noise; otherwise Poisson noise.
        grey_chance: probability of noise that is the same in all channels.
    """

    seed: int
    first: Round
    second: Round
    sinc_chance: float
    last_sinc_chance: float
    cutoff: Range
    last_sides: tuple[int, int]
    gaussian_chance: float
    grey_chance: float

    @property
    def kind(self) -> str:
        return "blind"


Degradation = Linear | Blind


def degradation_of(cfg: DictConfig) -> Degradation:
    """The degradation that `downstream.super_resolution.degradation` names.

    Raises:
        UserError: there is no degradation of that name, or a range or a probability is invalid.
    """
    settings = cfg.downstream.super_resolution
    if settings.degradation in get_args(LinearKind):
        return Linear(settings.degradation)
    if settings.degradation != "blind":
        raise UserError(
            f"downstream.super_resolution.degradation={settings.degradation} is unknown: give area, bicubic or blind"
        )
    options = plain(settings.blind)
    rounds = {name: Round(**_checked(f"blind.{name}", options.pop(name))) for name in ("first", "second")}
    return Blind(**rounds, **_checked("blind", options))


def _checked(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options with ranges as tuples; UserError for probabilities outside 0..1 and for invalid ranges."""
    result = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in result.items():
        if name.endswith("chance"):
            right, requested = 0 <= value <= 1, "a number from 0 to 1"
        elif name.endswith("sides"):
            right, requested = (
                _is_range(value) and value[0] % 2 == value[1] % 2 == 1,
                "two odd numbers, the smaller one first",
            )
        else:
            right, requested = name == "seed" or _is_range(value), "two positive numbers, the smaller one first"
        if not right:
            raise UserError(f"downstream.super_resolution.{where}.{name}={options[name]}: give {requested}")
    return result


def _is_range(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and 0 < value[0] <= value[1]


def degrade(
    images: np.ndarray, factor: int, degradation: Degradation | None = None, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Low-resolution images, uint8 [N, H, W, 3] to [N, H/factor, W/factor, 3].

    Args:
        degradation: the degradation; None: area means.
        numbers: non-negative number of each image; None: 0 to N - 1. The result of `blind` for an image depends only on
            its pixels, its number and the seed.
    Raises:
        UserError: the sides are not multiples of the factor.
    """
    degradation = degradation or Linear()
    height, width = _low_sides(images, factor)
    if degradation == Linear("area"):
        return low_resolution(images, factor)
    numbers = range(len(images)) if numbers is None else numbers
    low = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for index, (image, number) in enumerate(zip(images, numbers, strict=True)):
        if isinstance(degradation, Blind):
            generator = np.random.default_rng([degradation.seed, STREAM, int(number)])
            low[index] = _blind(image, (height, width), degradation, generator)
        else:
            low[index] = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return low


def low_resolution(images: np.ndarray, factor: int) -> np.ndarray:
    """Area means, uint8 [N, H, W, 3] to [N, H/factor, W/factor, 3], rounded half up.

    Raises:
        UserError: the sides are not multiples of the factor.
    """
    height, width = _low_sides(images, factor)
    blocks = images.reshape(len(images), height, factor, width, factor, images.shape[3])
    area = factor**2
    return ((blocks.sum(axis=(2, 4), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def reduce(images: np.ndarray, factor: int, kind: LinearKind) -> np.ndarray:
    """The result of `degrade` before rounding, float32 [N, H, W, 3] in 0..255 to [N, H/factor, W/factor, 3].

    Like PIL, bicubic reduces rows first and then columns, and clips overshoots of 0..255 after each. PIL also rounds
    after each, so its result may differ by 1 from this result rounded.

    Raises:
        UserError: the sides are not multiples of the factor.
    """
    height, width = _low_sides(images, factor)
    if kind == "area":
        return images.reshape(len(images), height, factor, width, factor, images.shape[3]).mean(
            (2, 4), dtype=np.float32
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).permute(0, 3, 1, 2)
    for size in ((pixels.shape[2], width), (height, width)):
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def add_noise(low: np.ndarray, deviation: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to uint8 [N, h, w, 3]; the result is rounded and clipped.

    Args:
        deviation: float [N], standard deviation for each image, in grey levels.
    """
    noise = generator.standard_normal(low.shape, dtype=np.float32)
    return _to_uint8(low + np.asarray(deviation, dtype=np.float32)[:, None, None, None] * noise)


def check_factor(factor: int, *sides: int) -> None:
    """Refuse (UserError) a factor that does not divide the sides of images."""
    if factor < 1 or any(side % factor for side in sides):
        raise UserError(
            f"downstream.super_resolution.factor={factor} does not divide {' x '.join(map(str, sides))} px: "
            "give a divisor"
        )


def _low_sides(images: np.ndarray, factor: int) -> tuple[int, int]:
    check_factor(factor, *images.shape[1:3])
    return images.shape[1] // factor, images.shape[2] // factor


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- the random chain, on float32 [H, W, 3] in 0..255


def _blind(image: np.ndarray, low: tuple[int, int], blind: Blind, generator: np.random.Generator) -> np.ndarray:
    """Reduce one uint8 image to the sides `low`."""
    first, second = blind.first, blind.second
    pixels = _blurred(image.astype(np.float32), first, blind, generator)
    pixels = _resized(pixels, _random_sides(image.shape[:2], first, generator), generator)
    pixels = _jpeg(_noisy(pixels, first, blind, generator), first, generator)
    pixels = _blurred(pixels, second, blind, generator)
    pixels = _resized(pixels, _random_sides(low, second, generator), generator)
    pixels = _noisy(pixels, second, blind, generator)

    if generator.random() < 0.5:
        return _to_uint8(_jpeg(_to_low(pixels, low, blind, generator), second, generator))
    return _to_uint8(_to_low(_jpeg(pixels, second, generator), low, blind, generator))


def _to_low(pixels: np.ndarray, low: tuple[int, int], blind: Blind, generator: np.random.Generator) -> np.ndarray:
    pixels = _resized(pixels, low, generator)
    if generator.random() >= blind.last_sinc_chance:
        return pixels
    return _filtered(pixels, _sinc_kernel(blind, blind.last_sides, generator))


def _blurred(pixels: np.ndarray, ranges: Round, blind: Blind, generator: np.random.Generator) -> np.ndarray:
    if generator.random() >= ranges.blur_chance:
        return pixels
    if generator.random() < blind.sinc_chance:
        return _filtered(pixels, _sinc_kernel(blind, ranges.sides, generator))
    return _filtered(pixels, _blur_kernel(ranges, generator))


def _filtered(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(pixels, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101).clip(0, 255)


def _random_side(sides: tuple[int, int], generator: np.random.Generator) -> int:
    return 2 * int(generator.integers(sides[0] // 2, sides[1] // 2, endpoint=True)) + 1


def _blur_kernel(ranges: Round, generator: np.random.Generator) -> np.ndarray:
    """A random kernel of one of the six kinds of `KERNELS`; its sum is 1."""
    from downstream.basicsr_parts import bivariate_Gaussian, bivariate_generalized_Gaussian, bivariate_plateau

    name = str(generator.choice(list(KERNELS), p=list(KERNELS.values())))
    family, isotropic = name.removesuffix("_anisotropic"), not name.endswith("_anisotropic")
    side, sigmas = _random_side(ranges.sides, generator), generator.uniform(*ranges.sigma, size=2)
    angle = generator.uniform(-np.pi, np.pi)
    if family == "gaussian":
        return bivariate_Gaussian(side, *sigmas, angle, isotropic=isotropic)
    least, most = SHAPES[family]
    shape = generator.uniform(least, 1) if generator.random() < 0.5 else generator.uniform(1, most)
    kernel = {"generalized": bivariate_generalized_Gaussian, "plateau": bivariate_plateau}[family]
    return kernel(side, *sigmas, angle, shape, isotropic=isotropic)


def _sinc_kernel(blind: Blind, sides: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A random circular low-pass filter, which causes ringing; its sum is 1."""
    from downstream.basicsr_parts import circular_lowpass_kernel

    with np.errstate(divide="ignore", invalid="ignore"):  # the centre is set separately
        return circular_lowpass_kernel(np.pi * generator.uniform(*blind.cutoff), _random_side(sides, generator))


def _random_sides(sides: tuple[int, int], ranges: Round, generator: np.random.Generator) -> tuple[int, int]:
    """`sides`, randomly enlarged, reduced or kept."""
    drawn, (least, most) = generator.random(), ranges.scale
    if drawn < ranges.enlarge_chance:
        scale = generator.uniform(1, most)
    elif drawn < ranges.enlarge_chance + ranges.reduce_chance:
        scale = generator.uniform(least, 1)
    else:
        scale = 1.0
    height, width = (max(1, round(side * scale)) for side in sides)
    return height, width


def _resized(pixels: np.ndarray, sides: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Resize by a random method: area, bilinear or bicubic.

    Bilinear and bicubic are not antialiased (BSRGAN, section 3.2).
    """
    kernel = RESIZINGS[generator.integers(len(RESIZINGS))]
    return cv2.resize(pixels, sides[::-1], interpolation=kernel).clip(0, 255)


def _noisy(pixels: np.ndarray, ranges: Round, blind: Blind, generator: np.random.Generator) -> np.ndarray:
    """Add Gaussian or Poisson noise, separate for each channel or the same for all channels."""
    gaussian, grey = generator.random() < blind.gaussian_chance, generator.random() < blind.grey_chance
    values = pixels.mean(axis=2, keepdims=True) if grey else pixels
    if gaussian:
        noise = generator.uniform(*ranges.noise) * generator.standard_normal(values.shape, dtype=np.float32)
    else:
        photons = np.exp(generator.uniform(*np.log(ranges.photons))) / 255
        noise = generator.poisson(values * photons) / photons - values
    return (pixels + noise.astype(np.float32)).clip(0, 255)


def _jpeg(pixels: np.ndarray, ranges: Round, generator: np.random.Generator) -> np.ndarray:
    quality = int(generator.integers(*ranges.jpeg, endpoint=True))
    _, data = cv2.imencode(".jpg", _to_uint8(pixels)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
