"""Libraries print nothing about images, in the process and in its workers; messages of others still show."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from test_commands import environment, forked  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def zeroed(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + bytes(count) + data[start + count :]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def noisy_files() -> dict[str, bytes]:
    """Images about which some library prints a message: the library, and the bytes."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    deep = cv2.imencode(".png", random.integers(0, 60_000, (64, 64, 3)).astype(np.uint16))[1].tobytes()
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 200))
    large = io.BytesIO()
    Image.new("L", (11_000, 9_000)).save(large, "PNG")
    cut = tiff(random.random((64, 64, 3)).astype(np.float32), photometric="rgb")
    return {
        "Pillow's log.tif": tiff(random.integers(0, 4000, (64, 64, 13), dtype=np.uint16), photometric="minisblack"),
        "Pillow's bomb warning.png": large.getvalue(),
        "Pillow's warning.tif": cut[:8] + b"\xff\xff\xff\x00" + cut[12:],
        "libtiff.tif": zeroed(tiff(colours, photometric="rgb", compression="deflate"), 600, 100),
        "libpng's warning.png": deep[:33] + profile + deep[33:],
        "libpng's error.png": deep[:-5000],
    }  # fmt: skip


DECODE = """
import sys, warnings
from functools import partial
import numpy as np
from corpus.index import Work, decode
from corpus.sources.folder import ImageFolder
from runtime.application import prepare_process
from runtime.parallel import in_processes

class Loud:
    def __init__(self, reader):
        self.reader = reader
    def __call__(self):
        print("ours", file=sys.stderr)
        warnings.warn("also ours", stacklevel=1)
        yield from self.reader()

if __name__ == "__main__":
    prepare_process()
    source = ImageFolder(sys.argv[1], resolution=16)
    rows = np.arange(len(source.manifest()))
    work = [Work(Loud(source.reader(rows)), rows)] * 2
    for decoded in in_processes(partial(decode, 16, False, ()), work, int(sys.argv[2])):
        print(len(decoded.problems))
    print("closed again", file=sys.stderr)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_messages_of_image_libraries_are_silenced_and_others_are_shown(workers: int, tmp_path: Path) -> None:
    """libtiff and libpng write to the descriptor from C, so the test checks the descriptor of a real process."""
    (tmp_path / "images").mkdir()
    for name, data in noisy_files().items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "decode.py").write_text(DECODE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "decode.py"), str(tmp_path), str(workers)],
        capture_output=True, text=True, timeout=300, env={**environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count("ours") == 2 and lines[-1] == "closed again"
    assert sum("UserWarning: also ours" in line for line in lines) >= 1
    message = [line for line in lines if line not in ("ours", "closed again") and "also ours" not in line]
    assert [line for line in message if "warnings.warn(" not in line] == []


def test_stderr_is_restored_after_an_exception(capfd: pytest.CaptureFixture) -> None:
    from runtime.quiet import native_stderr_closed

    with pytest.raises(KeyError), native_stderr_closed():
        os.write(2, b"from C\n")
        held = sys.stderr
        print("from Python", file=sys.stderr)
        raise KeyError
    os.write(2, b"afterwards\n")
    print("later", file=held)  # a handler made in the meantime keeps the stream
    text = capfd.readouterr().err
    assert "from C" not in text and "afterwards" in text and "later" in text


def test_warnings_of_other_modules_are_still_shown() -> None:
    import warnings

    from runtime.quiet import silence_libraries

    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        silence_libraries()
        for module in ("PIL.Image", "rasterio.io", "torch.nn", "numpy.core", "corpus.index", "PILfer"):
            for category in (UserWarning, RuntimeWarning):
                warnings.warn_explicit(f"{module} {category.__name__}", category, "file", 1, module=module)
        warnings.warn_explicit("Dataset has no geotransform, gcps, or rpcs.", UserWarning, "file", 1, module="corpus.x")
    assert {str(one.message) for one in shown} == {
        "torch.nn RuntimeWarning", "numpy.core UserWarning", "numpy.core RuntimeWarning", "corpus.index UserWarning",
        "corpus.index RuntimeWarning", "PILfer UserWarning", "PILfer RuntimeWarning",
    }  # fmt: skip


def test_a_command_on_rasters_prints_only_its_own_lines(tmp_path: Path, forked) -> None:  # noqa: F811
    """Field row 39: many bands; Pillow's log had one line per file."""
    random = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for number in range(6):
        values = random.integers(0, 4000, (32, 32, 13), dtype=np.uint16)
        (tmp_path / "corpus" / f"{number}.tif").write_bytes(tiff(values, photometric="minisblack"))
    for name, data in noisy_files().items():
        (tmp_path / "corpus" / name).write_bytes(data)
    done = forked(
        "prune/run.py", "corpus=folder", f"corpus.root={tmp_path}/corpus", "corpus.train.split=all", "prune=full",
        "corpus.train.resolution=16", "tracker=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    given = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    assert [line for line in given if not line.startswith(("folder: ", "error: ", "rsprune", "bluemarble"))] == []
    assert any("images quarantined" in line or "none of" in line for line in given)
    tables = [pd.read_parquet(path) for path in (tmp_path / "runs" / "corpus").glob("*/quarantine.parquet")]
    assert any(table["id"].str.startswith("Pillow's bomb").any() for table in tables)
