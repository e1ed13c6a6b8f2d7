"""A page on which a foundation model draws: `python scripts/demo.py foundation=DIR`, or `make demo FOUNDATION=DIR`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from omegaconf import DictConfig
from PIL import Image, ImageOps

from eval.generate import generate
from runtime.application import run
from runtime.artefacts import COMPLETE, plain, read_json
from runtime.errors import UserError
from train.sampler import Sampler, check_settings, load_pipeline, load_sampler
from train.shipped import SHIPPED, foundation_path

CONDITIONAL = ("StableDiffusionInstructPix2PixPipeline",)
#: Side of a picture to paint or look at, alone or as one of three, in screen pixels; most images and solver steps.
CANVAS, TRIPLE, MOST_IMAGES, MOST_STEPS = 448, 360, 32, 100
#: Of a picture: no sharing, which uploads to a public server.
BUTTONS = ["download", "fullscreen"]
#: Small images enlarged, as they are and not smoothed.
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


@dataclass(frozen=True)
class Translator:
    """An image-conditioned pipeline of a downstream run.

    Args:
        run: the directory that its training printed.
    """

    pipeline: DiffusionPipeline
    run: Path

    @property
    def side(self) -> int:
        """Of the images it draws, in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def draw(self, picture: np.ndarray, prompt: str, seed: int, steps: int) -> np.ndarray:
        """The image uint8 [side, side, 3] for a condition picture of the same shape."""
        check_settings(count=1, seed=seed, steps=steps, guidance_scale=1.0)
        settings = {"steps": steps, "guidance_scale": 1.0, "seed": seed, "label": "draw"}
        return generate(self.pipeline, [prompt], image=[Image.fromarray(picture)], **settings)[0]

    def example(self) -> np.ndarray | None:
        """A held-out condition picture that the run kept, uint8 [H, W, 3], or None."""
        path = self.run / "samples" / "inputs.npy"
        return np.load(path)[0] if path.is_file() else None


def load_translator(directory: str, option: str) -> Translator:
    """The image-conditioned pipeline of a downstream run.

    Raises:
        UserError: there is none, or it does not load.
    """
    pipeline, folder = load_pipeline(Path(directory).expanduser(), option, CONDITIONAL)
    return Translator(pipeline, folder.parent if folder.name == "pipeline" else folder)


# ---------------------------------------------------------------- condition pictures


def low_and_bicubic(image: Image.Image, side: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture, cut square, at side / factor and bicubically enlarged again, as super-resolution was trained.

    Returns:
        uint8 [side / factor, side / factor, 3] and uint8 [side, side, 3].
    """
    small = side // factor
    image = image.convert("RGB")
    method = Image.Resampling.BOX if min(image.size) > small else Image.Resampling.BICUBIC
    low = ImageOps.fit(image, (small, small), method)
    return np.asarray(low), np.asarray(low.resize((side, side), Image.Resampling.BICUBIC))


def mask_picture(image: Image.Image, side: int, palette: np.ndarray) -> np.ndarray:
    """A mask in the palette's colours alone, cut square: uint8 [side, side, 3].

    Args:
        image: painted in about these colours, or grey levels 0..K-1 that number the classes; where it is transparent
            it counts as the first class.
        palette: uint8 [K, 3].
    """
    pixels = np.asarray(ImageOps.fit(image.convert("RGBA"), (side, side), Image.Resampling.NEAREST))
    colours = pixels[..., :3].astype(int)
    if (colours == colours[..., :1]).all() and colours.max() < len(palette):
        classes = colours[..., 0]
    else:
        classes = np.square(colours[:, :, None] - palette.astype(int)).sum(axis=-1).argmin(axis=-1)
    return palette[np.where(pixels[..., 3] < 128, 0, classes)]


def factor_of(run: Path, default: int) -> int:
    """By how much a super-resolution run enlarges."""
    facts = run / COMPLETE
    inputs = read_json(facts)["inputs"] if facts.is_file() else {}
    return int(inputs.get("condition", {}).get("factor", default))


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture at about CANVAS pixels, without smoothing."""
    scale = max(1, CANVAS // picture.shape[1])
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


# ---------------------------------------------------------------- the page


def shown(handler: Callable) -> Callable:
    """A handler whose user errors the page shows as one line."""

    @functools.wraps(handler)
    def guarded(*values: Any) -> Any:
        torch.set_flush_denormal(True)  # a setting of the thread: without it the last bits are not those of the script
        try:
            return handler(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return guarded


def drawing(label: str, height: int) -> gr.Image:
    """A place for a picture that a model draws."""
    return gr.Image(
        label=label, height=height, format="png", interactive=False, buttons=BUTTONS, elem_classes="picture"
    )


def seed_and_steps(cfg: DictConfig) -> tuple[gr.Number, gr.Slider]:
    """What both downstream tasks ask for."""
    with gr.Row():
        seed = gr.Number(cfg.seed, label="Seed", precision=0, minimum=0)
        steps = gr.Slider(1, MOST_STEPS, cfg.downstream.steps, step=1, label="Steps")
    return seed, steps


def text_tab(cfg: DictConfig, sampler: Sampler) -> None:
    """Text → image, with the place where the model knows places."""
    placed = {"lon", "lat"} <= set(sampler.fields)

    def draw(
        prompt: str,
        images: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        use_place: bool = False,
        lon: float = 0.0,
        lat: float = 0.0,
    ) -> list[Image.Image]:
        metadata = {"lon": lon, "lat": lat} if use_place else {}
        settings = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        drawn = sampler.draw(prompt or "", images, metadata=metadata, **settings)
        return [Image.fromarray(image) for image in drawn]

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
            if placed:
                with gr.Group():
                    use = gr.Checkbox(False, label="Use place")
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
        shown(draw),
        [prompt, images, seed, steps, guidance, *place],
        gallery,
        api_name="draw",
        concurrency_id="draw",
    )


def super_resolution_tab(cfg: DictConfig, translator: Translator) -> None:
    """A low-resolution picture → an image."""
    side, factor = translator.side, factor_of(translator.run, int(cfg.downstream.super_resolution.factor))

    def enlarge(image: Image.Image | None, seed: int, steps: int) -> tuple[Image.Image, Image.Image]:
        if image is None:
            raise UserError("no picture: upload one")
        _, bicubic = low_and_bicubic(image, side, factor)
        return Image.fromarray(bicubic), Image.fromarray(translator.draw(bicubic, "", seed, steps))

    gr.Markdown(f"A picture is cut square and reduced to {side // factor} px, then drawn again at {side} px.")
    with gr.Row():
        with gr.Column(min_width=260):
            image = gr.Image(
                translator.example(),
                type="pil",
                label="Picture",
                sources=["upload", "clipboard"],
                height=TRIPLE,
                format="png",
                buttons=BUTTONS,
                elem_classes="picture",
            )
            seed, steps = seed_and_steps(cfg)
            button = gr.Button("Enlarge", variant="primary")
        with gr.Column(min_width=260):
            bicubic = drawing("Bicubic", TRIPLE)
        with gr.Column(min_width=260):
            output = drawing("Super-resolution", TRIPLE)
    button.click(shown(enlarge), [image, seed, steps], [bicubic, output], api_name="enlarge", concurrency_id="draw")


def mask_tab(cfg: DictConfig, translator: Translator, palette: Mapping[str, Sequence[int]]) -> None:
    """A painted mask → an image."""
    colours = np.array(list(palette.values()), dtype=np.uint8)
    codes = ["#" + bytes(colour).hex() for colour in colours]

    def from_mask(
        painted: Mapping[str, Any] | None, prompt: str, seed: int, steps: int
    ) -> tuple[Image.Image, Image.Image]:
        image = (painted or {}).get("composite") or (painted or {}).get("background")
        if image is None:
            raise UserError("no mask: paint one, or upload one")
        mask = mask_picture(image, translator.side, colours)
        return Image.fromarray(mask), Image.fromarray(translator.draw(mask, prompt or "", seed, steps))

    swatch = "display:inline-block;width:1em;height:1em;margin-left:.6em;vertical-align:-.15em;border:1px solid #8888"
    legend = " ".join(
        f'<span style="{swatch};background:{code}"></span> {name}' for name, code in zip(palette, codes, strict=True)
    )
    gr.Markdown(
        f"Paint a mask, or upload one in these colours or with the classes' numbers; what is bare counts as "
        f"{next(iter(palette))}.\n\n{legend}"
    )
    example = translator.example()
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
            prompt = gr.Textbox(label="Prompt, as the image would be captioned; may be empty")
            seed, steps = seed_and_steps(cfg)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(min_width=260):
            output = drawing("Image", CANVAS)
            used = drawing("Mask as the model sees it", CANVAS // 2)
    button.click(
        shown(from_mask), [mask, prompt, seed, steps], [used, output], api_name="from_mask", concurrency_id="draw"
    )


def page(cfg: DictConfig) -> gr.Blocks:
    """The page of the models that the options name.

    Raises:
        UserError: one of them is none, or does not load; a mask's colours are not known.
    """
    settings = {"count": cfg.images, "seed": cfg.seed, "steps": cfg.sample.steps}
    check_settings(**settings, guidance_scale=cfg.sample.guidance_scale)
    foundation = foundation_path(SHIPPED if cfg.foundation is None else cfg.foundation)
    sampler = load_sampler(foundation, cfg.sample.batch_size)
    options = {"super_resolution": cfg.demo.super_resolution, "semantic_synthesis": cfg.demo.semantic_synthesis}
    translators = {
        name: load_translator(str(directory), f"demo.{name}")
        for name, directory in options.items()
        if directory is not None
    }
    palette = {}
    if "semantic_synthesis" in translators:
        file = translators["semantic_synthesis"].run / "palette.json"
        if not file.is_file():
            raise UserError(f"demo.semantic_synthesis={file.parent} has no palette.json: give the whole run")
        palette = read_json(file)
    name = foundation.resolve().name
    with gr.Blocks(title="RS-Prune", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# RS-Prune\nRemote-sensing images from the foundation model `{name}`.")
        with gr.Tab("Text → image"):
            text_tab(cfg, sampler)
        if "super_resolution" in translators:
            with gr.Tab("Super-resolution"):
                super_resolution_tab(cfg, translators["super_resolution"])
        if palette:
            with gr.Tab("Mask → image"):
                mask_tab(cfg, translators["semantic_synthesis"], palette)
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
            f"demo.host={options['host']} demo.port={port}: cannot listen there, give another: {error}"
        ) from error
    print(f"demo: {public or address}", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run(main)
