"""Tables of rows for `deformnet paper reproduce`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from deformnet._errors import UserError
from deformnet._files import read_json
from deformnet._text import Table
from deformnet.paper.reproduce import RowResult, result_path
from deformnet.paper.rows import Row


def list_rows(rows: Sequence[Row], out: Path | None) -> str:
    """Return rows by data set, with the paper's numbers and those of `reproduce` in `out`."""
    tables = []
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data is data]
        metrics = dict.fromkeys(name for row in of_data for name in row.paper)
        tables.append(
            Table(
                f"{data.title}: {data.classes} classes, training on {data.train}, testing on "
                f"{data.test}",
                ("row", f"paper: {' / '.join(metrics)}", "ours"),
                [(row.name, _numbers(row, row.paper), _ours(row, out)) for row in of_data],
            )
        )
    return "\n\n".join(map(str, tables))


def describe_row(row: Row) -> str:
    """Return recipe, splits, test-time augmentation and choices of a row."""
    lines = [f"{row.name}: {row.data.title}, {row.data.train} -> {row.data.test}"]
    if row.recipe is None:
        return f"{lines[0]}\n  not implemented: {row.missing}"
    lines += [f"  {name}: {json.dumps(value)}" for name, value in row.recipe.to_dict().items()]
    if row.augmentation.scales:
        lines.append(f"  augmentation: {row.augmentation}")
    lines += [f"  - {text}" for text in row.choices]
    return "\n".join(lines)


def compare(row: Row, result: RowResult) -> str:
    """Return the measured numbers of a row and the published ones."""
    table = Table(
        f"{row.name}: {row.data.title}, {result['train_split']} -> {result['test_split']}",
        ("metric", "paper", "ours"),
        [
            (name, f"{published:.1f}", _number(result["measured"].get(name)))
            for name, published in row.paper.items()
        ],
    )
    if "submission" not in result["metrics"]:
        return str(table)
    return f"{table}\nCOCO's server has the ground truth: upload {result['metrics']['submission']}"


def _ours(row: Row, out: Path | None) -> str:
    if row.recipe is None:
        return f"not implemented: {row.missing}"
    if out is not None and result_path(row, out).is_file():
        content = read_json(path := result_path(row, out))
        if not isinstance(content, dict) or not isinstance(content.get("measured"), dict):
            raise UserError(
                f"{path}: expected a result of `paper reproduce`, but got another file; rename it"
            )
        return _numbers(row, content["measured"])
    return "not measured: needs the full data set and days of GPU time"


def _numbers(row: Row, values: Mapping[str, float | None]) -> str:
    return " / ".join(_number(values.get(name)) for name in row.paper)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
