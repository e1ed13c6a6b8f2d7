"""Sweeps (`-m`): a bad cell is one line on stderr and a part of the exit code, and the other cells run."""

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

#: Below `runs`: tracebacks of cells that ended in an error nobody foresaw.
FAILED = "failed_cells"
#: Packages whose own errors mean that a launcher, and not a cell, has failed.
LAUNCHERS = ("joblib", "submitit")


class Cells:
    """The cells of a command's sweep, and what went wrong in them.

    A cell that cannot be composed is left out. One that fails does not end the sweep: where Hydra's own launcher runs
    one cell after the other in this process, it is reported here; where another launcher (joblib, submitit) runs cells
    in processes of their own, that process reports it and raises, and the launcher keeps the error until all cells are
    done. What submitit's processes say goes to files, so that the command says it again at the end. Of several
    processes that train together, the others would wait forever, so that there it ends all.
    """

    def __init__(self) -> None:
        self._foreseen: list[bool] = []
        self._total, self._seconds = 0, []

    @property
    def exit_code(self) -> int:
        """0 if all cells were good, 2 if the user can mend all that went wrong, else 1."""
        return 0 if not self._foreseen else 2 if all(self._foreseen) else 1

    def outlives(self) -> bool:
        """Whether the other cells run, in this process, if the one that is running now fails."""
        return _multirun() and not self.elsewhere() and process_count() == 1

    def elsewhere(self) -> bool:
        """Whether a launcher has started this process, or will start another, for the running cell."""
        return _multirun() and not HydraConfig.get().launcher._target_.endswith(".BasicLauncher")

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Tell on stderr, after the running cell, how many of the sweep are done and how long the others may take."""
        start = time.perf_counter()
        yield
        if not (_multirun() and self._total > 1) or self.elsewhere() or not is_main_process():
            return
        self._seconds.append(time.perf_counter() - start)
        done, mean = len(self._seconds), sum(self._seconds) / len(self._seconds)
        left = f", about {duration((self._total - done) * mean)} left" if done < self._total else ""
        print(f"cell {done} of {self._total}: {duration(self._seconds[-1])}{left}", file=sys.stderr, flush=True)

    def foreseen(self, message: str, overrides: Sequence[str] | None = None) -> None:
        """Report a cell that the user can mend; `overrides` are those of the running cell if none are given."""
        self._foreseen.append(True)
        _report(message, _running() if overrides is None else overrides)

    def unforeseen(self, error: BaseException, runs: Path | str) -> None:
        """Report the running cell, which ended in an error that nobody foresaw, and keep the traceback in a file."""
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
        """The good cells of a batch that a launcher runs in processes of their own; the others count as failed."""
        if not batch:  # none could be composed, and submitit takes no empty list
            return []
        to_files = "submitit" in launch.func.__module__  # what a cell's process says
        try:
            with _lost_cells_return():
                results = list(launch(batch, initial_job_idx=first))
        except Exception as error:
            if type(error).__module__.split(".")[0] not in LAUNCHERS:
                raise
            self._foreseen.append(False)
            line = f"error: the launcher gave up ({type(error).__name__}): run the same command again to go on"
            print(line, file=sys.stderr, flush=True)
            return []
        for cell, result in zip(batch, results, strict=True):
            if result.status == JobStatus.FAILED:
                error = result._return_value
                message = explain(error)
                self._foreseen.append(message is not None)
                if not isinstance(error, LostCell) and not to_files:
                    continue  # its process has said it on this terminal
                _report(message or _unforeseen_line(error, _traceback_of(cell, runs)), cell)
        return [result for result in results if result.status != JobStatus.FAILED]

    @contextlib.contextmanager
    def survived(self, explain: Callable[[Exception, str], str | None]) -> Iterator[None]:
        """Meanwhile no cell ends the sweep: one that Hydra cannot compose is reported and left out, one that failed in
        a process of its own counts as failed.

        Args:
            explain: makes one line of an error that the user can mend, of Hydra and OmegaConf as well; given the
                error and `runs`.
        """
        before = Sweeper.validate_batch_is_legal

        def keep_legal(sweeper: Sweeper, batch: list[Sequence[str]]) -> None:
            hide(secret_values(OmegaConf.to_container(sweeper.config, resolve=False)))
            _redact_file(Path(sweeper.config.hydra.sweep.dir) / "multirun.yaml")
            for cell in list(batch):
                try:
                    cfg = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(cell))
                    OmegaConf.select(cfg, "hydra.sweep.dir")  # resolved outside of the cell
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
    """A cell whose process ended without a result: killed, out of memory, out of time too often."""


@contextlib.contextmanager
def _lost_cells_return() -> Iterator[None]:
    """Meanwhile a job of submitit's that was lost gives a failed result, where it would end the wait for the others."""
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
    """Take the credentials out of what Hydra has just written about a sweep."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8")
        if redacted(text) != text:
            path.write_text(redacted(text), encoding="utf-8")


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.5 h."""
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
