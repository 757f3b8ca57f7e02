"""Tables of text for a terminal."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of cells under a header; `str` aligns them.

    Attributes:
        title: line above the table; empty for none.
        header: names of the columns; empty for none.
        rows: cells, as many in each row as the header has.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """The first column is aligned to the left, the others to the right."""
        lines = [*([self.header] if self.header else []), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = (
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        )
        return "\n".join([*([self.title] if self.title else []), *aligned])


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in percent; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"
