"""Compare new images with a kept set: `python prune/arrive.py selection=DIR corpus=folder corpus.root=new`."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from prune.arrival_stages import arrive
from prune.kept import as_selected, open_selection
from runtime.application import run


def main(cfg: DictConfig) -> None:
    kept = open_selection(cfg.selection)
    given = dict(text.lstrip("+~").partition("=")[::2] for text in HydraConfig.get().overrides.task)
    print(f"arrivals: {arrive(as_selected(cfg, kept, given), kept)}")


if __name__ == "__main__":
    run(main)
