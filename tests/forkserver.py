"""A process that imports the libraries once and forks for every command, so that tests do not pay for imports again.

Reads one JSON request per line ({script, arguments, cwd, environment, stdout, stderr}) and answers with its exit code.
It computes nothing itself, so no thread is lost in a fork.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def import_libraries() -> None:
    import cv2  # noqa: F401
    import diffusers  # noqa: F401
    import faiss  # noqa: F401
    import hydra  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401
    import skimage.filters  # noqa: F401
    import sklearn.discriminant_analysis  # noqa: F401
    import timm  # noqa: F401
    import torchmetrics  # noqa: F401
    from transformers import CLIPModel, CLIPTokenizer  # noqa: F401


def run(request: dict) -> int:
    """Run one script in the forked process; returns its exit code."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    import_libraries()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
