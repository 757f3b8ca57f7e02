"""Pictures of scores show the numbers that they are given, of the most frequent classes."""

import numpy as np
import pytest

from deformnet.visualization import confusion_figure, precision_recall_figure, save_figure
from deformnet.visualization.scores import short_count

RECALL = np.linspace(0, 1, 101)


def matrix_of(figure):
    """Shown fractions, names of rows and columns, and texts of the cells."""
    (axes,) = figure.axes
    (image,) = axes.images
    names = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    texts = {
        (text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts
    }
    return np.ma.filled(image.get_array(), np.nan), names, columns, texts


def test_rows_in_percent_of_the_ground_truth(tmp_path):
    counts = np.array([[60, 30, 10], [0, 0, 0], [0, 999, 1]])
    figure = confusion_figure(counts, ["a", "b", "c"], things="pixels")
    shown, rows, columns, texts = matrix_of(figure)
    np.testing.assert_allclose(shown[0], [0.6, 0.3, 0.1])
    assert np.isnan(shown[1]).all()
    assert rows == ["a (100)", "b (0)", "c (1k)"]
    assert columns == ["a", "b", "c"]
    assert texts == {(0, 0): "60", (0, 1): "30", (0, 2): "10", (2, 1): "100"}
    save_figure(figure, tmp_path / "matrix.png")


def test_the_background_row_is_in_percent_of_the_detections():
    counts = np.array([[6, 0, 4], [2, 3, 0], [8, 0, 0]])
    shown, *_ = matrix_of(
        confusion_figure(counts, ["a", "b", "background"], things="objects", background=True)
    )
    np.testing.assert_allclose(shown[0], [0.6, 0, 0.4])
    np.testing.assert_allclose(shown[2], [0.5, 0, np.nan])


@pytest.mark.parametrize("background", [False, True])
def test_of_many_classes_the_most_frequent_and_the_others_as_one(background):
    rng = np.random.default_rng(0)
    names = [f"{k}" for k in range(100)] + ["background"] * background
    counts = rng.integers(0, 5, (len(names),) * 2)
    counts[[7, 50]] += 10
    figure = confusion_figure(counts, names, things="objects", background=background)
    shown, rows, columns, _ = matrix_of(figure)
    assert len(rows) == 31 + background
    kept = [int(name) for name in columns[:30]]
    assert kept == sorted(kept)
    assert {7, 50} <= set(kept)
    sums = counts.sum(1)[:100]
    rest = [k for k in range(100) if k not in kept]
    assert min(sums[kept]) >= max(sums[rest])
    assert columns[30] == "70 others"
    seven = counts[7]
    np.testing.assert_allclose(shown[kept.index(7), 30], seven[rest].sum() / seven.sum())
    inner = counts[np.ix_(rest, rest)].sum()
    np.testing.assert_allclose(shown[30, 30], inner / counts[rest].sum())
    if background:
        np.testing.assert_allclose(shown[31, 0], counts[100, kept[0]] / counts[:, kept[0]].sum())
    assert "the 30 of 100 classes" in figure._supxlabel.get_text()


def test_sizes_that_disagree():
    with pytest.raises(ValueError, match=r"expected counts to be \[3, 3\].*\[2, 2\]"):
        confusion_figure(np.zeros((2, 2), int), "abc", things="images")


def test_curves_end_where_recall_does_and_their_mean(tmp_path):
    precision = np.zeros((3, 101))
    precision[0, :51], precision[1, :], precision[2] = 1.0, 0.5, np.nan
    ap = (0.5, 0.5, np.nan)
    figure = precision_recall_figure(precision, RECALL, ap, (3, 2, 0), ["cat", "dog", "cow"])
    cat, dog, mean = figure.axes[0].lines
    assert (cat.get_xdata()[-1], cat.get_ydata()[-1]) == (0.5, 0)
    assert (dog.get_xdata()[-1], dog.get_ydata()[-2]) == (1, 0.5)
    np.testing.assert_allclose(mean.get_ydata(), np.where(RECALL < 0.505, 0.75, 0.25))
    labels = [line.get_label() for line in (cat, dog, mean)]
    assert labels == ["cat  50.0", "dog  50.0", "mean of 2 of 3 classes  50.0"]
    assert "1 of 3 classes have no objects" in figure._supxlabel.get_text()
    save_figure(figure, tmp_path / "curves.png")


def test_curves_of_the_most_frequent_classes(tmp_path):
    names = [f"class {k}" for k in range(100)]
    precision = np.full((100, 101), 0.5)
    figure = precision_recall_figure(precision, RECALL, [0.5] * 100, range(1, 101), names)
    lines = figure.axes[0].lines
    assert len(lines) == 31
    assert {line.get_label() for line in lines[:-1]} == {f"class {k}  50.0" for k in range(70, 100)}
    assert lines[-1].get_label() == "mean of 100 classes  50.0"
    assert "the 30 of 100 classes" in figure._supxlabel.get_text()


def test_nothing_to_draw(tmp_path):
    nothing = np.full((1, 101), np.nan)
    save_figure(precision_recall_figure(nothing, RECALL, [np.nan], [0], ["a"]), tmp_path / "a.png")
    found = confusion_figure(np.zeros((2, 2), int), ["a", "b"], things="o", background=True)
    save_figure(found, tmp_path / "b.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.2k"), (12999, "12k"), (5 * 10**6, "5M")],
)
def test_short_counts(count, text):
    assert short_count(count) == text
