"""Faults of files from a seeded generator: broken bytes, odd pictures, tags, names, texts and tables."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import rasterio
import tifffile
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

Generator = np.random.Generator


class File(NamedTuple):
    """The bytes of a file, and its suffix."""

    suffix: str
    data: bytes


# ------------------------------------------------------------------------------------------------------------ pictures


def texture(rng: Generator, height: int = 36, width: int = 36, bands: int = 3) -> np.ndarray:
    """Noise, different for every picture, uint8 [height, width, bands]."""
    return rng.integers(0, 256, (height, width, bands), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _pillow(mode: str, kind: str, suffix: str, **options: object) -> Callable[[Generator], File]:
    def make(rng: Generator) -> File:
        picture = Image.fromarray(texture(rng))
        picture = Image.fromarray(texture(rng, bands=4), "RGBA") if mode == "RGBA" else picture.convert(mode)
        return File(suffix, encoded(picture, kind, **options))

    return make


def _oriented(rng: Generator) -> File:
    exif = Image.Exif()
    exif[274] = int(rng.integers(0, 12))
    kind, suffix = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")][rng.integers(4)]
    return File(suffix, encoded(Image.fromarray(texture(rng, 20, 44)), kind, exif=exif))


def _deep_png(rng: Generator) -> File:
    return File(".png", encoded(Image.fromarray(rng.integers(0, 65536, (36, 36), dtype=np.uint16)), "PNG"))


def _frames(rng: Generator) -> File:
    pictures = [Image.fromarray(texture(rng)) for _ in range(3)]
    kind, suffix = [("GIF", ".gif"), ("TIFF", ".tif"), ("WEBP", ".webp"), ("PNG", ".png")][rng.integers(4)]
    return File(suffix, encoded(pictures[0], kind, save_all=True, append_images=pictures[1:]))


def jpeg2000(rng: Generator) -> File:
    return File(".jp2", encoded(Image.fromarray(texture(rng)), "JPEG2000"))


PICTURES = (
    _pillow("RGB", "JPEG", ".jpg"), _pillow("L", "JPEG", ".jpeg"), _pillow("CMYK", "JPEG", ".jpe"),
    _pillow("RGB", "JPEG", ".jfif", progressive=True), _pillow("RGB", "PNG", ".png"), _pillow("RGBA", "PNG", ".png"),
    _pillow("P", "PNG", ".png", transparency=3), _pillow("1", "PNG", ".png"), _pillow("LA", "PNG", ".png"),
    _pillow("RGB", "BMP", ".bmp"), _pillow("P", "GIF", ".gif"), _pillow("RGB", "WEBP", ".webp"),
    _pillow("RGB", "TIFF", ".tif"), _pillow("RGB", "TIFF", ".tiff", compression="tiff_lzw"),
    _pillow("CMYK", "TIFF", ".tif"), _pillow("LAB", "TIFF", ".tif"), _pillow("YCbCr", "TIFF", ".tif"),
    _pillow("F", "TIFF", ".tif"), _pillow("I;16", "TIFF", ".tif"), _pillow("P", "TIFF", ".tif"),
    _pillow("1", "TIFF", ".tif", compression="group4"), _pillow("RGB", "TIFF", ".tif", compression="jpeg"),
    _pillow("RGB", "PPM", ".ppm"), _pillow("RGB", "TGA", ".tga"), _pillow("RGB", "PCX", ".img"),
    _oriented, _deep_png, _frames, jpeg2000,
)  # fmt: skip


def picture(rng: Generator) -> File:
    """A valid picture of a random kind."""
    return PICTURES[rng.integers(len(PICTURES))](rng)


def odd_shape(rng: Generator) -> File:
    """A picture of one pixel, one row, one column, or a strip."""
    shapes = [(1, 1), (1, 300), (300, 1), (1, 5000), (7000, 1), (2, 3), (3, 700), (65, 64), (2, 2)]
    height, width = shapes[rng.integers(len(shapes))]
    kinds = [("JPEG", ".jpg"), ("PNG", ".png"), ("TIFF", ".tif"), ("BMP", ".bmp"), ("WEBP", ".webp"), ("GIF", ".gif")]
    kind, suffix = kinds[rng.integers(len(kinds))]
    return File(suffix, encoded(Image.fromarray(texture(rng, height, width)), kind))


def huge_claim(rng: Generator) -> File:
    """A few bytes whose header claims a picture of many millions of pixels."""
    side = int(rng.choice([400, 30_000, 65_535, 100_000, 2**31 - 1]))
    short = min(side, 65_535)
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    jpeg = bytearray(encoded(Image.fromarray(texture(rng)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", short, short)
    bmp = bytearray(encoded(Image.fromarray(texture(rng)), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, -side)
    gif = bytearray(encoded(Image.fromarray(texture(rng)).convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", short, short)
    tga = bytearray(encoded(Image.fromarray(texture(rng)), "TGA"))
    tga[12:16] = struct.pack("<HH", short, short)
    tiff = bytearray(encoded(Image.fromarray(texture(rng)), "TIFF"))
    with tifffile.TiffFile(io.BytesIO(bytes(tiff))) as file:
        tags = file.pages[0].tags
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            code = {3: "<H", 4: "<I"}[tags[name].dtype]
            struct.pack_into(code, tiff, tags[name].valueoffset, 65_535 if code == "<H" else max(side, 65_535))
    result = [
        File(".png", png), File(".jpg", bytes(jpeg)), File(".bmp", bytes(bmp)), File(".gif", bytes(gif)),
        File(".tga", bytes(tga)), File(".tif", bytes(tiff)), File(".ppm", f"P6 {side} {side} 255\n".encode() + b"abc"),
        File(".pgm", f"P5 {side} 1 65535\n".encode()), File(".tif", _sparse_tiff(1000 if side < 65_535 else 300_000)),
    ]  # fmt: skip
    return result[rng.integers(len(result))]


def _sparse_tiff(side: int) -> bytes:
    """A valid file of a hundred kilobytes without any block."""
    with rasterio.MemoryFile() as memory:
        options = {"driver": "GTiff", "tiled": True, "blockxsize": 4096, "blockysize": 4096, "sparse_ok": True}
        with memory.open(width=side, height=side, count=1, dtype="uint8", **options):
            pass
        return memory.read()


# ------------------------------------------------------------------------------------------------------------- rasters

TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64", "complex64",
    "complex128", "complex_int16",
)  # fmt: skip
NO_DATA = (None, None, 0, 255, -9999, 65535, float("nan"), float("inf"), 1e40, -1e308, 0.5, 2**63)
PLACES = (
    None, "EPSG:4326", "EPSG:32633", "EPSG:3857", "EPSG:2193", "EPSG:4978", "EPSG:3413",
    'LOCAL_CS["here",UNIT["metre",1]]', 'LOCAL_CS["no unit",UNIT["nothing",0]]',
)  # fmt: skip
NUMBERS = (0.0, 1.0, 10.0, -10.0, 1e-9, 1e9, 1e300, float("nan"), float("inf"), 500_000.0, 179.9, -91.0)


def odd_raster(rng: Generator) -> File:
    """A TIFF as written by GDAL, of any type, number of bands, location and no-data value."""
    kind, bands = str(rng.choice(TYPES)), int(rng.choice([1, 1, 2, 3, 3, 4, 5, 13]))
    height, width = ((40, 40), (37, 70), (100, 16), (1, 40))[rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])]
    options = {
        "compress": str(rng.choice(["none", "lzw", "deflate", "packbits", "zstd", "lerc", "lzma", "webp", "jpeg"])),
        "interleave": str(rng.choice(["pixel", "band"])),
        "bigtiff": str(rng.choice(["yes", "no"])),
        "predictor": str(rng.choice(["1", "2", "3"])),
        "endianness": str(rng.choice(["little", "big"])),
    }
    if rng.random() < 0.3:
        options |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    if rng.random() < 0.2:
        options["nbits"] = int(rng.choice([1, 2, 4, 7, 12, 16]))
    if rng.random() < 0.2:
        options["photometric"] = str(rng.choice(["minisblack", "miniswhite", "rgb", "cielab", "ycbcr"]))
    for _ in range(20):  # GDAL refuses some combinations
        try:
            return File(".tif", _written(rng, kind, bands, (height, width), options))
        except Exception:
            options.pop(next(iter(options)), None)
    return File(".tif", _written(rng, "uint8", 3, (40, 40), {}))


def _written(rng: Generator, kind: str, bands: int, shape: tuple[int, int], options: dict) -> bytes:
    with rasterio.MemoryFile() as memory:
        profile = {"driver": "GTiff", "width": shape[1], "height": shape[0], "count": bands, "dtype": kind, **options}
        with memory.open(**profile) as raster:
            values = _values(rng, "complex64" if kind == "complex_int16" else kind, (bands, *shape))
            if kind != "complex_int16":
                raster.write(values)
            _tagged(rng, raster, bands)
        return memory.read()


def _tagged(rng: Generator, raster: object, bands: int) -> None:
    """Tags of all kinds; a tag that GDAL refuses is omitted."""
    place = PLACES[rng.integers(len(PLACES))]

    def attempt(fraction: float, action: Callable[[], object]) -> None:
        if rng.random() < fraction:
            try:
                action()
            except Exception:
                return

    attempt(0.6, lambda: setattr(raster, "nodata", NO_DATA[rng.integers(len(NO_DATA))]))
    attempt(0.7, lambda: setattr(raster, "crs", place))
    attempt(0.7, lambda: setattr(raster, "transform", Affine(*_transform(rng))))
    uses = [ColorInterp(int(rng.integers(0, 17))) for _ in range(bands)]
    attempt(0.3, lambda: setattr(raster, "colorinterp", uses))
    attempt(0.2, lambda: raster.write_colormap(1, {int(rng.integers(256)): (1, 2, 3, int(rng.integers(256)))}))
    mask = rng.integers(0, 2, raster.shape).astype(bool)
    attempt(0.2, lambda: raster.write_mask(mask))
    attempt(0.2, lambda: raster.set_band_description(1, odd_text(rng)[:50]))
    attempt(0.1, lambda: setattr(raster, "gcps", ([rasterio.control.GroundControlPoint(0, 0, 1e300, 2)], place)))
    attempt(0.2, lambda: setattr(raster, "scales", [float(rng.choice(NUMBERS))] * bands))


def _transform(rng: Generator) -> list[float]:
    if rng.random() < 0.4:
        return [10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0]
    if rng.random() < 0.4:
        turn = rng.uniform(-3, 3)
        return [np.cos(turn), np.sin(turn), 12.0, -np.sin(turn), np.cos(turn), 48.0]
    return [float(number) for number in rng.choice(NUMBERS, 6)]


def _values(rng: Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(kind)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    values = (rng.normal(size=shape) * 10.0 ** float(rng.choice([-300, -3, 0, 3, 30, 300]))).astype(np.float64)
    fraction = rng.choice([0.0, 0.1, 1.0], p=[0.7, 0.2, 0.1])
    values[rng.random(shape) < fraction] = float(rng.choice([np.nan, np.inf, -np.inf]))
    with np.errstate(all="ignore"):
        return (values + 1j * values).astype(dtype) if dtype.kind == "c" else values.astype(dtype)


def odd_tags(rng: Generator) -> File:
    """A TIFF with contradictory or meaningless tags."""
    texts = ("abc", "", "nan", "-1e999", "1,5", "0x10", "\u00e4", "-9999 ", "1 2 3", "9" * 400)
    extra = [
        (42113, "s", 0, str(rng.choice(texts)).encode("latin-1"), True),
        (33550, "d", 3, (0.0, 0.0, 0.0) if rng.random() < 0.5 else (float("nan"), 1.0, 0.0), True),
        (33922, "d", 6, tuple(float(number) for number in rng.choice(NUMBERS, 6)), True),
        (34735, "H", 8, tuple(int(number) for number in rng.integers(0, 65536, 8)), True),
        (34264, "d", 16, tuple(float(number) for number in rng.choice(NUMBERS, 16)), True),
        (42112, "s", 0, b"<GDALMetadata><Item name=", True),
        (274, "H", 1, int(rng.integers(0, 20)), True),
        (700, "B", 8, b"<broken>", True),
    ]
    chosen = [tag for tag in extra if rng.random() < 0.4]
    shape = ((36, 36, 3), (36, 36), (3, 36, 36), (36, 36, 7), (2, 36, 36, 3))[rng.integers(5)]
    kind = str(rng.choice(["uint8", "uint16", "float16", "float32", "int8", "bool", "complex64", "uint64"]))
    values = _values(rng, "uint8", shape).astype(kind)
    options = {"extratags": chosen, "bigtiff": bool(rng.random() < 0.3), "metadata": None}
    options["compression"] = [None, "zlib", "packbits", "lzma", "zstd"][rng.integers(5)]
    options["byteorder"] = "<>"[rng.integers(2)]
    buffer = io.BytesIO()
    try:
        tifffile.imwrite(buffer, values, **options)
    except Exception:  # a combination that the writer refuses
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, _values(rng, "uint8", (36, 36, 3)), extratags=chosen, metadata=None)
    return File(".tif", buffer.getvalue())


def odd_vrt(rng: Generator, source: str) -> bytes:
    """A virtual raster that refers to a neighbour, itself or nothing, or claims the Earth's size in centimetres."""
    side = int(rng.choice([40, 64, 5_000_000, 2**31 - 1, 0, -4]))
    shown = str(rng.choice([source, "gone.tif", "/vsicurl/http://127.0.0.1:9/a.tif", "/dev/zero", "self.vrt"]))
    return (
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{shown}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
        "</VRTRasterBand></VRTDataset>"
    ).encode()[: None if rng.random() < 0.8 else 60]


ODD = (odd_shape, huge_claim, odd_raster, odd_raster, odd_tags, odd_tags)


def odd_picture(rng: Generator) -> File:
    """A picture of an odd shape, size, type or with odd tags."""
    return ODD[rng.integers(len(ODD))](rng)


# --------------------------------------------------------------------------------------------------------------- bytes


def broken(rng: Generator, data: bytes) -> bytes:
    """The bytes truncated, flipped, overwritten, doubled, or with a wrong beginning."""
    result, size = bytearray(data or b"\0"), max(1, len(data))
    at = int(rng.integers(size))
    match int(rng.integers(9)):
        case 0:
            del result[at:]
        case 1:
            for place in rng.integers(0, size, int(rng.choice([1, 4, 40]))):
                result[place] ^= 1 << int(rng.integers(8))
        case 2:  # the position of most formats' headers
            for place in rng.integers(0, min(size, 200), int(rng.choice([1, 3, 10]))):
                result[place] = int(rng.integers(256))
        case 3:
            heads = [
                b"\xff\xd8\xff",
                b"\x89PNG\r\n\x1a\n",
                b"II*\0",
                b"MM\0*",
                b"II+\0",
                b"GIF89a",
                b"BM",
                b"P6 9 9 255 ",
            ]
            heads += [
                b"\0\0\0\x0cjP  \r\n\x87\n",
                b"RIFF\x10\0\0\0WEBP",
                b"EHFA_HEADER_TAG",
                b"NITF02.10",
                b"<VRTDataset",
            ]
            heads += [
                b"\x93NUMPY\x01\0",
                b"\0\0\0\x20ftypavif",
                b"\xff\x4f\xff\x51",
                b"%PDF-1.4",
                b"SIMPLE  =",
                b"\0\0\0\0",
            ]
            head = heads[rng.integers(len(heads))]
            result[: len(head)] = head
        case 4:
            result[at : at + 64] = bytes(64)
        case 5:
            result[at:at] = rng.bytes(int(rng.integers(1, 50)))
        case 6:
            result += bytes(result)
        case 7:
            del result[at : at + int(rng.integers(1, 60))]
        case _:
            result = bytearray([b"", b"\0", rng.bytes(3), rng.bytes(700), b"\xff" * 100, bytes(5000)][rng.integers(6)])
    return bytes(result)


def broken_file(rng: Generator) -> File:
    """Broken bytes of a picture or a raster."""
    file = picture(rng) if rng.random() < 0.6 else odd_picture(rng)
    return File(file.suffix, broken(rng, file.data))


SUFFIXES = (
    ".jpg", ".JPG", ".png", ".tif", ".TIFF", ".gtiff", ".webp", ".bmp", ".gif", ".jp2", ".j2k", ".avif", ".heic",
    ".ppm", ".pfm", ".tga", ".img", ".vrt", ".ntf", ".jfif", ".apng", ".dib",
)  # fmt: skip


def swapped(rng: Generator) -> File:
    """A valid picture with the suffix of another image format."""
    return File(str(rng.choice(SUFFIXES)), picture(rng).data)


def any_image(rng: Generator) -> File:
    """A file with an image suffix: valid, odd, broken or of another format."""
    makers = (picture, odd_picture, broken_file, broken_file, swapped)
    return makers[rng.integers(len(makers))](rng)


# ------------------------------------------------------------------------------------------------------ names and texts


def odd_stem(rng: Generator, number: int) -> str:
    """An unusual name without suffix; the number makes it unique."""
    names = (
        "plain", "with space", "line\nbreak", "tab\tin", "-dash", "--dry-run", "~tilde", "quote's", 'double"quote',
        "a=b,c", "[list]", "{0..3}", "$HOME", "%41", "#hash", "back\\slash", "dot.dot.dot", "x.jpg", "x.tar",
        "train", "test_set", "mask", "a.mask", "a.seg", "captions", "CON", "nul", "ünïcode", "\u202ertl", "😀",
        unicodedata.normalize("NFD", "é" * 9), unicodedata.normalize("NFC", "é" * 9), "漢字" * 30, "\x01\x7f",
        "a" * 200, "B04", "T33_20200101_B02_10m", "<b>&amp;", "a::b", "a;b|c", " lead", "trail ", "٣", "nan",
    )  # fmt: skip
    return f"{names[rng.integers(len(names))]}{number}"


def odd_text(rng: Generator) -> str:
    """Text for captions and fields."""
    texts = (
        "", " ", "a lake", "\0", "a\0b", "\ud800", "nan", "3", "-1", "1e999", "9" * 5000, "x" * 200_000, "é" * 50_000,
        "[" * 3000, "[" + "-" * 9000 + "1]", "[1, 'a']", "['a', 'b']", "{}", "null", "\u2028line", "a,b;c\td|e",
        "\n" * 5000, "<script>alert(1)</script>", "../../etc/passwd", "word " * 30_000, "٣", "0x10", '"', "'",
        "[" + "1+" * 5000 + "1]", "['\\d']", "[1is 2]",
    )  # fmt: skip
    return texts[rng.integers(len(texts))]


def text_bytes(rng: Generator) -> bytes:
    """The bytes of a text: in some encoding, or broken."""
    text = odd_text(rng).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    data = text.encode(str(rng.choice(["utf-8", "utf-16", "utf-32", "utf-8-sig"])))
    return broken(rng, data) if rng.random() < 0.3 else data


def odd_value(rng: Generator, depth: int = 0) -> object:
    """A JSON value of any type."""
    values = [
        None, True, False, 0, -1, 3, 2**63, 10**30, 1e308, float("inf"), float("nan"), 0.5, odd_text(rng)[:300], [], {},
    ]  # fmt: skip
    if depth < 3:
        values += [[odd_value(rng, depth + 1)], {odd_text(rng)[:20]: odd_value(rng, depth + 1)}, [odd_text(rng)] * 2]
    return values[rng.integers(len(values))]


KEYS = (
    "id", "caption", "captions", "text", "sentences", "scene", "label", "class", "split", "lon", "lat", "stamp",
    "ground", "copy_in", "readable", "reason", "image", "mask", "file_name", "weight", "kept", "date", "crs", "",
    "\ud800", "a\0b", "Caption", "entropy", "cluster", "__index_level_0__", "k" * 3000, "label_text",
)  # fmt: skip


def metadata_of(rng: Generator) -> dict[str, object]:
    """A row of metadata with some wrong values."""
    return {KEYS[rng.integers(len(KEYS))]: odd_value(rng) for _ in range(int(rng.integers(0, 6)))}


def metadata_bytes(rng: Generator) -> bytes:
    """JSON about one image, or bytes that are not JSON."""
    nested = ['{"captions":' + "[" * 950 + "]" * 950 + "}", "[" * 100_000, '{"a":' * 5000, "[]", "3", '"x"', "NaN", ""]
    data = json.dumps(metadata_of(rng)).encode()
    if rng.random() < 0.2:
        return nested[rng.integers(len(nested))].encode()
    return broken(rng, data) if rng.random() < 0.3 else data


def table(rng: Generator, files: list[str]) -> File:
    """A table of captions, `captions.<suffix>`, about some of these files, with a random fault."""
    rows = [{"file_name": str(rng.choice(files)), **metadata_of(rng)} for _ in range(6)]
    rows += [{"file_name": str(rng.choice([odd_text(rng), "a/" * 30_000 + "b.jpg", "../x.png", "C:\\a.png", "\0"]))}]
    match int(rng.integers(4)):
        case 0:
            result = File(".jsonl", "\n".join(json.dumps(row) for row in rows).encode())
        case 1:
            result = File(
                ".json", json.dumps(rows if rng.random() < 0.5 else {"images": rows, "annotations": rows}).encode()
            )
        case 2:
            lines = [["file_name", "caption", "lon"]] + [[str(row["file_name"]), odd_text(rng), "1.5"] for row in rows]
            result = File(".csv", "\n".join(",".join(line) for line in lines).encode("utf-8", "replace"))
        case _:
            result = File(
                ".txt",
                "\n".join(f"{row['file_name']}\t{odd_text(rng)[:50]}" for row in rows).encode("utf-8", "replace"),
            )
    return File(result.suffix, broken(rng, result.data)) if rng.random() < 0.3 else result


# --------------------------------------------------------------------------------------------------------------- masks


def odd_mask(rng: Generator) -> File:
    """A mask of three classes for a square image, usually with a fault."""
    good = rng.integers(0, 3, (36, 36)).astype(np.uint8)
    buffer = io.BytesIO()
    match int(rng.integers(8)):
        case 0:
            return File(".png", encoded(Image.fromarray(good), "PNG"))
        case 1:
            shape = ((0, 0), (0, 5), (5,), (), (1, 36, 36), (36, 36, 1), (36, 36, 3), (2, 36, 36), (36, 36))
            kinds = ["uint8", "int64", "float16", "float64", "bool", "complex64", "S3", "U2", "M8[s]", ">u2", "i4,f4"]
            np.save(buffer, np.zeros(shape[rng.integers(len(shape))], np.dtype(str(rng.choice(kinds)))))
            return File(".npy", buffer.getvalue())
        case 2:
            return File(".tif", odd_raster(rng).data)
        case 3:
            return odd_shape(rng)
        case 4:
            return File(".png", broken(rng, encoded(Image.fromarray(good), "PNG")))
        case 5:
            np.save(buffer, np.where(good == 1, np.nan, good.astype(np.float32)))
            return File(".npy", broken(rng, buffer.getvalue()))
        case 6:
            return File(".png", encoded(Image.fromarray(texture(rng)), "PNG"))
        case _:
            return huge_claim(rng)


# ------------------------------------------------------------------------------------------------------- special files


def special_file(rng: Generator, path: str) -> None:
    """Create something that is not a regular file: a pipe, a device-like link, a dangling link, or a sparse file.

    Links lead nowhere or to a device that never ends; the sparse file has a hole of more than a gigabyte.
    """
    match int(rng.integers(6)):
        case 0:
            os.mkfifo(path)
        case 1:
            os.symlink("gone", path)
        case 2:
            os.symlink(os.path.basename(path), path)
        case 3:
            os.symlink("/dev/zero", path)
        case 4:
            os.symlink(tempfile.gettempdir() + "/nothing/there", path)
        case _:
            with open(path, "wb") as file:
                file.write(b"\xff\xd8\xff")
                file.truncate(1_200 * 2**20)
