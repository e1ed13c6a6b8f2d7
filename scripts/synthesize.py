"""Draw images of any size from masks: `python scripts/synthesize.py mask=PATH out=PATH [run=DIR]`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from downstream.any_size import TileOptions, Translation, grid_of, jobs_of, synthesized, translate
from downstream.command import run_or_fine_tuned
from downstream.drawing import colour_numbers, load_synthesizer, palette_of
from downstream.imagery import RASTERS, open_mask
from downstream.tasks.semantic_synthesis import guidance_of
from runtime.application import run
from train.sampler import check_settings


def suffix_of(mask: Path) -> str:
    """Suffix of the image of a mask in a folder: GeoTIFFs stay GeoTIFFs, all others become PNG."""
    return mask.suffix if mask.suffix.lower() in RASTERS else ".png"


def main(cfg: DictConfig) -> None:
    settings = cfg.synthesize
    steps = cfg.downstream.steps if settings.steps is None else settings.steps
    check_settings(count=1, seed=cfg.seed, steps=steps, guidance_scale=1.0)
    options = TileOptions(settings.overlap, settings.batch_size, cfg.seed)
    jobs = jobs_of(cfg.mask, cfg.out, "mask", suffix_of)
    directory = run_or_fine_tuned(cfg, "semantic_synthesis")
    prompt = "" if cfg.prompt is None else str(cfg.prompt)
    synthesizer = load_synthesizer(directory, "run", steps=steps, prompt=prompt, guidance=guidance_of(cfg))
    colours = colour_numbers(palette_of(directory, "run"))
    target = Path(str(cfg.out)).expanduser()
    translation = Translation(
        opened=lambda path: open_mask(path, synthesizer.classes, colours),
        grid=lambda source: grid_of(source, synthesizer, options.overlap),
        drawn=lambda source, advance: synthesized(source, synthesizer, options, advance=advance),
        factor=1,
        label="synthesize",
    )
    translate(jobs, target, translation)
    print(f"synthesized: {target}")


if __name__ == "__main__":
    run(main)
