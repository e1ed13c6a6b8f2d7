"""Suppress other libraries' messages for the user of a command: logs, warnings, and prints of C code.

A problem with an image is recorded as a reason in the quarantine table, so a library's message about it adds nothing,
and thousands of them would hide the command's own messages. Only the named libraries are silenced; all other warnings
show.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

#: Libraries with warnings for developers, not for users of a command.
QUIET = (
    *("torch", "torchvision", "torchmetrics", "torch_fidelity", "timm", "open_clip", "cleanfid", "torchgeo"),
    *("diffusers", "transformers", "accelerate", "peft", "datasets", "huggingface_hub"),
)
#: Libraries that read images; they warn about every irregular file.
READERS = ("PIL", "tifffile", "imagecodecs", "rasterio", "affine", "fiona", "pyogrio", "imageio")
#: Loggers of other libraries whose reports repeat a reason or error of this project.
LOGGERS = (*READERS, "huggingface_hub", "datasets", "fsspec")
#: Matplotlib's warning about characters that its font lacks; it draws boxes in their place.
NO_GLYPH = r"Glyph \d+ .* missing from"
#: rasterio's warning; its compiled code attributes the warning to the calling module.
NO_PLACE = "Dataset has no geotransform"


def silence_libraries() -> None:
    """Ignore the warnings of the modules in `QUIET` and `READERS`, and the log messages of `LOGGERS`."""
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(QUIET)})(\.|$)")
    for category in (UserWarning, FutureWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(READERS)})(\.|$)")
    for message in (NO_PLACE, NO_GLYPH):
        warnings.filterwarnings("ignore", category=UserWarning, message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    if "cv2" in sys.modules:  # already imported, so it has read the variable before
        sys.modules["cv2"].utils.logging.setLogLevel(0)


class _Through:
    """A text stream that writes whole lines to a file descriptor until `end`, then to the stream that it replaces."""

    def __init__(self, stream: TextIO, descriptor: int) -> None:
        self.stream, self._descriptor, self._line = stream, descriptor, ""

    def write(self, text: str) -> int:
        if self._descriptor < 0:
            return self.stream.write(text)
        self._line += text
        if "\n" in text or "\r" in text:  # in one system call, because other processes write to the same file
            os.write(self._descriptor, self._line.encode(errors="backslashreplace"))
            self._line = ""
        return len(text)

    def end(self) -> None:
        """Write the incomplete last line to the stream; later writes to this object go to the stream too."""
        self._descriptor = -1
        self.stream.write(self._line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def native_stderr_closed() -> Iterator[None]:
    """Context in which output of C code (libpng, libtiff) to file descriptor 2 is dropped; `sys.stderr` still works.

    For short work such as decoding: output of other threads to the descriptor by other ways is lost as well.
    """
    try:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # the process has no stderr
        yield
        return
    stream, through = sys.stderr, None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the stream does not write to a file descriptor
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
