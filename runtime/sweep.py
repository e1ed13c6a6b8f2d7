"""Sweeps (`-m`): a failed cell prints one line on stderr and sets the exit code; the other cells still run."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.artefacts import fingerprint, is_main_process, process_count
from runtime.redaction import hide, redacted, secret_values

#: Folder below `runs` for the tracebacks of cells that ended in an unforeseen error.
FAILED = "failed_cells"
#: Packages of launchers: one of their own errors means that the launcher failed, not a cell.
LAUNCHERS = ("joblib", "submitit")


class Cells:
    """The cells of a command's sweep, and the errors that occurred in them.

    A cell that cannot be composed is omitted. A cell that fails does not end the sweep. Hydra's own launcher runs one
    cell after the other in this process, and the failure is reported here. Other launchers (joblib, submitit) run cells
    in processes of their own: that process reports the failure and raises, and the launcher keeps the error until all
    cells are done. The output of submitit's processes goes to files, so the command repeats the messages at the end. If
    several processes train a cell together, a failure ends the whole sweep, because the other processes would wait
    forever.
    """

    def __init__(self) -> None:
        self._foreseen: list[bool] = []
        self._total, self._seconds = 0, []

    @property
    def exit_code(self) -> int:
        """0 if all cells succeeded, 2 if the user can fix all failures, else 1."""
        return 0 if not self._foreseen else 2 if all(self._foreseen) else 1

    def outlives(self) -> bool:
        """Whether the other cells still run in this process if the current one fails."""
        return _multirun() and not self.elsewhere() and process_count() == 1

    def elsewhere(self) -> bool:
        """Whether a launcher has started this process, or will start another, for the current cell."""
        return _multirun() and not HydraConfig.get().launcher._target_.endswith(".BasicLauncher")

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Context of a cell; afterwards prints on stderr how many cells are done and an estimate of the time left."""
        start = time.perf_counter()
        yield
        if not (_multirun() and self._total > 1) or self.elsewhere() or not is_main_process():
            return
        self._seconds.append(time.perf_counter() - start)
        done, mean = len(self._seconds), sum(self._seconds) / len(self._seconds)
        left = f", about {duration((self._total - done) * mean)} left" if done < self._total else ""
        print(f"cell {done} of {self._total}: {duration(self._seconds[-1])}{left}", file=sys.stderr, flush=True)

    def foreseen(self, message: str, overrides: Sequence[str] | None = None) -> None:
        """Report a failed cell that the user can fix; `overrides` defaults to those of the current cell."""
        self._foreseen.append(True)
        _report(message, _running() if overrides is None else overrides)

    def unforeseen(self, error: BaseException, runs: Path | str) -> None:
        """Report an unforeseen error of the current cell, and keep the traceback in a file."""
        self._foreseen.append(False)
        text = "".join(traceback.format_exception(error))
        path = _traceback_of(_running(), runs)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = redacted(f"{' '.join(sys.argv)}\n{' '.join(_running())}\n\n{text}")
            path.write_text(whole, encoding="utf-8")
        except OSError:
            print(redacted(text), file=sys.stderr)
        _report(_unforeseen_line(error, path), _running())

    def _returned(
        self,
        launch: partial[Sequence[JobReturn]],
        batch: Sequence[Sequence[str]],
        first: int,
        explain: Callable[[Exception], str | None],
        runs: Path,
    ) -> Sequence[JobReturn]:
        """The successful cells of a batch that a launcher runs in separate processes; the others count as failed."""
        if not batch:  # no cell could be composed, and submitit accepts no empty list
            return []
        to_files = "submitit" in launch.func.__module__  # where the output of a cell's process goes
        try:
            with _lost_cells_return():
                results = list(launch(batch, initial_job_idx=first))
        except Exception as error:
            if type(error).__module__.split(".")[0] not in LAUNCHERS:
                raise
            self._foreseen.append(False)
            line = f"error: the launcher failed ({type(error).__name__}): run the same command again to go on"
            print(line, file=sys.stderr, flush=True)
            return []
        for cell, result in zip(batch, results, strict=True):
            if result.status == JobStatus.FAILED:
                error = result._return_value
                message = explain(error)
                self._foreseen.append(message is not None)
                if not isinstance(error, LostCell) and not to_files:
                    continue  # the cell's process has printed the error on this terminal
                _report(message or _unforeseen_line(error, _traceback_of(cell, runs)), cell)
        return [result for result in results if result.status != JobStatus.FAILED]

    @contextlib.contextmanager
    def survived(self, explain: Callable[[Exception, str], str | None]) -> Iterator[None]:
        """Context in which no cell ends the sweep.

        A cell that Hydra cannot compose is reported and omitted. A cell that failed in a process of its own counts as
        failed.

        Args:
            explain: makes one line of an error that the user can fix, including errors of Hydra and OmegaConf; called
                with the error and `runs`.
        """
        before = Sweeper.validate_batch_is_legal

        def keep_legal(sweeper: Sweeper, batch: list[Sequence[str]]) -> None:
            hide(secret_values(OmegaConf.to_container(sweeper.config, resolve=False)))
            _redact_file(Path(sweeper.config.hydra.sweep.dir) / "multirun.yaml")
            for cell in list(batch):
                try:
                    cfg = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(cell))
                    OmegaConf.select(cfg, "hydra.sweep.dir")  # Hydra resolves it outside the cell
                except (HydraException, OmegaConfBaseException) as error:
                    self.foreseen(explain(error, ""), cell)
                    batch.remove(cell)
            self._total += len(batch)
            runs, launcher = str(sweeper.config.runs), sweeper.launcher
            if not launcher.__class__.__name__.startswith("Basic") and type(launcher) not in changed:
                changed[type(launcher)] = launch = type(launcher).launch
                type(launcher).launch = lambda own, batch, initial_job_idx: self._returned(
                    partial(launch, own), batch, initial_job_idx, lambda error: explain(error, runs), Path(runs)
                )

        changed: dict[type, Callable] = {}
        Sweeper.validate_batch_is_legal = keep_legal
        try:
            yield
        finally:
            Sweeper.validate_batch_is_legal = before
            for launcher, launch in changed.items():
                launcher.launch = launch


class LostCell(Exception):
    """The process of a cell ended without a result: killed, out of memory, or timed out too often."""


@contextlib.contextmanager
def _lost_cells_return() -> Iterator[None]:
    """Context in which a lost job of submitit returns a failed result instead of ending the wait for other jobs."""
    from submitit.core.core import Job
    from submitit.core.utils import FailedJobError, UncompletedJobError

    before = Job.results

    def results(job: Job) -> list[JobReturn]:
        try:
            return before(job)
        except (FailedJobError, UncompletedJobError):
            lost = JobReturn(status=JobStatus.FAILED)
            lost.return_value = LostCell(f"its process was lost or ended without a result: see {job.paths.stderr}")
            return [lost]

    Job.results = results
    try:
        yield
    finally:
        Job.results = before


def _redact_file(path: Path) -> None:
    """Remove the credentials from the file that Hydra has just written about a sweep."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8")
        if redacted(text) != text:
            path.write_text(redacted(text), encoding="utf-8")


def duration(seconds: float) -> str:
    """Format seconds for a reader: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _running() -> list[str]:
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def _traceback_of(overrides: Sequence[str], runs: Path | str) -> Path:
    return Path(runs) / FAILED / f"{fingerprint(overrides=[redacted(text) for text in overrides])}.txt"


def _unforeseen_line(error: BaseException, path: Path) -> str:
    if isinstance(error, LostCell):
        return str(error)
    where = f"traceback: {path}" if path.is_file() else "traceback: above"
    return f"{type(error).__name__}: {str(error)[:500]} ({where})"


def _report(message: str, overrides: Sequence[str]) -> None:
    own = [override for override in overrides if override not in sys.argv] or overrides
    line = f"error: cell {' '.join(own)}: {message}"
    print(redacted(" ".join(line.split())), file=sys.stderr, flush=True)
