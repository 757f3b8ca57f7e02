"""Figures of scores: confusion matrices and precision-recall curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from deformnet.visualization.canvas import TEXT, blank
from deformnet.visualization.colors import BLACK, BLUE, WHITE, distinct_colors

MOST = 30
"""Maximum number of classes in a figure; more would not be legible."""

_LONGEST = 24  # characters of a name
_SHADES = LinearSegmentedColormap.from_list("shades", [WHITE, BLUE])
_EMPTY = "#f2f2f2"
_LINES = ("-", "--", ":")


def confusion_figure(
    counts: np.ndarray,
    classes: Sequence[str],
    *,
    things: str,
    background: bool = False,
    note: str = "",
) -> Figure:
    """Draws a confusion matrix in percent of the ground truth of each class.

    If there are more than `MOST` classes, the classes with the most ground truth are shown, and the
    others are combined.

    Args:
        counts: [n, n], rows ground truth, columns prediction.
        classes: names of the rows and columns.
        things: name of the counted items, such as "pixels".
        background: the last row and column stand for no object; the last row is then in percent
            of the predictions of each class.
        note: a line below the figure.
    Raises:
        ValueError: if the sizes do not match.
    """
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(
            f"expected counts to be [{len(classes)}, {len(classes)}] for {len(classes)} classes, "
            f"but got {list(counts.shape)}"
        )
    counts, names, shown = _most_frequent(counts, classes, things, background)
    side = len(names)
    whole = np.broadcast_to(counts.sum(1, keepdims=True), counts.shape).astype(float)
    if background:
        whole[-1] = counts.sum(0)
    fractions = np.divide(counts, whole, out=np.full(counts.shape, np.nan), where=whole > 0)
    if background:
        fractions[-1, -1] = np.nan
    figure = blank(width=max(5.5, 2.8 + 0.36 * side), height=max(4.5, 2.6 + 0.36 * side))
    axes = figure.subplots()
    axes.set_facecolor(_EMPTY)
    axes.imshow(fractions, cmap=_SHADES, vmin=0, vmax=1, aspect="equal")
    _write_cells(axes, fractions)
    numbers = counts.sum(1).tolist()
    labels = [f"{name} ({short_count(n)})" for name, n in zip(names, numbers, strict=True)]
    axes.set_xticks(range(side), names, rotation=90, fontsize=8)
    axes.set_yticks(range(side), labels, fontsize=8)
    axes.set_xticks(np.arange(side - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(side - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=_EMPTY, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if background:
        for line in (axes.axhline, axes.axvline):
            line(side - 1.5, color=BLACK, linewidth=0.8)
    axes.set_xlabel("prediction", fontsize=TEXT)
    axes.set_ylabel(f"ground truth (number of {things})", fontsize=TEXT)
    figure.suptitle(f"Percent of the {things} of each class", fontsize=TEXT)
    of_background = (
        "last row: percent of the detections of each class that match no object"
        if background
        else ""
    )
    notes = [line for line in (note, of_background, shown) if line]
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=8)
    return figure


def precision_recall_figure(
    precision: np.ndarray,
    recall: np.ndarray,
    ap: Sequence[float],
    objects: Sequence[int],
    classes: Sequence[str],
) -> Figure:
    """Draws the precision-recall curve of each class, and the mean over the classes with objects.

    If there are more than `MOST` classes, the classes with the most objects are shown.

    Args:
        precision: [C, R], 0 if a recall is not reached, NaN for a class without objects.
        recall: [R].
        ap: average precision of each class.
        objects: number of objects of each class.
        classes: names of the classes.
    """
    scored = [k for k in range(len(classes)) if objects[k]]
    shown = sorted(scored, key=lambda k: -objects[k])[:MOST]
    figure = blank(width=8.5, height=max(4.8, 1.5 + 0.2 * len(shown)))
    axes = figure.subplots()
    colors = distinct_colors(len(classes)) / 255
    for k in sorted(shown, key=lambda k: -ap[k]):
        line = _LINES[k // 7 % len(_LINES)]
        label = f"{_shortened(classes[k])}  {100 * ap[k]:.1f}"
        # A curve drops to 0 at its maximum recall.
        end = np.count_nonzero(precision[k] > 0)
        x, y = np.append(recall[:end], recall[max(end - 1, 0)]), np.append(precision[k][:end], 0)
        axes.step(x, y, line, color=colors[k], linewidth=1.3, label=label)
    if len(scored) > 1:
        mean = float(np.mean([ap[k] for k in scored]))
        number = "" if len(scored) == len(classes) else f"{len(scored)} of "
        label = f"mean of {number}{len(classes)} classes  {100 * mean:.1f}"
        axes.step(recall, precision[scored].mean(0), color=BLACK, linewidth=2.4, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel("recall", fontsize=TEXT)
    axes.set_ylabel("precision", fontsize=TEXT)
    axes.grid(color=_EMPTY)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Precision and recall at IoU 0.5", fontsize=TEXT)
    if scored:
        figure.legend(
            *axes.get_legend_handles_labels(),
            title="AP in percent",
            loc="outside right upper",
            fontsize=8,
            frameon=False,
        )
    notes = []
    if len(scored) > len(shown):
        notes.append(f"the {len(shown)} of {len(scored)} classes with the most objects")
    if len(scored) < len(classes):
        notes.append(f"{len(classes) - len(scored)} of {len(classes)} classes have no objects")
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8)
    return figure


def short_count(count: int) -> str:
    """Formats a count with at most three digits: "987", "12k", "3.4M"."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return (
                f"{count / unit:.2g}{letter}" if count < 10 * unit else f"{count // unit}{letter}"
            )
    return str(count)


def _most_frequent(
    counts: np.ndarray, classes: Sequence[str], things: str, background: bool
) -> tuple[np.ndarray, list[str], str]:
    """The matrix and names of the classes to show, and a note if some are combined."""
    own = len(classes) - background
    if own <= MOST:
        return counts, [_shortened(name) for name in classes], ""
    frequent = np.argsort(-counts.sum(1)[:own], kind="stable")[:MOST]
    shown = sorted(frequent.tolist())
    others = own - MOST
    # Row of each class: its own, or that of the combined classes.
    places = np.full(len(classes), MOST)
    places[shown] = np.arange(MOST)
    places[own:] = MOST + 1
    size = MOST + 1 + background
    joined = np.zeros((size, size), dtype=counts.dtype)
    np.add.at(joined, (places[:, None], places[None, :]), counts)
    names = [*(classes[k] for k in shown), f"{others} others", *classes[own:]]
    note = f"the {MOST} of {own} classes with the most {things}; the others are combined"
    return joined, [_shortened(name) for name in names], note


def _write_cells(axes: Axes, fractions: np.ndarray) -> None:
    """Labels the cells in percent; cells that round to zero stay empty."""
    size = 8 if len(fractions) <= 12 else 7
    for (row, column), value in np.ndenumerate(fractions):
        if value >= 0.005:
            color = WHITE if value > 0.6 else BLACK
            text = f"{100 * value:.0f}"
            axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
