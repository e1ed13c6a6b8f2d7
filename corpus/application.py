"""What every entry point shares: Hydra, one-line errors with exit code 2, quiet libraries, the process's set-up."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def prepare_process() -> None:
    """Denormals to zero (some networks ran 2-9 times slower without), libraries quiet, downloads off by default bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors arrive here instead of as Hydra's own pages
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    import torch

    torch.set_flush_denormal(True)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def run(main: Callable) -> None:
    """Run a Hydra main function: user errors end in one line on stderr and exit code 2."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from corpus.errors import UserError

    try:
        prepare_process()
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(main)()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_one_line(error))
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to go on")


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's pages, cut to what helps: the message, and for a missing option the choices."""
    cause = error
    while isinstance(cause.__cause__, Exception) and "error" in str(error).lower()[:8]:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if "Available options" in str(cause):
        start = next(index for index, line in enumerate(lines) if "Available options" in line)
        options = [line for line in lines[start + 1 :] if ":" not in line]
        message += " Choose one of: " + ", ".join(options) + "."
    if "not in struct" in str(cause) or "Could not override" in message:
        message += " See configs/ for the keys."
    return message


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
