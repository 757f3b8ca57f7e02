"""Progress of a training run: log files, TensorBoard and the progress bar."""

import csv
import io
import logging
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import encoding_png, naming, read_file, write_file
from deformnet.engine.runs import move

logger = logging.getLogger("deformnet")
"""Receives progress messages of a run, which the command line prints."""
_STEPS = 10  # iterations before the remaining time is estimated
_STARVED = 0.5  # fraction of time spent waiting for data, above which a hint is logged
_HINT_AFTER = 50  # iterations above that fraction


class TrainingLog:
    """Logs of the first process. Rows are flushed at once and not repeated after a resume.

    Args:
        run: run folder.
        terms: names of the loss terms, if there are several.
        done: iteration that the run resumes from; later rows are dropped.
        total: number of iterations of the run.
        validated: iteration of the last validation; later rows are dropped.
        progress: show a progress bar or, if the output is not a terminal, a line for each row.
    """

    def __init__(
        self,
        run: Path,
        terms: Sequence[str],
        done: int,
        total: int,
        *,
        validated: int = 0,
        progress: bool = False,
    ) -> None:
        self.path = run / "metrics.csv"
        self.columns = ("iteration", "loss", *terms, "learning_rate", "seconds", "data_fraction")
        rows = read_log(self.path, self.columns)
        rows = [row for row in rows if int(row["iteration"]) <= done]
        header = ",".join(self.columns) + "\n"
        write_file(self.path, (header + self._text(rows)).encode())
        self._validations = run / "validation.csv"
        rows = read_log(self._validations)
        self._validated = [row for row in rows if int(row["iteration"]) <= validated]
        if rows:
            self._write_validations()
        self._events = run / "tensorboard"
        with naming(self._events):
            self._tensorboard = SummaryWriter(self._events, purge_step=done + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc="training", initial=done, total=total, disable=not (progress and terminal)
        )
        self._lines = progress and not terminal
        self._done, self._total, self._postfix = done, total, {}
        self._started: float | None = None
        self._steps = 0
        self._since, self._last = time.perf_counter(), done
        self._waited = 0.0
        self._fed: int | None = None  # the last iteration with enough data
        self._hinted = False

    def close(self) -> None:
        self._bar.close()
        with naming(self._events):
            self._tensorboard.close()

    def step(self) -> None:
        """Counts an iteration."""
        self._bar.update()
        self._steps += 1
        if self._started is None:  # the first iteration takes longer
            self._started = time.perf_counter()
        elif self._steps == _STEPS:
            pace = (time.perf_counter() - self._started) / (_STEPS - 1)
            left = self._total - self._done - _STEPS
            logger.info("expected time: %s (%.3g s per iteration)", duration(left * pace), pace)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Excludes the block from the seconds per iteration."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._since += seconds
        if self._started is not None:
            self._started += seconds

    def record(
        self, iteration: int, values: Mapping[str, float], scalars: Mapping[str, float]
    ) -> None:
        """Writes a row, with the mean seconds per iteration (loading included) since the last one.

        `values` go by the names of the columns; `scalars` are for TensorBoard only.
        """
        now = time.perf_counter()
        seconds = now - self._since
        fraction = self._waited / seconds
        values = {
            **values,
            "seconds": seconds / (iteration - self._last),
            "data_fraction": fraction,
        }
        self._since, self._last, self._waited = now, iteration, 0.0
        row = {"iteration": str(iteration)} | {k: f"{v:.9g}" for k, v in values.items()}
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._text([row]))
        with naming(self._events):
            for name, value in {**values, **scalars}.items():
                self._tensorboard.add_scalar(name, value, iteration)
            # Written here, so that no other thread runs into a full disk later.
            self._tensorboard.flush()
        self._show("loss", f"{values['loss']:.4g}")
        self._show("data", f"{fraction:.0%}")
        if self._lines:
            left = duration((self._total - iteration) * values["seconds"])
            self._line(
                f"{iteration} of {self._total}, loss {values['loss']:.4g}, "
                f"{values['seconds']:.3g} s per iteration (data {fraction:.0%}, "
                f"step {1 - fraction:.0%}), {left} left"
            )
        self._hint(iteration, fraction)

    def _hint(self, iteration: int, fraction: float) -> None:
        """Warns once if training has been waiting for data in every row for some iterations."""
        # The first row includes the startup of the loader workers.
        if fraction <= _STARVED or self._fed is None:
            self._fed = iteration
        elif iteration - self._fed >= _HINT_AFTER and not self._hinted:
            self._hinted = True
            logger.warning(
                "training spent more than half of the last %d iterations waiting for data (%.0f%% "
                "now); use more --workers, smaller image files or, if the backbone is frozen, "
                "--feature-cache",
                *(iteration - self._fed, 100 * fraction),
            )

    def validated(
        self,
        iteration: int,
        main: tuple[str, float | None],
        summary: Mapping[str, float | None],
        pictures: Iterable[tuple[str, Image.Image]] = (),
    ) -> None:
        """Writes the scores of a validation to `validation.csv` and TensorBoard.

        Args:
            main, summary: see `Scores`.
            pictures: drawn predictions by image name.
        """
        scores = {main[0]: main[1], **summary}
        row = {k: "" if v is None else f"{v:.9g}" for k, v in scores.items()}
        self._validated.append({"iteration": str(iteration), **row})
        self._write_validations()
        with naming(self._events), encoding_png():
            for name, value in scores.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"validation/{name}", value, iteration)
            for name, picture in pictures:
                image, tag = np.asarray(picture.convert("RGB")), f"predictions/{name}"
                self._tensorboard.add_image(tag, image, iteration, dataformats="HWC")
            self._tensorboard.flush()
        name, value = main
        text = "-" if value is None else f"{value:.1f}"
        self._show(name, text)
        if self._lines:
            self._line(f"{name} {text} after {iteration} of {self._total}")

    def _show(self, name: str, value: str) -> None:
        self._postfix[name] = value
        self._bar.set_postfix(self._postfix, refresh=False)

    def _line(self, text: str) -> None:
        print(f"training: {text}", file=sys.stderr, flush=True)

    def _write_validations(self) -> None:
        if not self._validated:
            self._validations.unlink(missing_ok=True)
            return
        columns = dict.fromkeys(name for row in self._validated for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._validated)
        write_file(self._validations, text.getvalue().encode())

    def _text(self, rows: Iterable[Mapping[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def duration(seconds: float) -> str:
    """Formats a duration in one or two units: "40 s", "12 min", "3 h 20 min", "2 d 5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def read_log(path: Path, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """The rows of a metrics.csv or validation.csv, without a last one that a crash cut short.

    Args:
        columns: those that there may be; any by default.
    Raises:
        UserError: if they are not rows of numbers under these names.
    """
    if not path.is_file():
        return []
    try:
        text = read_file(path).decode()
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        for row in rows:
            int(row["iteration"])
            for name, value in row.items():
                if columns and name not in columns:
                    raise ValueError(f"unknown column {name}")
                float(value if value != "" else 0)  # a validation may have no score
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path}: expected the rows of a training log, but got something else ({error!r:.80}); "
            f"to go on without it: {move(path, path.with_suffix('.damaged'))}"
        ) from error
    return rows
