"""What a training run reports while it proceeds: metrics.csv, TensorBoard and the progress bar."""

import csv
import io
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from deformnet._files import naming, replacing


class TrainingLog:
    """Logs of the first process. Rows are on disk at once, and never repeated after a resume.

    Args:
        run: run folder.
        terms: names of the terms of the loss, if there are several.
        done: iteration that the run resumes from; later rows are dropped.
        total: iterations of the run.
        progress: show a progress bar; where the output is no terminal, every 50 iterations.
    """

    def __init__(
        self, run: Path, terms: Sequence[str], done: int, total: int, *, progress: bool = False
    ) -> None:
        self.path = run / "metrics.csv"
        self.columns = ("iteration", "loss", *terms, "learning_rate", "seconds")
        rows = [row for row in read_log(self.path) if int(row["iteration"]) <= done]
        with replacing(self.path) as file:
            header = ",".join(self.columns) + "\n"
            file.write((header + self._text(rows)).encode())
        self._tensorboard = SummaryWriter(run / "tensorboard", purge_step=done + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc="training",
            initial=done,
            total=total,
            disable=not progress,
            miniters=1 if terminal else 50,
            mininterval=0.1 if terminal else 0,
        )
        self._since, self._last = time.perf_counter(), done

    def close(self) -> None:
        self._bar.close()
        self._tensorboard.close()

    def step(self) -> None:
        """Counts an iteration."""
        self._bar.update()

    def record(
        self, iteration: int, values: Mapping[str, float], scalars: Mapping[str, float]
    ) -> None:
        """Writes a row, with the mean seconds per iteration (loading included) since the last one.

        `values` go by the names of the columns; `scalars` are for TensorBoard only.
        """
        now = time.perf_counter()
        values = {**values, "seconds": (now - self._since) / (iteration - self._last)}
        self._since, self._last = now, iteration
        row = {"iteration": str(iteration)} | {k: f"{v:.9g}" for k, v in values.items()}
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._text([row]))
        for name, value in {**values, **scalars}.items():
            self._tensorboard.add_scalar(name, value, iteration)
        # Written here, so that no other thread runs into a full disk later.
        self._tensorboard.flush()
        self._bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)

    def _text(self, rows: Iterable[Mapping[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, without a last one that a crash cut short."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole)))
