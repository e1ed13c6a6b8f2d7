"""Enlarge images of any size by super-resolution: `python scripts/upscale.py in=PATH out=PATH [run=DIR]`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from downstream.any_size import TileOptions, Translation, agreeing, grid_of, jobs_of, translate, upscaled
from downstream.command import run_or_fine_tuned
from downstream.drawing import load_restorer
from downstream.imagery import open_image
from downstream.tasks.super_resolution import restoration_of
from runtime.application import run
from train.sampler import check_settings


def main(cfg: DictConfig) -> None:
    settings = cfg.upscale
    steps = cfg.downstream.steps if settings.steps is None else settings.steps
    check_settings(count=1, seed=cfg.seed, steps=steps, guidance_scale=1.0)
    options = TileOptions(settings.overlap, settings.batch_size, cfg.seed)
    jobs = jobs_of(cfg["in"], cfg.out, "in", lambda path: path.suffix)
    restorer = load_restorer(
        run_or_fine_tuned(cfg, "super_resolution"),
        "run",
        steps=steps,
        factor=int(cfg.downstream.super_resolution.factor),
        options=restoration_of(cfg),
        noise_level=int(settings.noise_level),
    )
    target = Path(str(cfg.out)).expanduser()
    translation = Translation(
        opened=open_image,
        grid=lambda source: grid_of(source, restorer, options.overlap),
        drawn=lambda source, advance: upscaled(source, restorer, options, advance=advance, **agreeing(restorer)),
        factor=restorer.factor,
        label="upscale",
    )
    translate(jobs, target, translation)
    print(f"upscaled: {target}")


if __name__ == "__main__":
    run(main)
