"""Printing of results in the first process of a run."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printing_unsaved() -> Iterator[None]:
    """Prints scores that cannot be written to their file."""
    from deformnet.engine.results import UnsavedScores

    try:
        yield
    except UnsavedScores as error:
        print_once(error.result)
        raise


def print_once(result: object) -> None:
    """Prints scores or a line in the first process of a run only."""
    from lightning.fabric.utilities import rank_zero_only

    rank_zero_only(print)(result)
