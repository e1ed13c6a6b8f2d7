"""The frozen parts of a foundation model, loaded from this repository, a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs, set_seed
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from omegaconf import DictConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import CLIPTextModel, CLIPTokenizer

from corpus.index import Corpus
from encoders.clip_scores import ClipScorer, load_clip
from encoders.pixels import LOAD_ERRORS
from runtime.artefacts import file_digest, fingerprint, stage
from runtime.errors import UserError
from runtime.launch import check_launch, requested_plugin
from runtime.tracking import track
from train.loop import LoopOptions
from train.objective import prediction_of
from train.text_encoder import clip_tokenizer, small_clip, train_clip

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TextParts:
    """Text encoder and tokenizer, and the CLIP model to which they belong, for evaluation (None without an image
    encoder).

    `place` is the location of the CLIP model, for `eval.measuring_any.SCORER`.
    """

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    fingerprint: str
    scorer: ClipScorer | None = None
    place: dict[str, Any] | None = None


def make_accelerator(cfg: DictConfig) -> Accelerator:
    """Create the Accelerator, which decides device, precision and processes; also seed the libraries' global
    generators.

    Raises:
        UserError: this machine does not support the launch or the precision.
    """
    check_launch()
    set_seed(int(cfg.seed))
    precision, plugin = str(cfg.train.mixed_precision), requested_plugin()
    if plugin and precision == "fp16":
        raise UserError(f"{plugin} does not support train.mixed_precision=fp16: give bf16 or no")
    # the others wait at a barrier while the first process evaluates, longer than the default of ten minutes
    options = {"kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(days=1))], "mixed_precision": precision}
    if plugin == "FSDP":  # weights stay in float32 and autocast sets each operation's type, as without shards
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    if plugin == "DeepSpeed":
        options["mixed_precision"] = "no"
    try:
        accelerator = Accelerator(**options)
        if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:  # or it would train in full precision
            raise ValueError("no gradient scaler on this device")
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"train.mixed_precision={precision} does not work here ({reason}): give no or bf16") from error
    if plugin == "DeepSpeed":
        _settle_deepspeed(accelerator.state.deepspeed_plugin, precision)
    return accelerator


def _settle_deepspeed(plugin: DeepSpeedPlugin, precision: str) -> None:
    """Refuse unsupported options (UserError), and let DeepSpeed use PyTorch's autocast as in other launches."""
    config = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2):
        raise UserError(
            f"DeepSpeed's zero_stage={plugin.zero_stage} is not supported: give 1 or 2, or launch with "
            "configs/accelerate/fsdp.yaml, which shards the weights too"
        )
    if config.get("gradient_accumulation_steps") not in (None, 1, "auto"):
        raise UserError(
            "DeepSpeed's config sets gradient_accumulation_steps: leave it out and set train.loop.micro_batch"
        )
    config["torch_autocast"] = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    # the default of 5e8 elements takes more memory than sharding the moments of a network of this size saves
    buckets = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    config["zero_optimization"] = {**buckets, **config["zero_optimization"]}


def first_process_decides(cfg: DictConfig) -> Callable[[bool], bool]:
    """The argument `together` of `runtime.artefacts.stage`, for stages that train over all processes of a launch.

    The returned function gives every process the answer of the first one.
    """

    def answer(own: bool) -> bool:
        accelerator = make_accelerator(cfg)
        given = torch.tensor(int(own), device=accelerator.device)
        return bool(accelerator.reduce(given, "sum"))

    return answer


def precision(cfg: DictConfig) -> dict[str, str]:
    """The precision as an input of a training stage's fingerprint; empty for full precision."""
    chosen = str(cfg.train.mixed_precision)
    return {} if chosen == "no" else {"mixed_precision": chosen}


def resolve(path: str) -> str:
    """A path as given, or relative to the repository; hub names are returned unchanged."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.exists():
            return str(candidate)
    return path


def _pinned(group: str, cfg: DictConfig) -> str:
    """Part of the message about a hub network that cannot be loaded: its pinned revision, if there is one."""
    revision = cfg[group].get("revision")
    return f" ({group}.revision={revision}; another network needs one of its own, or null)" if revision else ""


def load_autoencoder(cfg: DictConfig) -> tuple[nn.Module, str]:
    """Load the frozen autoencoder of `autoencoder.path` (a folder or a hub name); returns it and its fingerprint.

    Raises:
        UserError: it cannot be found.
    """
    path, revision = resolve(cfg.autoencoder.path), cfg.autoencoder.get("revision")
    loader, subfolder = getattr(diffusers, cfg.autoencoder.class_name), cfg.autoencoder.get("subfolder")
    try:
        autoencoder = loader.from_pretrained(path, subfolder=subfolder, revision=revision, use_safetensors=True)
    except LOAD_ERRORS as error:
        raise UserError(
            f"no {cfg.autoencoder.class_name} at autoencoder.path={cfg.autoencoder.path}{_pinned('autoencoder', cfg)}: "
            "run `make autoencoder`, give a folder or a hub name that can be reached, or choose "
            "autoencoder=bluemarble_f8c16"
        ) from error
    folder = Path(path) / (subfolder or "")
    weights = [file_digest(file) for file in sorted(folder.glob("*.safetensors"))]
    weights = weights if folder.is_dir() else [str(folder), revision]
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    return autoencoder.eval().requires_grad_(False), fingerprint(weights=weights, config=config)


def load_text_parts(cfg: DictConfig, corpus: Corpus) -> TextParts:
    """The text encoder: trained on the corpus (cached), or loaded from a folder or the hub.

    Raises:
        UserError: it cannot be found.
    """
    options, revision = cfg.text_encoder, cfg.text_encoder.get("revision")
    if options.kind == "train":
        directory = _train_text_encoder(cfg, corpus)
        folders = {name: str(directory / name) for name in ("clip", "text_encoder", "tokenizer")}
        key = directory.name
    else:
        path = resolve(options.path)
        folders = {"clip": path, "text_encoder": path, "tokenizer": path}
        files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if Path(path).is_dir() else []
        key = fingerprint(files=[file_digest(file) for file in files]) if files else f"{path}@{revision}"
    trained = options.kind == "train"
    try:
        text_encoder = CLIPTextModel.from_pretrained(folders["text_encoder"], revision=revision, use_safetensors=True)
        scorer = load_clip(folders["clip"], folders["tokenizer"], options.score_name, revision=revision, plain=trained)
    except LOAD_ERRORS as error:
        raise UserError(
            f"no CLIP model at text_encoder.path={options.get('path')}{_pinned('text_encoder', cfg)}: give a "
            "folder or a hub name that can be reached, or train one here with text_encoder=clip_local"
        ) from error
    place = {"name": options.score_name, "revision": revision, "plain": trained}
    place |= {"folder": folders["clip"], "tokenizer": folders["tokenizer"]}
    return TextParts(text_encoder.eval().requires_grad_(False), scorer.tokenizer, key, scorer, place)


def _train_text_encoder(cfg: DictConfig, corpus: Corpus) -> Path:
    options = cfg.text_encoder

    def build(directory: Path) -> None:
        accelerator = make_accelerator(cfg)
        tokenizer = clip_tokenizer(options.max_length)
        model = small_clip(
            corpus.resolution,
            width=options.width,
            layers=options.layers,
            patch=options.patch,
            max_length=options.max_length,
            seed=options.seed,
        )
        loop = LoopOptions(**options.train, seed=options.seed)
        with track(cfg, "text_encoder", "clip_local") as tracker:
            model = train_clip(model, tokenizer, corpus, accelerator, loop, directory, log=tracker.log)
        if not accelerator.is_main_process:
            return
        model.save_pretrained(directory / "clip")
        text_encoder = CLIPTextModel(model.config.text_config)
        prefix = "text_model."
        state = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
        own = text_encoder.state_dict()
        if not set(state) <= set(own):  # transformers 5 drops the prefix
            state = {key.removeprefix(prefix): value for key, value in state.items()}
        text_encoder.load_state_dict(state)
        text_encoder.save_pretrained(directory / "text_encoder")
        tokenizer.save_pretrained(directory / "tokenizer")

    inputs = {"corpus": corpus.fingerprint, "options": options, **precision(cfg)}
    inputs |= {"captions": corpus.captions} if corpus.captions else {}
    return stage(cfg.runs, "text_encoder", inputs, build, resumable=True, together=first_process_decides(cfg))


@dataclass(frozen=True)
class Pretrained:
    """The parts of a pipeline from which a training continues."""

    network: UNet2DConditionModel
    autoencoder: nn.Module
    text: TextParts
    fingerprint: str


def load_pretrained(cfg: DictConfig) -> Pretrained:
    """Load the StableDiffusionPipeline of `model.pretrained`: a folder, a run of this repository or a hub name.

    Raises:
        UserError: it cannot be found, is another kind of pipeline, or its prediction type is not that of the objective.
    """
    name = str(cfg.model.pretrained)
    path = resolve(name)
    if (Path(path) / "pipeline" / "model_index.json").is_file():
        path = str(Path(path) / "pipeline")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None, feature_extractor=None, requires_safety_checker=False, use_safetensors=True
        )
    except (*LOAD_ERRORS, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no StableDiffusionPipeline at model.pretrained={name} ({reason}): give a run of this repository, a "
            "pipeline's folder or a hub name that can be reached, or train from scratch with model=ldm_tiny"
        ) from error
    learned, requested = prediction_of(pipeline.scheduler), cfg.train.objective.prediction
    if learned != requested:
        raise UserError(
            f"model.pretrained={name} predicts {learned}, but train.objective.prediction={requested}: give "
            f"train.objective.prediction={learned}"
        )
    files = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else []
    key = fingerprint(files=[file_digest(file) for file in files]) if files else path
    for part in (pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    text = TextParts(pipeline.text_encoder, pipeline.tokenizer, f"{key}/text")
    return Pretrained(pipeline.unet, pipeline.vae, text, key)
