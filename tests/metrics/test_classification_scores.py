"""Top-1 and top-5 error, counted by hand."""

import math

import pytest
import torch

from deformnet.metrics import ClassificationCounts, classification_scores


def logits_of(*orders, classes=7):
    """Scores [N, C] whose classes from best to worst begin with these."""
    logits = torch.zeros(len(orders), classes)
    for row, order in zip(logits, orders, strict=True):
        for place, label in enumerate(order):
            row[label] = classes - place
    return logits


def test_errors_counted_by_hand():
    counts = ClassificationCounts(7)
    counts.update(
        logits_of([0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 5, 6]),
        torch.tensor([0, 0, 0]),
    )
    counts.update(logits_of([0, 1, 2, 3, 4, 6, 5], [6, 5, 4, 3, 2, 1, 0]), torch.tensor([6, 6]))
    first = [1, 2, 0, 0, 0, 0, 0]
    last = [1, 0, 0, 0, 0, 0, 1]
    assert counts.compute().tolist() == [[*first, 3], *[[0] * 8] * 5, [*last, 1]]
    scores = classification_scores(counts.compute())
    assert scores.top1_error == 3 / 5
    assert scores.top5_error == 1 / 5
    assert scores.class_errors[0] == 2 / 3
    assert scores.class_errors[6] == 1 / 2
    assert all(math.isnan(error) for error in scores.class_errors[1:6])
    json = scores.to_json(list("abcdefg"))
    assert json["top1_error"] == 3 / 5
    assert json["class_errors"] == {"a": 2 / 3, **dict.fromkeys("bcdef"), "g": 1 / 2}
    assert (json["classes_scored"], json["classes"]) == (2, 7)
    counts.reset()
    assert counts.compute().sum() == 0


def test_confusion_matrix_agrees_with_loops():
    generator = torch.Generator().manual_seed(0)
    counts, expected = ClassificationCounts(7), [[0] * 8 for _ in range(7)]
    for _ in range(3):
        logits = torch.randint(4, (40, 7), generator=generator).float()  # with ties
        target = torch.randint(7, (40,), generator=generator)
        counts.update(logits, target)
        for row, label in zip(logits.tolist(), target.tolist(), strict=True):
            ranked = sorted(range(7), key=lambda k: (-row[k], k))
            expected[label][ranked[0]] += 1
            expected[label][7] += label in ranked[:5]
    assert counts.compute().tolist() == expected


@pytest.mark.parametrize("classes", [1, 5, 6])
def test_five_guesses_of_five_classes_say_nothing(classes):
    counts = ClassificationCounts(classes)
    counts.update(torch.zeros(1, classes), torch.tensor([classes - 1]))
    scores = classification_scores(counts.compute())
    assert scores.top5_error == (1.0 if classes == 6 else None)
    assert scores.to_json([str(i) for i in range(classes)])["top5_error"] == scores.top5_error


def test_equal_scores_are_not_correct():
    counts = ClassificationCounts(10)
    counts.update(torch.zeros(10, 10), torch.arange(10))
    assert classification_scores(counts.compute()).top1_error == 0.9
    assert classification_scores(counts.compute()).top5_error == 0.5


def test_no_images_no_numbers():
    json = classification_scores(ClassificationCounts(6).compute()).to_json(list("abcdef"))
    assert json["top1_error"] is None
    assert json["top5_error"] is None


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((2, 3), [0], "expected logits"),
        ((3,), [0, 1, 2], "expected logits"),
        ((2, 4), [0, 1], "of 3 classes, but got 4"),
        ((2, 3), [0, 3], "0 to 2, but got 3"),
        ((2, 3), [-1, 0], "0 to 2, but got -1"),
    ],
)
def test_what_does_not_fit(logits, target, message):
    with pytest.raises(ValueError, match=message):
        ClassificationCounts(3).update(torch.zeros(logits), torch.tensor(target))
