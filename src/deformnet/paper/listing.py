"""What `deformnet reproduce --list` prints."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deformnet.paper.rows import Row, choices


def result_path(row: Row, out: Path) -> Path:
    """Where the result of a row lies."""
    return out / "results" / f"{row.name}.json"


def list_rows(rows: Sequence[Row], out: Path | None) -> str:
    """Table, row, data, the paper's numbers and those measured here.

    Args:
        rows: which.
        out: folder of `reproduce`, whose results are shown; None for none.
    """
    lines = []
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data is data]
        metrics = list(dict.fromkeys(name for row in of_data for name in row.paper))
        lines += [
            f"{data.title}: {data.classes} classes, trained on {data.train}, tested on {data.test}",
            f"  {'row':38} {'paper: ' + ' / '.join(metrics):44} ours",
        ]
        for row in of_data:
            paper = " / ".join(f"{row.paper[name]:.1f}" for name in row.paper)
            lines.append(f"  {row.name:38} {paper:44} {_ours(row, out)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def describe_row(row: Row) -> str:
    """Recipe, splits, testing and choices of one row."""
    lines = [f"{row.name}: {row.data.title}, {row.data.train} -> {row.data.test}"]
    if row.recipe is None:
        return f"{lines[0]}\n  not built here: {row.missing}"
    lines += [f"  {name}: {json.dumps(value)}" for name, value in row.recipe.to_dict().items()]
    if row.testing.scales:
        lines.append(f"  testing: {row.testing}")
    lines += [f"  - {text}" for text in choices(row)]
    return "\n".join(lines)


def compare(row: Row, result: Mapping[str, Any]) -> str:
    """What was measured beside what was published, as `reproduce` returns it."""
    lines = [f"{row.name}: {row.data.title}, {result['train_split']} -> {result['test_split']}"]
    for name, published in row.paper.items():
        ours = result["measured"].get(name)
        measured = "    -" if ours is None else f"{ours:5.1f}"
        lines.append(f"  {name:12} paper {published:5.1f}   ours {measured}")
    if "submission" in result["metrics"]:
        lines.append(f"  scores come from COCO's server: upload {result['metrics']['submission']}")
    return "\n".join(lines)


def _ours(row: Row, out: Path | None) -> str:
    if row.recipe is None:
        return f"not built: {row.missing}"
    if out is not None and result_path(row, out).is_file():
        measured = json.loads(result_path(row, out).read_text())["measured"]
        return " / ".join(
            "-" if measured.get(name) is None else f"{measured[name]:.1f}" for name in row.paper
        )
    return "not measured: no full data set, no days of GPUs"
