"""Printing of results in the first process of a run."""


def print_once(result: object) -> None:
    """Prints scores or a line in the first process of a run only."""
    from lightning.fabric.utilities import rank_zero_only

    rank_zero_only(print)(result)
