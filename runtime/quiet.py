"""Keeps other libraries' messages away from who runs a command: their logs, warnings, and their C code's prints.

What goes wrong with an image is a reason in the quarantine table, so that a library's line about it says nothing new,
and a thousand of them hide what a command has to say. Only libraries are silenced, by name: all other warnings show.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

#: Libraries whose warnings are meant for those who write code with them, not for those who run a command.
QUIET = (
    *("torch", "torchvision", "torchmetrics", "torch_fidelity", "timm", "open_clip", "cleanfid", "torchgeo"),
    *("diffusers", "transformers", "accelerate", "peft", "datasets", "huggingface_hub"),
)
#: Libraries that read images: they warn and log of every file that is not as they like it.
READERS = ("PIL", "tifffile", "imagecodecs", "rasterio", "affine", "fiona", "pyogrio", "imageio")
#: Loggers of other libraries that report what a reason or an error of ours says as well.
LOGGERS = (*READERS, "huggingface_hub", "datasets", "fsspec")
#: Of Matplotlib, of letters that its font lacks: it draws boxes in their place.
NO_GLYPH = r"Glyph \d+ .* missing from"
#: Of rasterio, whose compiled code warns in the name of the module that calls it.
NO_PLACE = "Dataset has no geotransform"


def silence_libraries() -> None:
    """Drop the warnings that the modules of `QUIET` and `READERS` raise, and what the loggers of `LOGGERS` report."""
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(QUIET)})(\.|$)")
    for category in (UserWarning, FutureWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(READERS)})(\.|$)")
    for message in (NO_PLACE, NO_GLYPH):
        warnings.filterwarnings("ignore", category=UserWarning, message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    if "cv2" in sys.modules:  # it has read the variable by now
        sys.modules["cv2"].utils.logging.setLogLevel(0)


class _Through:
    """A text stream that writes whole lines to a descriptor until `end`, then to the stream it stands for."""

    def __init__(self, stream: TextIO, descriptor: int) -> None:
        self.stream, self._descriptor, self._line = stream, descriptor, ""

    def write(self, text: str) -> int:
        if self._descriptor < 0:
            return self.stream.write(text)
        self._line += text
        if "\n" in text or "\r" in text:  # in one call: other processes write to the same file
            os.write(self._descriptor, self._line.encode(errors="backslashreplace"))
            self._line = ""
        return len(text)

    def end(self) -> None:
        """What is left of a line goes to the stream; whoever still holds this one writes there from now on."""
        self._descriptor = -1
        self.stream.write(self._line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def native_stderr_closed() -> Iterator[None]:
    """Drop what C code writes to file descriptor 2 meanwhile, as libpng and libtiff do; `sys.stderr` still shows.

    It is for short work such as decoding: what other threads write there by other ways is lost as well.
    """
    try:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # a process without that stream
        yield
        return
    stream, through = sys.stderr, None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that writes elsewhere
        stream.flush()
        if stream.fileno() == 2:
            sys.stderr = through = _Through(stream, kept)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        if through is not None:
            sys.stderr = stream
            through.end()
        os.close(kept)
        os.close(null)
