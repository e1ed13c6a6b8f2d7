"""Sweeps (`-m`): a bad cell is one line on stderr and a part of the exit code, and the other cells run."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.artefacts import fingerprint, is_main_process, process_count
from runtime.redaction import hide, redacted, secret_values

#: Below `runs`: tracebacks of cells that ended in an error nobody foresaw.
FAILED = "failed_cells"


class Cells:
    """The cells of a command's sweep, and what went wrong in them.

    A cell that cannot be composed is left out. One that fails does not end the sweep: where Hydra's own launcher runs
    one cell after the other in this process, it is reported here; where another launcher (joblib, submitit) runs cells
    in processes of their own, that process reports it and raises, and the launcher keeps the error until all cells are
    done. Of several processes that train together, the others would wait forever, so that there it ends all.
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
        path = Path(runs) / FAILED / f"{fingerprint(overrides=[redacted(text) for text in _running()])}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = redacted(f"{' '.join(sys.argv)}\n{' '.join(_running())}\n\n{text}")
            path.write_text(whole, encoding="utf-8")
            where = f"traceback: {path}"
        except OSError:
            print(redacted(text), file=sys.stderr)
            where = "traceback: above"
        _report(f"{type(error).__name__}: {str(error)[:500]} ({where})", _running())

    @contextlib.contextmanager
    def composed_alone(self, explain: Callable[[Exception], str]) -> Iterator[None]:
        """Meanwhile a cell that Hydra cannot compose is reported and left out, instead of ending the sweep.

        Args:
            explain: makes one line of Hydra's and OmegaConf's errors.
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
                    self.foreseen(explain(error), cell)
                    batch.remove(cell)
            self._total += len(batch)

        Sweeper.validate_batch_is_legal = keep_legal
        try:
            yield
        finally:
            Sweeper.validate_batch_is_legal = before


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


def _report(message: str, overrides: Sequence[str]) -> None:
    own = [override for override in overrides if override not in sys.argv] or overrides
    line = f"error: cell {' '.join(own)}: {message}"
    print(redacted(" ".join(line.split())), file=sys.stderr, flush=True)
