"""The Ray engine gives the same results as the local engine, bit for bit, whichever process dies in the meantime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy.ndimage import gaussian_filter

from prune.clusters import Points
from prune.selection import select
from runtime.application import CONFIGS
from runtime.cost import logged
from runtime.engine import Done, LocalEngine, Step, using
from runtime.errors import UserError
from runtime.notices import notice
from runtime.ray_engine import RayEngine

ROOT = Path(__file__).resolve().parent.parent
FILES = ("images.npy", "manifest.parquet", "quarantine.parquet")
IMAGES = 1300  # six chunks


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth tiles of four kinds in folders; three of them are broken."""
    root = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(3)
    for number in range(IMAGES):
        kind = number % 4
        noise = gaussian_filter(generator.normal(size=(24, 24, 3)), (1 + kind, 1 + kind, 0))
        image = np.clip(60 + 40 * kind + 30 * noise / noise.std(), 0, 255).astype(np.uint8)
        path = root / f"kind{kind}" / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    for number in (5, 700, 1299):
        (root / f"kind{number % 4}" / f"{number:04d}.png").write_bytes(b"no image")
    return root


def overrides(tiles: Path, runs: Path) -> list[str]:
    return [
        *("corpus=folder", f"corpus.root={tiles}", f"runs={runs}", "corpus.train.resolution=24"),
        *("corpus.train.split=all", "corpus.val_fraction=0", "corpus.test_fraction=0", "tracker=none"),
        *("encoder.input_size=128", "ratio=0.7", f"results={runs / 'results'}"),
    ]


def selected(tiles: Path, runs: Path, *more: str) -> Path:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [*overrides(tiles, runs), *more])
    return select(cfg, "rsprune")[0]


def results(runs: Path) -> dict[str, bytes]:
    """The result files of a run, by name."""
    result = {"selection": (next((runs / "selection").iterdir()) / "selection.parquet").read_bytes()}
    [corpus] = (runs / "corpus").iterdir()
    result |= {name: (corpus / name).read_bytes() for name in FILES}
    result |= {path.name: path.read_bytes() for path in (corpus / "scanned").iterdir()}
    return result


@pytest.fixture(scope="module")
def expected(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    runs = tmp_path_factory.mktemp("local")
    selected(tiles, runs)
    return results(runs)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_are_identical_for_any_number_of_local_workers(
    workers: int, tiles: Path, expected: dict, tmp_path: Path
) -> None:
    selected(tiles, tmp_path, f"corpus.workers={workers}")
    assert results(tmp_path) == expected


@pytest.mark.parametrize("cpus", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_results_are_identical_for_any_number_of_ray_workers(
    cpus: int, tiles: Path, expected: dict, tmp_path: Path
) -> None:
    with using(RayEngine(cpus=cpus, rows_from=0)):
        directory = selected(tiles, tmp_path)
    assert results(tmp_path) == expected
    [corpus] = (tmp_path / "corpus").iterdir()
    lines = logged(corpus)
    assert [line["rows"] for line in lines] == [[at, min(at + 255, IMAGES - 1)] for at in range(0, IMAGES, 256)]
    assert {line["engine"] for line in lines} == {"ray"} and sum(line["unreadable"] for line in lines) == 3
    assert f":{os.getpid()}" not in {line["worker"][line["worker"].index(":") :] for line in lines}
    cost = json.loads((directory / "summary.json").read_text())["cost"]["index"]
    assert cost["images"] == IMAGES and cost["cpu_seconds"] > 0 and cost["engine"] == "ray"


@pytest.mark.slow
def test_ray_equals_the_local_engine_on_an_indexed_corpus_with_a_classifier(tiles: Path, tmp_path: Path) -> None:
    """Another encoder on the existing images, read by the driver's machine; scenes by a classifier."""
    more = ("encoder.input_size=48", "entropy.patch=8", "prune.scene_classifier=lda")
    for name, engine in (("local", LocalEngine()), ("ray", RayEngine(cpus=2, rows_from=0))):
        selected(tiles, tmp_path / name)
        with using(engine):
            selected(tiles, tmp_path / name, *more)
    for stage in ("selection", "embedding", "entropy"):
        for directory in (tmp_path / "local" / stage).iterdir():
            for file in (*directory.glob("*.parquet"), *directory.glob("*.npy")):
                assert file.read_bytes() == (tmp_path / "ray" / stage / directory.name / file.name).read_bytes(), file


@pytest.mark.slow
def test_ray_indexes_shards_like_the_local_engine(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.sources.webdataset.FEW_SHARDS", 1)  # this process reads the headers of few shards
    files = sorted(tiles.rglob("*.png"))[:600]
    for shard in range(20):
        with tarfile.open(tmp_path / f"{shard:02d}.tar", "w") as tar:
            for path in files[30 * shard : 30 * shard + 30]:
                tar.add(path, f"{path.parent.name}/{path.name}")
    more = ("corpus=webdataset", f"corpus.urls={tmp_path}", "corpus.train.resolution=24", "corpus.train.split=all")
    result = []
    for name, engine in (("local", LocalEngine()), ("ray", RayEngine(cpus=2, rows_from=0))):
        own = (f"runs={tmp_path / name}", "tracker=none", "encoder.input_size=32", "ratio=0.7", *more)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", list(own))
        with using(engine):
            select(cfg, "rsprune")
        result.append(results(tmp_path / name))
        [corpus] = (tmp_path / name / "corpus").iterdir()
        assert logged(corpus)[0]["shards"] == [str(tmp_path / f"{shard:02d}.tar") for shard in range(9)]
    assert result[0] == result[1]


def double(value: int) -> int:
    return 2 * value


def refuse(value: int) -> int:
    raise UserError(f"item {value} is bad: mend it")


def die_at_three(value: int) -> int:
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def column_sums(table: Points, rows: np.ndarray, weight: float) -> np.ndarray:
    return weight * table[rows].sum(axis=0)


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[RayEngine]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a module of tests
    engine = RayEngine(cpus=2, retries=1, rows_from=0)
    with using(engine):
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize(("network", "least_blocks"), [(False, 16), (True, 16), (True, 1)])
def test_ray_keeps_the_order_of_items_and_the_messages_of_errors(
    network: bool, least_blocks: int, ray_engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `least_blocks` 1, a block has four items, and a worker that dies has done some of them."""
    monkeypatch.setattr("runtime.ray_engine.LEAST_BLOCKS", least_blocks)
    steps = [Step(double), Step(double, network=network)]
    assert [done.value for done in ray_engine.run(steps, iter(range(20)))] == [4 * value for value in range(20)]
    with pytest.raises(UserError, match="item 0 is bad: mend it"):
        list(ray_engine.run([Step(refuse, network=network)], range(8)))
    with pytest.raises(UserError, match="a worker was killed repeatedly at the same images"):
        list(ray_engine.run([Step(die_at_three, network=network)], range(8)))


@pytest.mark.slow
def test_map_rows_on_ray_equals_the_local_result(ray_engine: RayEngine) -> None:
    table = Points(np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16), np.zeros(8, np.float32))
    groups = [np.arange(0, 20), np.array([3, 40, 7]), np.arange(20, 50)]
    result, requested = (
        list(engine.map_rows(column_sums, table, groups, [(1.0,), (2.0,), (0.5,)]))
        for engine in (ray_engine, LocalEngine())
    )
    np.testing.assert_array_equal(result, requested)


def test_local_steps_record_their_worker_and_gpu_seconds() -> None:
    done = list(LocalEngine().run([Step(double), Step(double, network=True)], range(5), workers=2))
    assert [part.value for part in done] == [0, 4, 8, 12, 16]
    assert all(isinstance(part, Done) and not part.worker.endswith(f":{os.getpid()}") for part in done)
    [alone] = LocalEngine().run([Step(double)], [1], workers=0)
    assert alone.worker.endswith(f":{os.getpid()}") and alone.gpu_seconds == 0


def test_the_error_about_missing_ray_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray.*pip install '\.\[ray\]'"):
        list(RayEngine().run([Step(double)], [1]))


@pytest.mark.slow
def test_an_unreachable_ray_cluster_is_refused() -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.shutdown()  # a fixture's engine may be connected
    with pytest.raises(UserError, match=r"engine\.address=127\.0\.0\.1:1: no Ray cluster answers"):
        list(RayEngine(address="127.0.0.1:1").run([Step(double)], [1]))


class Command:
    """`prune/run.py` on a cluster, in a separate process."""

    def __init__(self, tiles: Path, runs: Path, *more: str) -> None:
        # Ray ends a process that looks for its head node in vain for a minute; ten seconds are enough here
        reconnect = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
        words = [sys.executable, "prune/run.py", *overrides(tiles, runs), *more]
        self.runs, environment = runs, {**os.environ, **reconnect, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_chunks(self, count: int) -> int:
        """Wait until the given number of chunks of the index are done."""
        for _ in range(1200):
            result = sum(len(logged(path)) for path in (self.runs / "corpus").glob("*.partial"))
            if result >= count or self.process.poll() is not None:
                return result
            time.sleep(0.1)
        raise AssertionError("the index makes no progress")

    def ended(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=240)
        return self.process.returncode, out, errors


def of_ray(*names: str) -> list[psutil.Process]:
    """Processes that this one has started, directly or indirectly, by the prefixes of their names."""
    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith(names)]


class TwoNodes:
    """A cluster of two nodes of one CPU each; a command that is given its address runs on the first."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "raycluster.py"), str(folder)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.address = self.line()

    def line(self) -> str:
        """The last line of those that the process prints up to an address or "removed"; Ray prints others."""
        for line in self.process.stdout:
            if re.fullmatch(r"[\d.]+:\d+|removed", line.strip()):
                return line.strip()
        raise AssertionError("the cluster has ended")

    def lose_the_second_node(self) -> None:
        self.process.stdin.write("remove\n")
        self.process.stdin.flush()
        assert self.line() == "removed"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))  # Ray notes the address of the latest cluster there
    (folder / "ray").mkdir()
    result = TwoNodes(folder)
    yield result
    for process in psutil.Process().children(recursive=True):  # an orderly end waits forever if the head is dead
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::") or str(folder) in " ".join(process.cmdline()):
                process.kill()
    result.process.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_results_do_not_change_after_a_killed_worker_and_a_lost_node(
    cluster: TwoNodes, tiles: Path, expected: dict, tmp_path: Path
) -> None:
    command = Command(tiles, tmp_path, "engine=ray", f"engine.address={cluster.address}")
    assert command.wait_for_chunks(1) < 6
    of_ray("ray::MapWorker")[0].kill()
    assert command.wait_for_chunks(2) < 6
    cluster.lose_the_second_node()
    code, out, errors = command.ended()
    assert code == 0, errors
    assert out.splitlines()[-1].startswith("selection: ") and "ray: " in errors
    assert results(tmp_path) == expected


@pytest.mark.slow
def test_the_local_engine_finishes_the_work_of_a_dead_cluster(
    cluster: TwoNodes, tiles: Path, expected: dict, tmp_path: Path
) -> None:
    command = Command(tiles, tmp_path, "engine=ray", f"engine.address={cluster.address}")
    command.wait_for_chunks(1)
    for process in of_ray("gcs_server", "raylet"):
        process.kill()
    code, _, errors = command.ended()
    assert code != 0, "the command must not say that it is done"
    done = sum(len(logged(path)) for path in (tmp_path / "corpus").iterdir())  # results on their way count too
    notice.cache_clear()
    selected(tiles, tmp_path)
    assert results(tmp_path) == expected
    [corpus] = (tmp_path / "corpus").iterdir()
    engines: Sequence[str] = [line["engine"] for line in logged(corpus)]
    assert engines[0] == "ray" and (engines[-1] == "local" or done == 6)
    assert errors.splitlines()[-1].startswith("error: "), errors[-2000:]


def test_many_items_are_grouped_into_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="engine=ray needs the extra ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert [RayEngine()._blocks(items) for items in (1, 31, 64, 78, 1000)] == [1, 31, 32, 39, 250]
    assert RayEngine(cpus_per_worker=2)._blocks(64) == 16
