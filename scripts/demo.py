"""A web page on which a foundation model draws: `python scripts/demo.py foundation=DIR`, `make demo FOUNDATION=DIR`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from corpus.masks import IGNORED
from downstream.any_size import TileOptions, agreeing, grid_of, synthesized, upscaled, whole
from downstream.drawing import (
    Synthesizer,
    load_restorer,
    load_synthesizer,
    palette_of,
    with_dial,
    with_settings,
)
from downstream.imagery import Picture, rgb_picture
from downstream.restoration import Restorer
from downstream.shipping import shipped_network
from downstream.tasks.semantic_synthesis import guidance_of
from downstream.tasks.super_resolution import restoration_of
from runtime.application import run
from runtime.artefacts import plain
from runtime.errors import UserError
from train.sampler import Sampler, check_settings, load_sampler
from train.shipped import SHIPPED, foundation_path

#: Side of a single picture and of one of three pictures in screen pixels; largest numbers of images and steps.
CANVAS, TRIPLE, MOST_IMAGES, MOST_STEPS = 448, 360, 32, 100
#: Buttons of a picture; no sharing, which uploads to a public server.
BUTTONS = ["download", "fullscreen"]
#: Enlarges small images without smoothing.
CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto; }
img { image-rendering: pixelated; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.grid-wrap { overflow-y: auto !important; }
"""
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"],
    font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
)


# ---------------------------------------------------------------- pictures


def reduced(image: Image.Image, most: int) -> Image.Image:
    """Reduce a picture by area means so that its longer side has at most `most` pixels."""
    scale = min(1.0, most / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image if scale == 1 else image.convert("RGB").resize(size, Image.Resampling.BOX)


def painted_classes(image: Image.Image, longer: int, palette: np.ndarray) -> np.ndarray:
    """The classes of a painted mask, uint8 [H, W]; the longer side gets `longer` pixels.

    Args:
        image: painted approximately in the palette's colours, or grey levels 0..K-1 that number the classes;
            transparent pixels count as the first class.
        palette: uint8 [K, 3].
    """
    size = tuple(max(1, round(side * longer / max(image.size))) for side in image.size)
    pixels = np.asarray(image.convert("RGBA").resize(size, Image.Resampling.NEAREST))
    colours = pixels[..., :3].astype(int)
    if (colours == colours[..., :1]).all() and colours.max() < len(palette):
        classes = colours[..., 0]
    else:
        classes = np.square(colours[:, :, None] - palette.astype(int)).sum(axis=-1).argmin(axis=-1)
    return np.where(pixels[..., 3] < 128, 0, classes).astype(np.uint8)


def example_of(run: Path) -> np.ndarray | None:
    """A held-out condition picture that a run kept, uint8 [H, W, 3], or None."""
    path = run / "samples" / "inputs.npy"
    return np.load(path)[0] if path.is_file() else None


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture enlarged to about CANVAS pixels, without smoothing."""
    scale = max(1, CANVAS // picture.shape[1])
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def checked_steps(seed: int, steps: int) -> int:
    """The number of solver steps, checked.

    Raises:
        UserError: it or the seed is invalid.
    """
    check_settings(count=1, seed=seed, steps=steps, guidance_scale=1.0)
    return steps


# ---------------------------------------------------------------- the page


def shown(handler: Callable) -> Callable:
    """Wrap a handler so that the page shows user errors as one line."""

    @functools.wraps(handler)
    def guarded(*values: Any) -> Any:
        torch.set_flush_denormal(True)  # a setting per thread; without it the last bits differ from those of the script
        try:
            return handler(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return guarded


@contextlib.contextmanager
def counted(network: nn.Module, calls: int, bar: gr.Progress) -> Iterator[None]:
    """Context in which a progress bar counts the calls of a network."""
    done = itertools.count(1)

    def advance(*_: Any) -> None:
        bar((min(next(done), calls), calls), unit="steps")

    bar((0, calls), unit="steps")
    hook = network.register_forward_hook(advance)
    try:
        yield
    finally:
        hook.remove()


def network_of(pipeline: Any) -> nn.Module:
    """The network that a pipeline calls once per step."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def drawing(label: str, height: int) -> gr.Image:
    """A component for a picture that a model draws."""
    return gr.Image(
        label=label, height=height, format="png", interactive=False, buttons=BUTTONS, elem_classes="picture"
    )


def batches(picture: Picture, model: Restorer | Synthesizer, options: TileOptions) -> int:
    """Number of batches in which a model draws the tiles of a picture; each row of tiles starts a new batch."""
    grid = grid_of(picture, model, options.overlap)
    return len(grid.rows) * -(-len(grid.columns) // options.batch_size)


def absent_tab(name: str, variable: str) -> None:
    """A tab with instructions for a task without a network."""
    gr.Markdown(
        "This tab needs a network that was fine-tuned for the task, and this copy of the repository has none. Train "
        "it with\n"
        f"```\npython downstream/{name}.py foundation=shipped\n```\n"
        f"which prints `run: DIR` when it is done, after some minutes on two CPU cores. Then start the page with\n"
        f"```\nmake demo {variable}=DIR\n```"
    )


def seed_and_steps(cfg: DictConfig) -> tuple[gr.Number, gr.Slider]:
    """The input fields that both downstream tasks share."""
    with gr.Row():
        seed = gr.Number(cfg.seed, label="Seed", precision=0, minimum=0)
        steps = gr.Slider(1, MOST_STEPS, cfg.downstream.steps, step=1, label="Steps")
    return seed, steps


def text_handler(sampler: Sampler) -> Callable[..., list[Image.Image]]:
    """The function of the button of the first tab."""

    def draw(
        prompt: str,
        images: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        bar: gr.Progress = gr.Progress(),  # noqa: B008  where Gradio looks for it, before what may be left out
        use_place: bool = False,
        lon: float = 0.0,
        lat: float = 0.0,
    ) -> list[Image.Image]:
        metadata = {"lon": lon, "lat": lat} if use_place else {}
        settings = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        calls = -(-images // sampler.batch_size) * steps
        with counted(network_of(sampler.pipeline), calls, bar):
            drawn = sampler.draw(prompt or "", images, metadata=metadata, **settings)
        return [Image.fromarray(image) for image in drawn]

    return draw


def text_tab(cfg: DictConfig, sampler: Sampler) -> None:
    """Text → image; with the location if the model knows locations."""
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            prompt = gr.Textbox(
                value=None if cfg.prompt is None else str(cfg.prompt),
                label="Prompt",
                placeholder=cfg.demo.examples[0] if cfg.demo.examples else "a satellite image of …",
                lines=2,
                max_lines=4,
                submit_btn=False,
                autofocus=True,
            )
            button = gr.Button("Draw", variant="primary")
            if cfg.demo.examples:
                gr.Examples(
                    [[str(text)] for text in cfg.demo.examples], [prompt], label="Examples", cache_examples=False
                )
            place: list[gr.components.Component] = []
            if not {"lon", "lat"} <= set(sampler.fields):
                gr.Markdown("This model has no input for locations; a model trained with `metadata=location` has one.")
            else:
                with gr.Group():
                    use = gr.Checkbox(False, label="Use location")
                    names = {"lon": "Longitude", "lat": "Latitude"}
                    fields = {name: sampler.fields[name] for name in names}
                    with gr.Row():
                        place = [
                            gr.Slider(field.low, field.high, (field.low + field.high) / 2, step=0.1, label=names[name])
                            for name, field in fields.items()
                        ]
                place.insert(0, use)
            with gr.Row():
                images = gr.Slider(1, MOST_IMAGES, min(cfg.images, MOST_IMAGES), step=1, label="Images")
                seed = gr.Number(cfg.seed, label="Seed", precision=0, minimum=0)
            with gr.Row():
                steps = gr.Slider(1, MOST_STEPS, min(cfg.sample.steps, MOST_STEPS), step=1, label="Steps")
                guidance = gr.Slider(0, 10, min(cfg.sample.guidance_scale, 10), step=0.1, label="Guidance")
        with gr.Column(scale=3, min_width=340):
            gallery = gr.Gallery(label="Images", columns=4, object_fit="contain", format="png", buttons=BUTTONS)
    gr.on(
        [button.click, prompt.submit],
        shown(text_handler(sampler)),
        [prompt, images, seed, steps, guidance, *place],
        gallery,
        api_name="draw",
        concurrency_id="draw",
    )


def enlarge_handler(cfg: DictConfig, restorer: Restorer) -> Callable[..., tuple[Image.Image, Image.Image]]:
    """The function of the button of the second tab."""
    factor, most = restorer.factor, int(cfg.demo.most_side) // restorer.factor

    def enlarge(
        image: Image.Image | None,
        seed: int,
        steps: int,
        dial: float,
        bar: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Image.Image, Image.Image]:
        if image is None:
            raise UserError("no picture: upload one")
        model = with_dial(with_settings(restorer, steps=checked_steps(seed, steps)), dial)
        picture = rgb_picture(reduced(image, most), "the picture")
        options = TileOptions(cfg.upscale.overlap, cfg.upscale.batch_size, seed)
        size = (picture.width * factor, picture.height * factor)
        bicubic = Image.fromarray(picture.values).resize(size, Image.Resampling.BICUBIC)
        each = (dial < 1) * model.options.mean_draws + (dial > 0) * model.options.samples * steps
        with counted(model.pipeline.unet, batches(picture, model, options) * each, bar):
            return bicubic, Image.fromarray(whole(upscaled(picture, model, options, **agreeing(model))))

    return enlarge


def super_resolution_tab(cfg: DictConfig, restorer: Restorer, example: np.ndarray | None) -> None:
    """A low-resolution picture → an image."""
    factor, most = restorer.factor, int(cfg.demo.most_side) // restorer.factor

    gr.Markdown(
        f"A picture of any shape is enlarged {factor} times. A picture of more than {most} px is first reduced to this "
        "size; `scripts/upscale.py` has no such limit."
    )
    with gr.Row():
        with gr.Column(min_width=260):
            image = gr.Image(
                example,
                type="pil",
                label="Picture",
                sources=["upload", "clipboard"],
                height=TRIPLE,
                format="png",
                buttons=BUTTONS,
                elem_classes="picture",
            )
            dial = gr.Slider(
                0, 1, restorer.options.dial, step=0.05, label="Detail: 0 smooth and faithful, 1 full detail"
            )
            seed, steps = seed_and_steps(cfg)
            button = gr.Button("Enlarge", variant="primary")
        with gr.Column(min_width=260):
            bicubic = drawing("Bicubic", TRIPLE)
        with gr.Column(min_width=260):
            output = drawing("Super-resolution", TRIPLE)
    inputs = [image, seed, steps, dial]
    button.click(
        shown(enlarge_handler(cfg, restorer)), inputs, [bicubic, output], api_name="enlarge", concurrency_id="draw"
    )


def mask_handler(
    cfg: DictConfig, synthesizer: Synthesizer, colours: np.ndarray
) -> Callable[..., tuple[Image.Image, Image.Image]]:
    """The function of the button of the third tab; `colours`: the palette, uint8 [K, 3]."""
    classes = len(synthesizer.classes)

    def from_mask(
        painted: Mapping[str, Any] | None,
        prompt: str,
        seed: int,
        steps: int,
        longer: int,
        bar: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Image.Image, Image.Image]:
        image = (painted or {}).get("composite") or (painted or {}).get("background")
        if image is None:
            raise UserError("no mask: paint one, or upload one")
        model = with_settings(synthesizer, steps=checked_steps(seed, steps), prompt=prompt or "")
        mask = painted_classes(image, int(longer), colours)
        numbers = np.where(mask < classes, mask, np.uint8(IGNORED))
        options = TileOptions(cfg.synthesize.overlap, cfg.synthesize.batch_size, seed)
        picture = Picture(numbers)
        with counted(model.pipeline.unet, batches(picture, model, options) * steps, bar):
            return Image.fromarray(colours[mask]), Image.fromarray(whole(synthesized(picture, model, options)))

    return from_mask


def legend(palette: Iterable[str], codes: Iterable[str]) -> str:
    """HTML of the names of the classes, each behind a square of its colour."""
    swatch = "display:inline-block;width:1em;height:1em;margin-left:.6em;vertical-align:-.15em;border:1px solid #8888"
    return " ".join(
        f'<span style="{swatch};background:{code}"></span> {name}' for name, code in zip(palette, codes, strict=True)
    )


def mask_tab(
    cfg: DictConfig,
    synthesizer: Synthesizer,
    palette: Mapping[str, Sequence[int]],
    example: np.ndarray | None,
) -> None:
    """A painted mask → an image."""
    colours = np.array(list(palette.values()), dtype=np.uint8)
    codes = ["#" + bytes(colour).hex() for colour in colours]
    most = int(cfg.demo.most_side)
    gr.Markdown(
        f"Paint a mask, or upload a mask of any shape in these colours or with class numbers. Unpainted pixels count "
        f"as {next(iter(palette))}.\n\n{legend(palette, codes)}"
    )
    with gr.Row():
        with gr.Column(min_width=460):
            mask = gr.ImageEditor(
                None if example is None else enlarged(example),
                type="pil",
                label="Mask",
                brush=gr.Brush(default_size=40, colors=codes, default_color=codes[0], color_mode="fixed"),
                layers=False,
                transforms=(),
                sources=("upload", "clipboard"),
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                height=CANVAS + 110,
                format="png",
            )
            prompt = gr.Textbox(label="Prompt: a caption of the image; may be empty")
            seed, steps = seed_and_steps(cfg)
            longer = gr.Slider(
                1,
                most,
                min(synthesizer.side, most),
                step=1,
                label="Longer side of the image and of its mask, in pixels",
            )
            button = gr.Button("Draw", variant="primary")
        with gr.Column(min_width=260):
            output = drawing("Image", CANVAS)
            used = drawing("Mask that the model receives", CANVAS // 2)
    button.click(
        shown(mask_handler(cfg, synthesizer, colours)),
        [mask, prompt, seed, steps, longer],
        [used, output],
        api_name="from_mask",
        concurrency_id="draw",
    )


def network_folder(cfg: DictConfig, task: str) -> Path | None:
    """The run that the options name for a task, else the shipped network; None if there is neither."""
    directory = cfg.demo[task]
    return shipped_network(cfg, task) if directory is None else Path(str(directory)).expanduser()


def page(cfg: DictConfig) -> gr.Blocks:
    """The page for the models that the options name.

    Raises:
        UserError: a model does not exist or does not load, or the colours of a mask are unknown.
    """
    settings = {"count": cfg.images, "seed": cfg.seed, "steps": cfg.sample.steps}
    check_settings(**settings, guidance_scale=cfg.sample.guidance_scale)
    foundation = foundation_path(SHIPPED if cfg.foundation is None else cfg.foundation)
    sampler = load_sampler(foundation, cfg.sample.batch_size)
    runs = {name: run for name in ("super_resolution", "semantic_synthesis") if (run := network_folder(cfg, name))}
    steps, restorer, synthesizer = int(cfg.downstream.steps), None, None
    if folder := runs.get("super_resolution"):
        factor = int(cfg.downstream.super_resolution.factor)
        restorer = load_restorer(
            folder, "demo.super_resolution", steps=steps, factor=factor, options=restoration_of(cfg)
        )
    if folder := runs.get("semantic_synthesis"):
        synthesizer = load_synthesizer(folder, "demo.semantic_synthesis", steps=steps, guidance=guidance_of(cfg))
        palette = palette_of(folder, "demo.semantic_synthesis")
    name = foundation.resolve().name
    with gr.Blocks(title="RS-Prune", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# RS-Prune\nRemote-sensing images from the foundation model `{name}`.")
        with gr.Tab("Text → image"):
            text_tab(cfg, sampler)
        with gr.Tab("Super-resolution"):
            if restorer is None:
                absent_tab("super_resolution", "SUPER_RESOLUTION")
            else:
                super_resolution_tab(cfg, restorer, example_of(runs["super_resolution"]))
        with gr.Tab("Mask → image"):
            if synthesizer is None:
                absent_tab("semantic_synthesis", "SEMANTIC_SYNTHESIS")
            else:
                mask_tab(cfg, synthesizer, palette, example_of(runs["semantic_synthesis"]))
    return blocks


def main(cfg: DictConfig) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    options = plain(cfg.demo)
    port = options["port"]
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise UserError(f"demo.port={port}: give a whole number from 1 to 65535")
    blocks = page(cfg)
    try:
        _, address, public = blocks.launch(
            server_name=str(options["host"]),
            server_port=port,
            share=bool(options["share"]),
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            theme=THEME,
            css=CSS,
        )
    except OSError as error:
        raise UserError(
            f"demo.host={options['host']} demo.port={port}: cannot listen there, give another port: {error}"
        ) from error
    print(f"demo: {public or address}", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run(main)
