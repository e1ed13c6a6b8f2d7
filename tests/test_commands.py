"""The real commands, as a user types them, with the smoke profile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from eval.metrics import Quantity

ROOT = Path(__file__).resolve().parent.parent
#: The evaluation encoder of the default config.
EVALUATION = "efficientnet_lite2"
KID = Quantity("kid_x1000", EVALUATION, "balanced").name


def command(*arguments: str, cwd: Path) -> list[str]:
    script, *overrides = arguments
    return [sys.executable, str(ROOT / script), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, cwd=cwd), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """`call` in a fork of a process that has already imported the libraries, which saves most of the time."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forkserver.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment(), text=True,
    )  # fmt: skip
    output = tmp_path_factory.mktemp("output")

    def call_forked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        script, *overrides = arguments
        request = {
            "script": str(ROOT / script), "arguments": overrides, "cwd": str(cwd), "environment": environment(),
            "stdout": str(output / "stdout"), "stderr": str(output / "stderr"),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [(output / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, code, *texts)

    yield call_forked
    server.stdin.close()
    server.wait()


def ran(*arguments: str, cwd: Path, by=call) -> Path:
    """The result directory that a command prints last, after it has succeeded."""
    done = by(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    kind, _, directory = done.stdout.strip().splitlines()[-1].partition(": ")
    assert kind in ("selection", "run", "results")
    return cwd / directory


@pytest.fixture(scope="module")
def home(tmp_path_factory, forked) -> Path:
    """A working directory in which the complete smoke profile has run, after one kill."""
    directory = tmp_path_factory.mktemp("smoke")
    process = subprocess.Popen(
        command("scripts/reproduce.py", "profile=smoke", cwd=directory),
        cwd=directory,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # killed in the middle of the first pretraining, after its first checkpoint
    deadline = time.monotonic() + 600
    while not list(directory.glob("runs/pretrain/*.partial/checkpoints/*0")):
        assert process.poll() is None, "the smoke run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "results" / "smoke" / "report.html").exists()
    done = forked("scripts/reproduce.py", "profile=smoke", cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_reproduce_writes_the_documented_rows_tables_figures_and_report(home):
    results = home / "results" / "smoke"
    rows = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} >= {
        "reference", "subset", "generation", "convergence", "super_resolution", "semantic_synthesis",
    }  # fmt: skip
    for row in rows:
        assert set(row) - {"dial"} == {
            "stage", "corpus", "prune", "ratio", "seed", "step", "metrics", "fingerprint", "commit", "machine",
            "config", "seconds",
        }  # fmt: skip
    generated = {row["prune"] for row in rows if row["stage"] == "generation"}
    assert generated == {"full", "random", "rsprune"}
    for row in rows:
        if row["stage"] == "generation":
            for name in ("fd", "kid_x1000", "precision", "recall"):
                for held_out in ("balanced", "natural"):
                    for encoder in ("efficientnet_lite0", EVALUATION):
                        assert np.isfinite(row["metrics"][Quantity(name, encoder, held_out).name])
            assert np.isfinite(row["metrics"]["balanced_clip_local"])
    restored = {row["prune"] for row in rows if row["stage"] == "super_resolution"}
    assert restored == {"rsprune", "scratch", "nearest", "bicubic", "lanczos"}
    for name in ("generation", "convergence", "subset_quality", "super_resolution", "semantic_synthesis"):
        for suffix in ("md", "tex", "csv"):
            assert (results / "tables" / f"{name}.{suffix}").stat().st_size > 0
    assert list((results / "figures").glob("*.png"))
    page = (results / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "data:image/" in page


def test_the_plan_of_a_finished_chain_has_nothing_left(home, forked):
    stages = sorted(str(path) for path in (home / "runs").glob("*/*"))
    done = forked("scripts/reproduce.py", "profile=smoke", "dry_run=true", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    [(finished, planned)] = re.findall(r"^done: (\d+) of (\d+); left: 0 optimizer steps", done.stdout, re.M)
    assert finished == planned and "to do" not in done.stdout
    assert sorted(str(path) for path in (home / "runs").glob("*/*")) == stages


def test_a_second_reproduce_is_a_cache_hit_with_the_same_tables(home, forked):
    tables = home / "results" / "smoke" / "tables"
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    stages = sorted(str(path) for path in (home / "runs").glob("*/*"))
    start = time.monotonic()
    done = forked("scripts/reproduce.py", "profile=smoke", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before
    assert sorted(str(path) for path in (home / "runs").glob("*/*") if "wandb" not in str(path)) == [
        stage for stage in stages if "wandb" not in stage
    ]
    assert done.stdout.strip().splitlines()[-1].startswith("results: ")
    print(f"second run: {time.monotonic() - start:.0f} s")


@pytest.mark.slow
def test_a_killed_and_resumed_run_gives_the_tables_of_an_uninterrupted_run(home, forked, tmp_path):
    done = forked("scripts/reproduce.py", "profile=smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in sorted((home / "results" / "smoke" / "tables").iterdir()):
        assert (tmp_path / "results" / "smoke" / "tables" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["options", "config"])
def test_two_processes_pretrain_with_the_same_curve_as_one(home, forked, tmp_path, launch):
    """`accelerate launch` with two CPU processes (gloo): the same global batch, so the same curve."""
    arguments = ["profile=smoke", "prune=rsprune", "ratio=0.85", "tracker=none"]
    alone = ran("train/pretrain.py", *arguments, cwd=home, by=forked)
    # the same earlier stages: those that a launch trains anew differ slightly, and that changes the images
    shutil.copytree(home / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("pretrain", "wandb"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    variables = {**environment(), "OMP_NUM_THREADS": "1"}
    if launch == "options":
        launcher += ["--cpu", "--num_processes", "2"]
    else:
        config = ROOT / "configs" / "accelerate" / "multi_cpu.yaml"
        launcher += ["--config_file", str(config), "--main_process_port", "0"]
        variables["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*launcher, str(ROOT / "train/pretrain.py"), *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=variables, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = [line for line in done.stdout.splitlines() if line.startswith("run: ")]
    assert len(results) == 1  # only the first process prints
    curves = [
        pd.read_json(path / "convergence.jsonl", lines=True)
        for path in (alone, tmp_path / results[0].removeprefix("run: "))
    ]
    np.testing.assert_allclose(curves[1]["loss"], curves[0]["loss"], rtol=1e-4)
    np.testing.assert_allclose(curves[1][KID], curves[0][KID], rtol=0.01)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.objective.prediction=v_prediction", "train.objective.zero_terminal_snr=true", "metadata=location",
         "tracker=none"),
        ("model=dit_s", "model.transformer.num_layers=2", "model.transformer.num_attention_heads=2",
         "model.transformer.attention_head_dim=16", "train.loop.micro_batch=8", "tracker=tensorboard"),
    ],
    ids=["v_prediction_and_locations", "transformer_and_tensorboard"],
)  # fmt: skip
def test_other_objectives_networks_and_metadata_give_a_complete_run(home, overrides, forked):
    """Another objective, network, and metadata with the caption: the run is complete and its pipeline loads."""
    directory = ran(
        "train/pretrain.py", "profile=smoke", "prune=rsprune", "ratio=0.85", "train.loop.steps=4",
        "train.snapshots=1", "+eval.targets.loss=0.001", *overrides, cwd=home, by=forked,
    )  # fmt: skip
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["convergence"]["reached"]["loss"]["step"] is None
    assert 0 <= summary["metrics"]["balanced_scene_accuracy_local"] <= 1 and summary["scene_accuracy_real"] > 0.2
    card = (directory / "pipeline" / "README.md").read_text()
    assert "72 were kept" in card and "public domain" in card
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(directory / "pipeline")
    if "metadata=location" in overrides:
        assert (directory / "samples" / "locations_000004.png").is_file()
        assert (directory / "pipeline" / "metadata_encoder" / "model.safetensors").is_file()
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
    else:
        assert type(pipeline).__name__ == "PixArtAlphaPipeline" and "max_sequence_length" in card
        assert list((home / "runs" / "tensorboard").glob("pretrain-rsprune-0.85-*/events*"))


@pytest.mark.slow
def test_low_rank_training_from_a_pipeline_changes_only_attention_weights(home, forked):
    first = ran(
        "train/pretrain.py", "profile=smoke", "prune=rsprune", "ratio=0.85", "tracker=none", cwd=home, by=forked
    )
    directory = ran(
        "train/pretrain.py", "profile=smoke", "prune=random", "ratio=0.85", "tracker=none", "train.loop.steps=4",
        "train.snapshots=1", "model=lora", f"model.pretrained={first}", cwd=home, by=forked,
    )  # fmt: skip
    assert [path.name for path in (directory / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    old, new = (
        load_file(path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for path in (first, directory)
    )
    changed = {key for key, value in new.items() if not value.equal(old[key])}
    assert set(new) == set(old) and changed
    assert all(".attn" in key and key.endswith("weight") for key in changed)


def test_prune_writes_the_documented_table_summary_and_report(home, forked):
    directory = ran("prune/run.py", "profile=smoke", "prune=rsprune", "ratio=0.85", cwd=home, by=forked)
    table = pd.read_parquet(directory / "selection.parquet")
    assert list(table.columns) == [
        "id", "kept", "reason", "entropy", "scene", "scene_similarity", "cluster", "centroid_distance",
        "weight",
    ]  # fmt: skip
    assert table["kept"].sum() == len(table) - round(0.85 * len(table)) == 72
    assert table["entropy"].dtype == table["scene_similarity"].dtype == np.float32
    assert table["cluster"].dtype == np.int32 and table["kept"].dtype == bool
    assert table["weight"].dtype == np.float32 and table["weight"].sum() == 480
    assert ((table["weight"] >= 1) == table["kept"]).all()
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["kept"] == 72 and summary["images"] == 480 and summary["unreadable"] == 0
    assert sum(counts["after"] for counts in summary["true_scenes"].values()) == 72
    assert (directory / "report.html").stat().st_size > 10_000


def test_plain_diffusers_draws_with_the_pipeline_of_pretrain(home, forked):
    directory = ran("train/pretrain.py", "profile=smoke", "prune=rsprune", "tracker=none", cwd=home, by=forked)
    assert {"pipeline", "convergence.jsonl", "samples", "checkpoints", "summary.json"} <= set(os.listdir(directory))
    lines = [json.loads(line) for line in (directory / "convergence.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert {"images_seen", "seconds", "loss", KID} <= set(lines[0])
    draw = (
        "import sys; from diffusers import DiffusionPipeline; p = DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "i = p('a satellite image of desert', num_inference_steps=2, height=64, width=64).images[0];"
        "print(type(p).__name__, i.size)"
    )
    plain = subprocess.run(
        [sys.executable, "-c", draw, str(directory / "pipeline")], cwd="/", capture_output=True, text=True, timeout=300
    )
    assert plain.stdout.strip() == "StableDiffusionPipeline (64, 64)", plain.stderr[-2000:]


def test_measuring_a_run_again_gives_the_metrics_of_its_summary(home, forked):
    runs = json.loads((home / "results" / "smoke" / "runs.json").read_text())
    (run,) = runs["foundation/rsprune"]
    done = forked("eval/measure.py", f"of={run}", "profile=smoke", "tracker=none", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, metrics, last = done.stdout.strip().splitlines()
    assert last.startswith("results: ")
    measured = json.loads(metrics)
    summary = json.loads((home / run / "summary.json").read_text())
    assert set(measured) == set(summary["metrics"])
    for key, value in measured.items():
        assert value == pytest.approx(summary["metrics"][key], rel=1e-5), key


def test_tables_are_regenerated(home, forked):
    tables = home / "results" / "smoke" / "tables"
    before = (tables / "generation.md").read_text()
    (tables / "generation.md").unlink()
    done = forked("scripts/tables.py", "profile=smoke", "tracker=none", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tables / "generation.md").read_text() == before


@pytest.mark.slow
def test_quality_compares_methods_over_ratios(home, forked):
    results = ran(
        "scripts/quality.py", "profile=smoke", "tracker=none", "quality.methods=[full,random,rsprune,semdedup]",
        "quality.ratios=[0.5,0.9]", cwd=home, by=forked,
    )  # fmt: skip
    table = pd.read_csv(results / "subset_quality.csv")
    assert list(zip(table["prune"], table["ratio"], strict=True)) == [
        ("full", 0.0), ("random", 0.5), ("random", 0.9), ("rsprune", 0.5), ("rsprune", 0.9), ("semdedup", 0.5),
        ("semdedup", 0.9),
    ]  # fmt: skip
    names = ["scene_entropy", "near_duplicates", "low_information", f"vendi_{EVALUATION}"]
    names += [f"balanced_coverage_{EVALUATION}", f"natural_density_{EVALUATION}"]
    assert np.isfinite(table[names]).all(axis=None)
    best = table.set_index(["prune", "ratio"])["scene_entropy"]
    assert best["rsprune", 0.9] > best["random", 0.9]


@pytest.mark.slow
def test_ablation_changes_one_choice_at_a_time(home, forked):
    changes = "ablation.changes=['prune.uniformity=0.0','entropy.aggregate=min','prune.max_clusters=64']"
    results = ran("scripts/ablation.py", "profile=smoke", "tracker=none", changes, cwd=home, by=forked)
    table = pd.read_csv(results / "ablation.csv").set_index("change")
    table = table[table["kind"] == "measured"]
    assert dict(table["selection"]) == {
        "none (default)": "same as default", "prune.max_clusters=64": "same as default",
        "prune.uniformity=0.0": "different", "entropy.aggregate=min": "different",
    }  # fmt: skip
    assert table.loc["none (default)", "scene_entropy"] > table.loc["prune.uniformity=0.0", "scene_entropy"]


@pytest.mark.slow
def test_suggest_names_a_ratio_on_its_curve(home, forked):
    arguments = ("scripts/suggest.py", "profile=smoke", "tracker=none", "quality.curve=[0.3,0.6,0.8,0.9]")
    results = ran(*arguments, cwd=home, by=forked)
    result = json.loads((results / "rsprune.json").read_text())
    assert result["suggested"] in (0.3, 0.6, 0.8, 0.9)
    values = [point["representation"] for point in result["curve"]]
    assert values == sorted(values)  # the more images are kept, the nearer the subset is to all
    assert (results / "rsprune.png").stat().st_size > 5_000


def test_long_tail_makes_a_long_tailed_corpus_and_evaluates_methods(home, forked, tmp_path):
    random = np.random.default_rng(0)
    for name in ("coast", "field", "town"):
        (tmp_path / name).mkdir()
        for index in range(12):
            texture = random.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(texture).resize((80, 80)).save(tmp_path / name / f"{index}.png")
    done = forked(
        "scripts/long_tail.py", "tracker=none", f"long_tail.root={tmp_path}", "long_tail.images=120",
        "long_tail.size=48", "long_tail.reference=4", "quality.methods=[random,rsprune]", "ratio=0.5", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((home / "results" / "long_tail" / "long_tail.json").read_text())
    noise_free = {row["prune"]: row["noise_free"] for row in result["methods"]}
    assert result["images"] == 120 and noise_free["rsprune"] > noise_free["random"]
    waste = [row[name] for row in result["methods"] for name in ("same_source", "near_duplicates")]
    assert all(0 <= value <= 1 for value in waste) and max(waste) > 0  # six crops of each texture


@pytest.mark.slow
def test_bench_of_selection_measures_time_and_memory(home):
    small = (
        "tracker=none",
        "bench.sizes=[400,1600]",
        "bench.unknown=4000",
        "bench.dimensions=32",
        "bench.methods=[rsprune]",
    )
    done = call("scripts/bench_selection.py", *small, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((home / "results" / "bench_selection.json").read_text())
    assert [row["images"] for row in result["rows"]] == [400, 1600]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in result["rows"]) and "rsprune" in result["exponents"]
    unknown = {row["method"]: row for row in result["unknown"]}
    assert unknown["rsprune"]["evenness"] > unknown["rsprune, one open scene"]["evenness"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prune/run.py", "prune=no_such_method"), "no_such_method"),
        (("prune/run.py", "ratio=1.0"), "ratio=1.0"),
        (("prune/run.py", "ratio=-0.1"), "ratio=-0.1"),
        (("prune/run.py", "ratio=0.999"), "ratio=0.999 removes all 480 images"),
        (("prune/run.py", "seed=-1"), "seed=-1"),
        (("prune/run.py", "prune.uniformity=5"), "prune.uniformity=5: give a number from 0 to 1"),
        (("prune/run.py", "corpus=folder", "corpus.root=/no/such/folder"), "/no/such/folder"),
        (("prune/run.py", "corpus=folder"), "corpus.root"),
        (("prune/run.py", "no_such_key=1"), "no_such_key"),
        (("prune/run.py", "prune.no_such_key=1"), "no_such_key"),
        (("prune/run.py", "ratoi=0.85"), "unknown option 'ratoi'. Did you mean ratio?"),
        (("prune/run.py", "prune=rsprun"), "Could not find 'prune/rsprun'. Choose one of: clip_score"),
        (("prune/run.py", "prune._target_=prune.methods.rsprune.RSPrun"), "(configs/prune/rsprune.yaml): _target_"),
        (("prune/run.py", "+prune.far=1"), "its fields are entropy_quantile, "),
        (("prune/run.py", "entropy.aggregate=max"), "aggregate=max"),
        (("prune/run.py", "prune=ssp_hard", "prune.keep=medium"), "keep=medium"),
        (("scripts/long_tail.py",), "long_tail.root"),
        (("scripts/long_tail.py", "long_tail.root=/no/such/folder"), "/no/such/folder"),
        (("train/pretrain.py", "ratio=2"), "ratio=2"),
        (("train/pretrain.py", "autoencoder.path=/no/such/autoencoder"), "/no/such/autoencoder"),
        (("downstream/super_resolution.py", "foundation=/no/such/run"), "/no/such/run"),
        (("downstream/semantic_synthesis.py", "foundation=/no/such/run"), "/no/such/run"),
        (("eval/measure.py",), "of="),
        (("eval/measure.py", "of=/no/such/folder"), "/no/such/folder"),
        (("scripts/tables.py", "results=/no/such/results"), "/no/such/results"),
    ],
)
def test_bad_input_gives_a_one_line_error_and_exit_code_2(home, forked, arguments, named):
    script, *overrides = arguments
    before = sorted(path for path in (home / "runs").glob("*/*") if "wandb" not in str(path))
    done = forked(script, "profile=smoke", "tracker=none", *overrides, cwd=home)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, done.stderr[-3000:]
    assert errors[0].startswith("error: ") and named in errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(path for path in (home / "runs").glob("*/*") if "wandb" not in str(path)) == before


def test_the_selection_of_a_folder_does_not_depend_on_the_workers(forked, tmp_path):
    random = np.random.default_rng(0)
    for name in ("coast", "field"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(20):
            texture = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(texture).resize((96, 96)).save(tmp_path / "images" / name / f"{index}.jpg")
    tables = []
    for workers in (0, 1, 2):
        directory = ran(
            "prune/run.py", "corpus=folder", f"corpus.root={tmp_path / 'images'}", f"corpus.workers={workers}",
            "tracker=none", "ratio=0.5", f"runs=runs{workers}", cwd=tmp_path, by=forked,
        )  # fmt: skip
        tables.append((directory / "selection.parquet").read_bytes())
    assert tables[0] == tables[1] == tables[2]


def test_after_a_killed_embedding_a_new_run_gives_the_same_selection(home, forked, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("wandb", "pretrain"))
    for pattern in ("embedding", "selection", "corpus/*/scanned"):  # so that embedding is a separate pass again
        for path in (tmp_path / "runs").glob(pattern):
            shutil.rmtree(path)
    arguments = ("prune/run.py", "profile=smoke", "tracker=none", "corpus.train.limit=480")
    process = subprocess.Popen(
        command(*arguments, cwd=tmp_path), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(tmp_path.glob("runs/embedding/*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = [path for path in tmp_path.glob("runs/*/*") if not path.name.endswith(".partial")]
    assert not {path.parent.name for path in finished} & {"selection", "embedding"}
    done = forked(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    again = tmp_path / done.stdout.strip().splitlines()[-1].removeprefix("selection: ")
    runs = json.loads((home / "results" / "smoke" / "runs.json").read_text())
    pd.testing.assert_frame_equal(
        pd.read_parquet(again / "selection.parquet"),
        pd.read_parquet(home / runs["selection/rsprune"][0] / "selection.parquet"),
    )
