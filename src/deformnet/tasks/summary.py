"""Lines about the ground truth that a network is trained on."""

from collections.abc import Sequence

from deformnet.data.files import listing

SAMPLED = 50
"""Number of images that are read where counting needs their content."""

_LISTED = 12


def sample_of(length: int) -> list[int]:
    """Indices of at most `SAMPLED` images, evenly spaced, the first one among them."""
    count = min(length, SAMPLED)
    return [number * length // count for number in range(count)]


def by_class(classes: Sequence[str], counts: Sequence[float], form: str = "{:,}") -> str:
    """Names and counts, the largest first, without classes that do not occur."""
    pairs = sorted(zip(counts, classes, strict=True), key=lambda pair: -pair[0])
    return listing([f"{name} {form.format(count)}" for count, name in pairs if count], _LISTED)


def absent(
    what: str, classes: Sequence[str], counts: Sequence[float], where: str = ""
) -> list[str]:
    """A line that warns about classes that do not occur, if there are any."""
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    return [f"warning: no {what} of class {listing(missing, _LISTED)}{where}"] if missing else []
