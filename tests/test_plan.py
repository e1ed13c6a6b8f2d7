"""The plan of the chain: cells, costs, finished and missing parts."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from downstream.fine_tuning import loop_options
from downstream.registry import chain_tasks, suitable_names
from prune.selection import select
from report.results import run_name, weighting_name
from runtime.application import CONFIGS
from runtime.artefacts import NotBuilt, nothing_built, stage, write_json
from runtime.errors import UserError
from scripts import needs, plan, reproduce
from scripts.needs import HERE, MISSING, ON_HUB, Need, Weights, network_need
from train.networks import predict

ROOT = Path(__file__).resolve().parent.parent


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """The configuration of a command with these overrides, which further overrides change as in its process."""

    def of(*overrides: str) -> DictConfig:
        monkeypatch.setattr("scripts.chain.changed_config", lambda *more: config(*overrides, *more))
        return config(*overrides)

    return of


def no_references(*_: object) -> Path:
    raise NotBuilt(Path("reference_rows"))


# ---------------------------------------------------------------- cells


def test_the_plan_lists_the_cells_that_run(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = command("profile.seeds=[0,3]", "profile.downstream=[rsprune]", "profile.natural=[rsprune,full]")
    ran, names = [], {}

    def trained(cfg: DictConfig, method: str) -> Path:
        folder = tmp_path / f"run{len(ran)}"
        folder.mkdir()
        (folder / "convergence.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        write_json(folder / "summary.json", {"metrics": {}, "steps": 1})
        write_json(folder / "measured.json", {"balanced": str(folder)})
        write_json(folder / "metrics.json", {})
        names[folder] = method, cfg.train.weighting
        return folder

    def subset(cfg: DictConfig, method: str) -> Path:
        ran.append(("prune", method, cfg.seed, None))
        return trained(cfg, method)

    def pretrain(cfg: DictConfig, method: str) -> Path:
        ran.append(("pretrain", run_name(method, weighting_name(cfg.train.weighting)), cfg.seed, cfg.train.loop.steps))
        return trained(cfg, method)

    def fine_tune(cfg: DictConfig, task: SimpleNamespace, foundation: Path | None, method: str) -> Path:
        assert foundation is None or names[foundation] == (method, 0)
        start = method if foundation is None else f"from {method}"
        ran.append((f"fine-tune {task.name}", start, cfg.seed, loop_options(cfg, foundation).steps))
        return trained(cfg, method)

    write_json(tmp_path / "reference_rows.json", {})
    tasks = {name: SimpleNamespace(name=name, metrics=()) for name in chain_tasks()}
    fakes = {"references": lambda *_: tmp_path, "measured_subset": subset, "pretrain": pretrain,
             "fine_tune": fine_tune, "suitable_tasks": lambda _: tasks, "differences": lambda *_: {},
             "measure_baselines": lambda *_: {}, "dial_cells": lambda *_: iter(()),
             "TASKS": {name: lambda _, task=task: task for name, task in tasks.items()}}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(reproduce, name, fake)
    collections.deque(reproduce.cells(cfg), maxlen=0)

    monkeypatch.setattr(plan, "needs", lambda *_, **__: [Need("encoder", "", MISSING, "no encoder")])
    planned = plan.plan_of(cfg, no_references)
    result = [(row.stage, row.name, row.seed, row.steps) for row in planned.rows if row.stage.split()[0] != "measure"]
    assert result[1:] == ran and result[0][0] == "text encoder"
    assert [row[1] for row in ran if row[0] == "pretrain"][3:5] == ["rsprune, natural weights", "full, natural weights"]
    assert {row.state for row in planned.rows} == {plan.UNKNOWN} and planned.missing == ["no encoder"]
    measured = [row.stage for row in planned.rows if row.stage.startswith("measure")]
    assert len(measured) == 2 + len(ran)


def test_suitable_tasks_are_found_from_the_sources_alone(tiny_folder: Path) -> None:
    assert suitable_names(config()) == list(chain_tasks())
    assert suitable_names(config("corpus=folder", f"corpus.root={tiny_folder}")) == ["super_resolution"]


def test_a_profile_that_fine_tunes_an_untrained_method_is_refused(command) -> None:
    with pytest.raises(UserError, match=r"profile.downstream names \['d2'\]"):
        plan.plan_of(command("profile.downstream=[d2]"), no_references)


# ---------------------------------------------------------------- cost


def counted(network: nn.Module, latents: torch.Tensor, text: torch.Tensor) -> float:
    """Operations of a forward pass, by the shapes of convolutions, linear layers and attention."""
    total = 0

    def layer(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        a_value = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        total += 2 * output.numel() * a_value

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        nonlocal total
        total += 4 * query.numel() * key.shape[-2]
        return query

    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(layer)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        predict(network, latents, torch.zeros(1), text)
    return total


def test_planned_operations_equal_those_of_the_layers() -> None:
    cfg = config("corpus.train.resolution=128")
    sizes = plan.sizes_of(cfg)
    assert sizes == (16, 16, 24, 128)
    cost = plan.Cost(cfg, sizes)
    for conditioned, result in ((False, cost.training), (True, cost.tuning)):
        with torch.device("meta"):
            latents, text = torch.zeros(1, 16 * (1 + conditioned), 16, 16), torch.zeros(1, 24, 128)
        assert result == pytest.approx(3 * counted(plan.network_of(cfg, sizes, conditioned), latents, text), rel=1e-6)
    assert cost.tuning > cost.training
    assert cost.drawing() == pytest.approx(cost.training / 3 * 2 * cfg.eval.steps)
    assert cost.task_drawing() == pytest.approx(cost.tuning / 3 * cfg.downstream.steps)
    assert plan.gpu_hours(989e12 * 0.4 * 7200, cfg) == pytest.approx(2)


def test_network_sizes_of_the_paper_profile_are_known_without_downloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cfg = config("profile=paper")
    assert plan.sizes_of(cfg) == (4, 32, 77, 768)
    network = plan.network_of(cfg, plan.sizes_of(cfg))
    assert sum(parameter.numel() for parameter in network.parameters()) == 859_520_964
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    write_json(tmp_path / "config.json", {"latent_channels": 8, "block_out_channels": [1, 2, 3]})
    assert plan.sizes_of(config("profile=paper", f"autoencoder.path={tmp_path}")) == (8, 64, 77, 768)


# ---------------------------------------------------------------- finished parts


def test_nothing_built_prevents_builds_and_finds_existing_stages(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        pytest.fail("built")

    with nothing_built(), pytest.raises(NotBuilt) as error:
        stage(tmp_path, "bench", {"seed": 1}, build)
    assert list(tmp_path.iterdir()) == []
    directory = stage(tmp_path, "bench", {"seed": 1}, lambda _: None)
    assert error.value.directory == directory
    with nothing_built():
        assert stage(tmp_path, "bench", {"seed": 1}, build) == directory


def test_progress_of_a_training_is_to_do_begun_or_done(tmp_path: Path) -> None:
    assert plan.progress_of(tmp_path / "run") == plan.TO_DO
    for step in (20, 100):
        (tmp_path / "run.partial" / "checkpoints" / f"{step:08d}").mkdir(parents=True)
        write_json(tmp_path / "run.partial" / "checkpoints" / f"{step:08d}" / "state.json", {"step": step})
    assert plan.progress_of(tmp_path / "run") == "begun: step 100"
    (tmp_path / "run.partial").rename(tmp_path / "run")
    write_json(tmp_path / "run" / "stage.json", {})
    assert plan.progress_of(tmp_path / "run") == plan.DONE


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / split / "field").mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "field" / f"{index}.png")
    return root


def test_a_dry_run_finds_finished_stages_and_creates_no_files(command, pictures: Path, tmp_path: Path, capsys) -> None:
    overrides = ["corpus=folder", f"corpus.root={pictures}", "corpus.train.resolution=32", f"runs={tmp_path}/runs",
                 "profile.methods=[full,random]", "profile.downstream=[]", "profile.natural=[]", "leaks=0",
                 "tracker=none", "ratio=0.5"]  # fmt: skip
    cfg = command(*overrides)
    select(config(*overrides, "prune=random"), "random")
    before = sorted((tmp_path / "runs").rglob("*"))
    plan.dry_run(cfg, no_references)
    out = capsys.readouterr().out
    assert sorted((tmp_path / "runs").rglob("*")) == before
    state = {(row.stage, row.name): row.state for row in plan.plan_of(cfg, no_references).rows}
    assert state.pop(("prune", "random")) == plan.DONE
    assert set(state.values()) == {plan.TO_DO}
    assert "missing" not in out and "corpus.train        here      " + str(pictures) in out


@pytest.mark.slow
def test_all_stages_of_a_finished_chain_are_done(command, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """A chain of a few steps; then another sampler, which only measures again and trains nothing."""
    overrides = ["corpus=folder", f"corpus.root={pictures}", "corpus.train.resolution=32", f"runs={tmp_path}/runs",
                 "profile=smoke", "profile.methods=[random]", "profile.downstream=[random]", "profile.natural=[random]",
                 "corpus.train.limit=null", "corpus.val.limit=null", "corpus.test.limit=null",
                 "leaks=0", "tracker=none", "ratio=0.5", "eval.images=4", "eval.convergence_images=4", "eval.steps=1",
                 "text_encoder.train.steps=2", "text_encoder.train.batch_size=4", "train.loop.steps=2",
                 "train.loop.batch_size=4", "downstream.loop.steps=2", "downstream.loop.batch_size=4",
                 "downstream.images=4", "downstream.training_images=8", "downstream.steps=1"]  # fmt: skip
    cfg = command(*overrides)
    monkeypatch.setattr(reproduce, "changed_config", lambda *more: config(*overrides, *more))
    collections.deque(reproduce.cells(cfg), maxlen=0)
    reproduce.references(cfg, "val")
    before = sorted((tmp_path / "runs").rglob("*"))
    rows = plan.plan_of(cfg, reproduce.references).rows
    assert {row.state for row in rows} == {plan.DONE} and len(rows) == 13
    assert "semantic_synthesis" not in {row.name for row in rows}  # the corpus has no masks
    changed = plan.plan_of(command(*overrides, "eval.steps=2"), reproduce.references).rows
    assert {row.stage for row in changed if row.state != plan.DONE} == {"measure"}
    assert sorted((tmp_path / "runs").rglob("*")) == before


# ---------------------------------------------------------------- missing parts


def planned(cfg: DictConfig) -> list[str]:
    result = plan.plan_of(cfg, no_references).missing
    assert all("\n" not in line for line in result)
    return result


@pytest.mark.parametrize(
    ("root", "given"),
    [
        ("gone", "gone does not exist: give a folder"),
        ("empty", "has no images"),
        ("???", "corpus.root is not given"),
        (None, "corpus.root=DIR"),
    ],
)
def test_a_missing_corpus_is_reported_in_one_line(root: str | None, given: str, command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = {"???": "'???'", None: "null"}.get(root, f"{tmp_path}/{root}")
    [line] = planned(command("corpus=folder", f"corpus.root={path}", "prune=random", "reference=none"))
    assert given in line


def test_missing_parts_are_listed_and_end_the_dry_run(command, tmp_path: Path, capsys) -> None:
    cfg = command("corpus=folder", f"corpus.root={tmp_path}/gone", f"autoencoder.path={tmp_path}/vae/of/mine")
    with pytest.raises(UserError, match="2 things are missing"):
        plan.dry_run(cfg, no_references)
    *_, title, first, second = capsys.readouterr().out.splitlines()
    assert title == "missing" and "vae/of/mine does not exist" in first and f"{tmp_path}/gone" in second


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["model=pretrained"], "model.pretrained is not given: give model.pretrained="),
        (["model=dit_s"], "the tasks need model.unet"),
        (["train.views.crop=32"], "give all the same side"),
        (["corpus.train.resolution=60"], "is not a multiple of the autoencoder's 8"),
        (["ratio=1.5"], "ratio"),
        (["train.resume=nowhere"], "train.resume=nowhere contains no checkpoint"),
        (["train.objective.prediction=wind"], "train."),
    ],
)
def test_the_plan_reports_options_that_later_stages_would_refuse(
    overrides, given, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "needs", lambda *_, **__: [Need("encoder", "", ON_HUB)])
    assert any(given in line for line in planned(command(*overrides)))


class FakeHub:
    """Answers as the hub would."""

    def __init__(self, error: type[Exception] | None = None, gated: object = False) -> None:
        self.error, self.gated = error, gated

    def __call__(self) -> FakeHub:
        return self

    def repo_info(self, *_: object, **__: object) -> SimpleNamespace:
        if self.error is not None and not self.gated:
            raise self.error
        return SimpleNamespace(gated=self.gated)

    def auth_check(self, *_: object, **__: object) -> None:
        if self.error is not None:
            raise self.error


def hub_error(kind: type[Exception]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))


@pytest.mark.parametrize(
    ("hub", "given"),
    [
        (FakeHub(), None),
        (FakeHub(gated="auto"), None),
        (FakeHub(hub_error(GatedRepoError), gated="manual"), "is gated"),
        (FakeHub(hub_error(RepositoryNotFoundError)), "is not on the hub"),
        (FakeHub(hub_error(RevisionNotFoundError)), "has no revision abc"),
        (FakeHub(OSError("no\nroute")), "cannot be reached (no route)"),
    ],
)
def test_the_hub_is_asked_for_networks_that_are_not_cached(
    hub, given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs.hub_refusal.cache_clear()
    monkeypatch.setattr(needs, "HfApi", hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    need = network_need(Weights("encoder.path", "owner/name", "abc", needs.TRANSFORMER), 1)
    needs.hub_refusal.cache_clear()
    assert need.state == (ON_HUB if given is None else MISSING)
    assert given is None or (need.advice.startswith(f"encoder.path=owner/name {given}") or given in need.advice)
    assert "\n" not in need.advice


def test_networks_in_the_hub_cache_count_as_present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    weights, commit = Weights("encoder.path", "owner/name", "a" * 40, needs.TRANSFORMER), "a" * 40
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"hidden_size": 3}))
    needs.hub_refusal.cache_clear()
    assert "HF_HUB_OFFLINE" in network_need(weights, 1).advice
    (folder / "model.safetensors").touch()
    assert network_need(weights, 1) == Need("encoder.path", "owner/name", HERE)
    assert weights.metadata() == {"hidden_size": 3}
    (folder / "model.safetensors").unlink()
    need = network_need(weights._replace(path=str(folder)), 1)
    assert need.state == MISSING and "has no model.safetensors" in need.advice


@pytest.mark.slow
def test_the_dry_run_of_the_paper_profile_lists_missing_parts(tmp_path: Path) -> None:
    arguments = ["scripts/reproduce.py", "profile=paper", "dry_run=true", f"evaluation_encoder.folder={tmp_path}",
                 "evaluation_encoder.download=false", f"runs={tmp_path}/runs"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr == "error: the chain cannot run: 6 things are missing, see above\n"
    table, missing = done.stdout.split("\nmissing\n")
    assert len(missing.splitlines()) == 6 and "hf download timm/resisc45" in missing
    assert "pretrain" in table and "1.38e+19" in table
