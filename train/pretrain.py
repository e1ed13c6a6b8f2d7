"""Pretrain the foundation model on a subset: `python train/pretrain.py prune=rsprune ratio=0.85`."""

from __future__ import annotations

import time
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from omegaconf import DictConfig

from prune.selection import method_name
from report.experiments import record
from runtime.application import run
from runtime.artefacts import is_main_process, read_json
from runtime.errors import UserError
from train.foundation import pretrain


def push(pipeline: Path, repository: str) -> None:
    """Upload a pipeline with its model card to a hub repository; creates the repository if it does not exist.

    Raises:
        UserError: the hub cannot be reached, or rejects the upload.
    """
    try:
        hub = HfApi()
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(folder_path=pipeline, repo_id=repository)
    except (OSError, ValueError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"push_to_hub={repository}: the hub did not take {pipeline} ({reason}): log in with `hf auth login` and "
            "run the same command again, the run itself is finished"
        ) from error


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    directory = pretrain(cfg, method_name())
    metrics = read_json(directory / "summary.json")["metrics"]
    for key in sorted(metrics):
        print(f"{key}: {'undefined' if metrics[key] is None else format(metrics[key], '.4g')}")
    if cfg.push_to_hub is not None and is_main_process():
        push(directory / "pipeline", str(cfg.push_to_hub))
    if cfg.experiment.name is not None and is_main_process():
        print(f"experiment: {record(cfg, method_name(), directory)}")
    print(f"seconds: {time.perf_counter() - start:.0f}")
    print(f"run: {directory}")


if __name__ == "__main__":
    run(main)
