"""Summary of the training data, printed before training."""

from collections.abc import Sequence

from deformnet.data.files import listing

SAMPLED = 50
"""Number of images to read if counting requires their content."""

_LISTED = 12


def sample_of(length: int) -> list[int]:
    """Indices of at most `SAMPLED` evenly spaced images, starting with the first."""
    count = min(length, SAMPLED)
    return [number * length // count for number in range(count)]


def by_class(classes: Sequence[str], counts: Sequence[float], form: str = "{:,}") -> str:
    """Class names and counts in descending order, without classes that do not occur."""
    pairs = sorted(zip(counts, classes, strict=True), key=lambda pair: -pair[0])
    return listing([f"{name} {form.format(count)}" for count, name in pairs if count], _LISTED)


def absent(
    what: str, classes: Sequence[str], counts: Sequence[float], where: str = ""
) -> list[str]:
    """A warning about classes that do not occur, if there are any."""
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    return [f"warning: no {what} of class {listing(missing, _LISTED)}{where}"] if missing else []
