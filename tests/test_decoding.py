"""Unusual files: four colours in YCCK, no permission, headers with too large claims, several pages."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from test_sources import animation, encoded, texture, tiff

from corpus import decoding
from corpus.decoding import decode_image, read_bytes, read_image
from corpus.masks import decode_mask, mask_rule

ROOT = Path(__file__).resolve().parent.parent
SIDE = 32
CLAIMED = 30_000

# ----------------------------------------------------------------------------------------------------- four colours


def ycck(colour: tuple[int, int, int], black: int = 255) -> bytes:
    """A YCCK JPEG as Photoshop writes it: Adobe's marker, transform 2, inverted inks; `black` 255 is no black ink.

    Its first three channels are Y, Cb and Cr (JFIF's formula) of the colour's complement, because the decoder takes the
    complement of the colour that they represent. Pillow treats all four channels as inks and inverts them when writing.
    """
    red, green, blue = (255 - part for part in colour)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = (y, 128 + (blue - y) / 1.772, 128 + (red - y) / 1.402, black)
    inks = tuple(255 - round(min(max(channel, 0), 255)) for channel in channels)
    data = bytearray(encoded(Image.new("CMYK", (SIDE, SIDE), inks), "JPEG", quality=98, subsampling=0))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0, "Pillow wrote plain CMYK"
    data[place] = 2
    return bytes(data)


@pytest.mark.parametrize(
    "colour", [(220, 30, 30), (20, 90, 200), (40, 160, 60), (128, 128, 128), (250, 250, 250), (5, 5, 5)]
)
def test_a_ycck_jpeg_decodes_to_its_original_colours(colour: tuple[int, int, int]) -> None:
    image = decode_image(ycck(colour), SIDE).astype(int)
    assert np.abs(image - colour).max() <= 4, image[0, 0]


def test_black_ink_darkens_a_ycck_jpeg() -> None:
    colour = np.array((200, 100, 60))
    image = decode_image(ycck(tuple(colour.tolist()), black=128), SIDE).astype(int)
    assert np.abs(image - colour * 128 / 255).max() <= 5, image[0, 0]


# ------------------------------------------------------------------------------------------------------ unread files


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "denied"), decoding.NO_PERMISSION),
        (FileNotFoundError(errno.ENOENT, "gone"), decoding.VANISHED),
        (IsADirectoryError(errno.EISDIR, "folder"), decoding.NOT_A_FILE),
        (OSError(errno.EIO, "input/output error"), decoding.UNREADABLE_FILE),
        (OSError(errno.ESTALE, "stale file handle"), decoding.UNREADABLE_FILE),
    ],
)
def test_files_that_cannot_be_opened_get_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    texture().save(tmp_path / "a.png")
    assert isinstance(read_image(tmp_path / "a.png", SIDE), np.ndarray)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(decoding, "open", refuse, raising=False)
    assert read_bytes(tmp_path / "a.png") == read_image(tmp_path / "a.png", SIDE) == reason


def test_a_read_error_of_the_disk_gets_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, "input/output error")

    texture().save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "open", lambda *_, **__: Failing(), raising=False)
    assert read_image(tmp_path / "a.png", SIDE) == decoding.UNREADABLE_FILE


# ------------------------------------------------------------------------------------------------------------- bombs


def jpeg_header() -> bytes:
    """A JPEG whose frame claims a width and height of 30,000 px."""
    data = bytearray(encoded(texture(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    assert data[place : place + 4] == (32).to_bytes(2, "big") * 2
    data[place : place + 4] = CLAIMED.to_bytes(2, "big") * 2
    return bytes(data)


def tiff_header() -> bytes:
    """A TIFF of 8 bits whose directory claims the same."""
    data = bytearray(encoded(texture(), "TIFF"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = [file.pages[0].tags[name] for name in ("ImageWidth", "ImageLength")]
        places = [(tag.valueoffset, 2 if tag.dtype == 3 else 4) for tag in tags]
    for place, size in places:
        data[place : place + size] = CLAIMED.to_bytes(size, "little")
    return bytes(data)


def sparse_tiff(bands: int, kind: str = "uint16") -> bytes:
    """A TIFF with the tables of its tiles but without any tile."""
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=CLAIMED, width=CLAIMED, count=bands, dtype=kind, tiled=True, sparse_ok=True,
            blockxsize=512, blockysize=512, bigtiff=True, transform=rasterio.Affine.scale(2),
        ):  # fmt: skip
            pass
        return bytes(memory.read())


def half_too_large() -> bytes:
    """A PNG slightly above the limit, for which Pillow itself only warns."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = (9_460).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BOMBS = {
    "jpeg": jpeg_header,
    "tiff of 8 bits": tiff_header,
    "tiff of 16 bits, which Pillow knows": lambda: sparse_tiff(1),
    "tiff of 13 bands, which GDAL reads": lambda: sparse_tiff(13),
    "tiff of floats in colours": lambda: sparse_tiff(3, "float32"),
    "png, hardly too large": half_too_large,
}


REFUSE = """
import os, resource, sys
from pathlib import Path
from corpus import decoding
first, *bombs = [Path(name).read_bytes() for name in sys.argv[2:]]
decoding.decode_image(first, 8)  # imports what it needs
decoding.MAX_PIXELS = int(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * os.sysconf("SC_PAGE_SIZE") + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for data in bombs:
    try:
        print(decoding.decode_image(data, 32))
    except MemoryError:
        print("no memory")
"""


def refusals(folder: Path, most: int) -> list[str]:
    """The messages of a process with room for 64 MB about each bomb, with a limit of `most` pixels."""
    first = tiff(np.zeros((3, 8, 8), np.uint16), photometric="minisblack", planarconfig="separate")
    for name, data in {"first": first, **{name: make() for name, make in BOMBS.items()}}.items():
        assert len(data) < 2**19
        (folder / name).write_bytes(data)
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        REFUSE,
        str(most),
        *(str(folder / name) for name in ("first", *BOMBS)),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path: Path) -> None:
    """Decoding one takes 89 MB or more; without the project's limit, those that Pillow accepts end differently."""
    assert refusals(tmp_path, decoding.MAX_PIXELS) == [decoding.TOO_MANY_PIXELS] * len(BOMBS)
    assert decoding.TOO_MANY_PIXELS not in refusals(tmp_path, 10**12)[3:]


@pytest.mark.parametrize("name", [name for name in BOMBS if "GDAL" not in name and "floats" not in name])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_mask_whose_header_claims_too_many_pixels_is_refused(name: str) -> None:
    assert decode_mask(BOMBS[name](), mask_rule(["a", "b"]), SIDE) == decoding.TOO_MANY_PIXELS


# ------------------------------------------------------------------------------------------------- frames and pages


def pages(*values: np.ndarray, **options: object) -> bytes:
    """A TIFF with one directory per array, as written by scanners and cameras."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in values:
            writer.write(page, metadata=None, **options)
    return buffer.getvalue()


def several(kind: str) -> bytes:
    return encoded(texture(0), kind, save_all=True, append_images=[texture(1), texture(2)], lossless=True)


BANDS = np.random.default_rng(0).integers(0, 4000, (2, 4, SIDE, SIDE), dtype=np.uint16)
FLOATS = BANDS[:, :3].transpose(0, 2, 3, 1).astype(np.float32)
PLANES = {"photometric": "minisblack", "planarconfig": "separate"}
#: Two files each: one with several frames or pages, and one with the first of them alone.
SEVERAL: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "webp": lambda: (several("WEBP"), encoded(texture(0), "WEBP", lossless=True)),
    "png": lambda: (several("PNG"), encoded(texture(0))),
    "tiff": lambda: (several("TIFF"), encoded(texture(0), "TIFF")),
    "tiff, the later page larger": lambda: (
        encoded(texture(0), "TIFF", save_all=True, append_images=[texture(1, side=90)]),
        encoded(texture(0), "TIFF"),
    ),
    "tiff of 16 bits": lambda: (pages(*BANDS[:, 0]), pages(BANDS[0, 0])),
    "stack of 16 bits": lambda: (tiff(BANDS[:, 0], photometric="minisblack"), pages(BANDS[0, 0])),
    "tiff of 4 bands, the later page smaller": lambda: (
        pages(BANDS[0], np.ascontiguousarray(BANDS[1, :, :16, :16]), **PLANES),
        pages(BANDS[0], **PLANES),
    ),
}
#: The same, with pages of one shape that Pillow cannot read.
DEEP_SEVERAL = {
    "tiff of 4 bands": lambda: (pages(*BANDS, **PLANES), pages(BANDS[0], **PLANES)),
    "tiff of floats in colours": lambda: (pages(*FLOATS, photometric="rgb"), pages(FLOATS[0], photometric="rgb")),
    "stack of floats in colours": lambda: (tiff(FLOATS, photometric="rgb"), pages(FLOATS[0], photometric="rgb")),
}


def assert_the_first_of(both: tuple[bytes, bytes]) -> None:
    whole, first = both
    assert len(whole) > 1.2 * len(first)
    result, expected = decode_image(whole, SIDE), decode_image(first, SIDE)
    assert isinstance(expected, np.ndarray) and expected.std() > 20
    assert isinstance(result, np.ndarray), result
    assert (result == expected).all()


@pytest.mark.parametrize("name", SEVERAL)
def test_the_first_frame_or_page_is_taken(name: str) -> None:
    assert_the_first_of(SEVERAL[name]())


@pytest.mark.parametrize("name", DEEP_SEVERAL)
def test_the_first_page_of_a_deep_tiff_is_taken(name: str) -> None:
    assert_the_first_of(DEEP_SEVERAL[name]())


def test_the_first_frame_of_an_animated_gif_is_taken() -> None:
    assert (decode_image(animation(), 20) == (255, 0, 0)).all()
    noise = [texture(seed).quantize(256) for seed in range(3)]
    moving = encoded(noise[0], "GIF", save_all=True, append_images=noise[1:])
    assert (decode_image(moving, SIDE) == np.asarray(noise[0].convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_a_mask_is_read_from_the_first_frame_or_page(kind: str) -> None:
    classes = (np.arange(SIDE * SIDE) % 256).reshape(SIDE, SIDE).astype(np.uint8)  # all occur: GIF drops unused values
    masks = [Image.fromarray(values, mode="P") for values in (classes, classes.T)]
    for mask in masks:
        mask.putpalette([part for grey in range(256) for part in (grey, grey, grey)])
    rule = mask_rule(list(map(str, range(255))), ignore=255)
    result = decode_mask(encoded(masks[0], kind, save_all=True, append_images=masks[1:]), rule, SIDE)
    assert (result == classes).all() and (classes != classes.T).any()


# ------------------------------------------------------------------------------------------------------- deep colours


def test_nodata_pixels_of_float_colours_are_black_and_do_not_affect_the_stretch() -> None:
    values = FLOATS[0].copy()
    values[:8] = -9999
    image = decode_image(tiff(values, photometric="rgb", extratags=[(42113, "s", 0, "-9999", False)]), SIDE)
    low, high = np.percentile(values[8:], (2, 98), axis=(0, 1))
    expected = np.clip((values[8:] - low) / (high - low) * 255, 0, 255)
    assert (image[:8] == 0).all() and np.abs(image[8:] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_colours_of_16_bits_are_stretched(kind: str) -> None:
    import cv2

    values = BANDS[0, :3].transpose(1, 2, 0)  # 0..4000, as a satellite's reflectances
    data = tiff(values, photometric="rgb")
    if kind == "png":
        data = cv2.imencode(".png", values[..., ::-1])[1].tobytes()
    image = decode_image(data, SIDE)
    low, high = np.percentile(values, (2, 98), axis=(0, 1))
    assert np.abs(image - np.clip((values - low) / (high - low) * 255, 0, 255)).max() <= 1
