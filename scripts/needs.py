"""List the networks and data that the chain needs, and whether they are available; nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from corpus.sources.huggingface import HuggingFace
from encoders.hub import TransformersEncoder
from encoders.inception import INCEPTION_FILE, INCEPTION_SHA256, InceptionV3
from encoders.packaged import PackagedEncoder
from runtime.application import explained
from runtime.artefacts import file_digest, plain
from train.components import resolve

HERE, ON_HUB, MISSING = "here", "to fetch", "missing"
SPLITS = ("train", "val", "test")
#: Files of networks; one file per line is needed.
AUTOENCODER = (
    ("config.json",),
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
)
TRANSFORMER = (("config.json",), ("model.safetensors", "model.safetensors.index.json"), ("preprocessor_config.json",))
CLIP = (*TRANSFORMER, ("tokenizer.json", "vocab.json"))
PIPELINE = (
    ("model_index.json",),
    ("scheduler/scheduler_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
    ("text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json"),
    *((f"{part}/config.json",) for part in ("unet", "vae", "text_encoder")),
    *(tuple(f"{part}/{name}" for name in AUTOENCODER[1]) for part in ("unet", "vae")),
)


class Need(NamedTuple):
    """An input of the chain.

    Attributes:
        key: configuration key that names it.
        what: description.
        state: `HERE`, `ON_HUB` or `MISSING`.
        advice: if missing, the reason and what to do, in one line.
    """

    key: str
    what: str
    state: str
    advice: str = ""


class Weights(NamedTuple):
    """A network in a folder or on the hub.

    Attributes:
        key: configuration key that names it.
        path: a folder or a hub name.
        files: one file of each entry is needed.
    """

    key: str
    path: str
    revision: str | None
    files: tuple[tuple[str, ...], ...]

    def file(self, name: str) -> Path | None:
        """The path of one of its files on this machine, or None."""
        folder = Path(self.path)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        if not is_hub_name(self.path):
            return None
        result = try_to_load_from_cache(self.path, name, cache_dir=constants.HF_HUB_CACHE, revision=self.revision)
        return Path(result) if isinstance(result, str) else None

    def metadata(self, name: str = "config.json") -> dict[str, Any] | None:
        """The content of one of its JSON files on this machine, or None."""
        try:
            path = self.file(name)
            return None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def autoencoder_weights(cfg: DictConfig) -> Weights:
    below = f"{cfg.autoencoder.get('subfolder')}/" if cfg.autoencoder.get("subfolder") else ""
    files = tuple(tuple(below + name for name in names) for names in AUTOENCODER)
    return Weights("autoencoder.path", resolve(cfg.autoencoder.path), cfg.autoencoder.get("revision"), files)


def text_weights(cfg: DictConfig) -> Weights:
    """The weights of a text encoder that is not trained here."""
    return Weights("text_encoder.path", resolve(cfg.text_encoder.path), cfg.text_encoder.get("revision"), CLIP)


def pipeline_weights(cfg: DictConfig) -> Weights:
    """The weights of `model.pretrained`: a run, a pipeline's folder or a hub name."""
    path = resolve(str(cfg.model.pretrained))
    inside = Path(path) / "pipeline"
    return Weights("model.pretrained", str(inside) if inside.is_dir() else path, None, PIPELINE)


def needs(cfg: DictConfig, with_reference: bool) -> list[Need]:
    """All inputs of the cells of a config.

    Args:
        with_reference: whether a method determines scenes with the reference set.
    """
    result = [network_need(one, cfg.plan.timeout) for one in _weights(cfg)]
    encoders = ("encoder", "evaluation_encoder") if cfg.encoder != cfg.evaluation_encoder else ("encoder",)
    result += [_reported(key, cfg, partial(_encoder_need, key, cfg)) for key in encoders]
    result += [_reported(f"corpus.{split}", cfg, partial(_corpus_need, split, cfg)) for split in SPLITS]
    if with_reference:
        result.append(_reported("reference", cfg, partial(_reference_need, cfg)))
    return result


def _weights(cfg: DictConfig) -> Iterator[Weights]:
    if cfg.model.get("pretrained"):
        yield pipeline_weights(cfg)
    yield autoencoder_weights(cfg)  # also with model.pretrained: networks from scratch are trained on its latents
    if cfg.text_encoder.kind != "train":
        yield text_weights(cfg)


def _reported(key: str, cfg: DictConfig, look: Callable[[], Need]) -> Need:
    """The result of `look`, or a need with the line of its refusal."""
    try:
        return look()
    except Exception as error:
        message = explained(error, cfg.runs)
        if message is None:
            raise
        group = key.partition(".")[0]
        absent = [name for name in not_given(cfg) if name.startswith(f"{group}.")]
        return Need(key, key, MISSING, absent_line(absent[0]) if absent else " ".join(message.split()))


def not_given(cfg: DictConfig) -> list[str]:
    """Keys of a configuration for which the command must give a value."""

    def below(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from below(item, f"{key}.{name}" if key else str(name))
        elif value == "???":
            yield key

    # OmegaConf's own missing_keys fails on references to such a key
    return list(below(OmegaConf.to_container(cfg, resolve=False), ""))


def absent_line(key: str) -> str:
    return f"{key} is not given: give {key}=…"


# ---------------------------------------------------------------- networks


def network_need(weights: Weights, timeout: float) -> Need:
    """Whether a network is in its folder, in the hub's cache, or on the hub."""
    key, path = weights.key, weights.path
    missing = [names[0] for names in weights.files if not any(weights.file(name) for name in names)]
    if not missing:
        return Need(key, path, HERE)
    if Path(path).is_dir() or not is_hub_name(path):
        reason = f"has no {', '.join(missing)}" if Path(path).is_dir() else "does not exist"
        return Need(key, path, MISSING, f"{key}={path} {reason}: give a folder with these files, or a hub name")
    reason = hub_refusal(path, weights.revision, "model", timeout)
    if reason is None:
        return Need(key, path, ON_HUB)
    return Need(key, path, MISSING, f"{key}={path} {reason}; or give a folder with its files as {key}=DIR")


def _encoder_need(key: str, cfg: DictConfig) -> Need:
    encoder = instantiate(cfg[key])
    if isinstance(encoder, TransformersEncoder):
        path = os.path.expanduser(encoder.path)
        return network_need(Weights(f"{key}.path", path, encoder.revision, TRANSFORMER), cfg.plan.timeout)
    if isinstance(encoder, InceptionV3):
        return _inception_need(key, encoder, cfg.plan.timeout)
    if isinstance(encoder, PackagedEncoder):
        encoder.network()  # a small network; loading it reports problems of its package
    return Need(key, encoder.name, HERE)


def _inception_need(key: str, encoder: InceptionV3, timeout: float) -> Need:
    path = Path(encoder.folder).expanduser() / INCEPTION_FILE
    advice = f"put it there, or give its folder as {key}.folder=DIR"
    if path.is_file():
        if INCEPTION_SHA256.startswith(file_digest(path)):
            return Need(key, str(path), HERE)
        return Need(key, str(path), MISSING, f"{path} is not FID's InceptionV3: remove it, then {advice}")
    if not encoder.download:
        return Need(key, str(path), MISSING, f"no {path}, and {key}.download=false: {advice}")
    from cleanfid.downloads_helper import inception_url

    try:
        with urlopen(Request(inception_url, method="HEAD"), timeout=timeout):
            return Need(key, str(path), ON_HUB)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return Need(key, str(path), MISSING, f"no {path}, and {inception_url} cannot be reached ({reason}): {advice}")


# ---------------------------------------------------------------- data


def _corpus_need(split: str, cfg: DictConfig) -> Need:
    return _source_need(f"corpus.{split}", instantiate(cfg.corpus[split]), "corpus.path=DIR", cfg)


def _reference_need(cfg: DictConfig) -> Need:
    source = cfg.reference.source
    if source is None or plain(source) == plain(cfg.corpus.train):
        return Need("reference", "the corpus itself", HERE)
    if source.get("hub") and source.get("root") is None:
        hub = HuggingFace(path=source.hub, config=source.get("config"), name=source.name)
        return _source_need("reference", hub, "reference.root=DIR", cfg)
    return _source_need("reference", instantiate(source), "reference.root=DIR", cfg)


def _source_need(key: str, source: Any, local: str, cfg: DictConfig) -> Need:
    """Whether a source finds its images; a hub data set is not downloaded."""
    if not isinstance(source, HuggingFace) or not _of_hub(source):
        _ = source.version  # lists the files, and raises if there are none
        return Need(key, str(getattr(source, "root", None) or source.name), HERE)
    what = f"{source.path} of the hub"
    if not source.streaming and is_prepared(source.path, source.config):
        return Need(key, what, HERE)
    reason = hub_refusal(source.path, None, "dataset", cfg.plan.timeout)
    if reason is None:
        return Need(key, what, ON_HUB)
    only = f" --include '{source.config}/*'" if source.config else ""
    fetch = f"hf download {source.path} --repo-type dataset{only} --local-dir DIR"
    return Need(
        key,
        what,
        MISSING,
        f"{key}: the data set {source.path} {reason}; or download it with `{fetch}` and give {local}",
    )


def _of_hub(source: HuggingFace) -> bool:
    return is_hub_name(str(source.path)) and not Path(str(source.path)).expanduser().exists()


def is_prepared(name: str, config: str | None) -> bool:
    """Whether `datasets` has prepared a hub data set on this machine."""
    from datasets import config as settings

    folder = Path(settings.HF_DATASETS_CACHE) / name.replace("/", "___") / (config or ".")
    return next(folder.rglob("*.arrow"), None) is not None


# ---------------------------------------------------------------- the hub


def is_hub_name(path: str) -> bool:
    """Whether a path may be a hub name `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


@cache
def hub_refusal(name: str, revision: str | None, kind: str, timeout: float) -> str | None:
    """The reason why a hub repository cannot be downloaded, and what to do; None if it can."""
    if constants.HF_HUB_OFFLINE:
        return "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it on a machine with network access"
    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=timeout)
        if info.gated:
            HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return "is gated: accept its terms on its hub page, and log in with `hf auth login`"
    except RevisionNotFoundError:
        return f"has no revision {revision} on the hub: give another, or null"
    except RepositoryNotFoundError:
        return "is not on the hub, or is private: check its name, or log in with `hf auth login`"
    except (HTTPError, OSError) as error:
        return f"is not in the hub's cache, and the hub cannot be reached ({_reason(error)}): use a machine that can"
    return None


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
