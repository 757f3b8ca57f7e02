"""Commands that reproduce the paper."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from deformnet._errors import UserError
from deformnet.cli.options import GROUP
from deformnet.cli.scores import print_once, printing_unsaved
from deformnet.demo.settings import Demo
from deformnet.engine.settings import Hardware
from deformnet.paper.settings import (
    TABLE4_NETWORKS,
    DryRun,
    Splits,
    Table4Network,
    TimingOptions,
)
from deformnet.recipes import BackboneName


def reproduce(
    rows: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="ROW")] = (),
    *,
    list: bool = False,
    dry_run: bool = False,
    data: Path | None = None,
    out: Path | None = None,
    init: str | None = None,
    splits: Annotated[Splits, GROUP] = Splits(),  # noqa: B008 (all are frozen)
    hardware: Annotated[Hardware, GROUP] = Hardware(),  # noqa: B008
    dry: Annotated[DryRun, GROUP] = DryRun(),  # noqa: B008
) -> None:
    """Train and evaluate rows of the paper's Tables 1, 3, 5 and 7 with the published settings.

    Repeat the command to resume an interrupted run. --list prints all rows with the paper's
    numbers, or all settings of the given rows. --dry-run builds the full-size networks and runs two
    training iterations and one evaluation, on synthetic images or on those of --data.

    Args:
        rows: Names of rows, or patterns such as 'table3/rfcn-*'.
        list: Print the rows and exit.
        dry_run: Check that the rows run, and measure memory and time.
        data: Data set folder; see docs/data.md.
        out: Folder for runs, proposals and results; for a dry run, for dry-run.json.
        init: Initial weights of the backbone; None uses those of the row.
    """
    from deformnet.paper.listing import compare, describe_row, list_rows
    from deformnet.paper.rows import ROWS, find_rows

    found = find_rows(rows) if rows else [*ROWS]
    if list:
        print("\n\n".join(map(describe_row, found)) if rows else list_rows(found, out))
        return
    if not rows:
        raise UserError("expected at least one row, but got none; --list prints all rows")
    if dry_run:
        from deformnet.paper.dry_run import dry_run_rows, dry_run_table

        file = None if out is None else out / "dry-run.json"
        print(dry_run_table(dry_run_rows(found, dry, data=data, out=file, splits=splits)))
        return
    from deformnet.paper.reproduce import reproduce, require_runnable

    if data is None or out is None:
        raise UserError(
            "expected --data and --out to name the data set folder and the results folder"
        )
    require_runnable(found, data, splits)
    for row in found:
        with printing_unsaved():
            result = reproduce(row, data, out, init=init, splits=splits, hardware=hardware)
        print_once(compare(row, result))


def parameters(*, classes: int = 20, backbone: BackboneName = "resnet101") -> None:
    """Print the number of parameters that deformable layers add to each network (Table 4).

    Args:
        classes: Number of object classes.
        backbone: Backbone, as in training.
    """
    from deformnet.paper.parameters import parameter_table

    print(parameter_table(classes, backbone))


def table4(
    timing: Annotated[TimingOptions, GROUP] = TimingOptions(),  # noqa: B008 (frozen)
    *,
    rows: tuple[Table4Network, ...] = TABLE4_NETWORKS,
    out: Path | None = None,
) -> None:
    """Measure parameters, FLOPs and times of Table 4's networks, compared with the paper's ratios.

    A multiply-add counts as two FLOPs. "forward" is the time of the network; "whole" also includes
    resizing and non-maximum suppression. At full size, this takes minutes.

    Args:
        rows: Networks to measure.
        out: JSON file for the results.
    """
    from deformnet.paper.table4 import run_table4

    run_table4(timing, rows, out)


def training_step(
    timing: Annotated[TimingOptions, GROUP] = TimingOptions(),  # noqa: B008 (frozen)
    *,
    network: Table4Network = "deeplab-voc",
    out: Path | None = None,
) -> None:
    """Time a training step, and each deformable layer by itself, relative to the plain network.

    Args:
        network: Network of Table 4.
        out: JSON file for the results.
    """
    from deformnet.paper.training_step import run_training_step

    run_training_step(timing, network, out)


def demo(
    settings: Annotated[Demo, tyro.conf.arg(name="")] = Demo(),  # noqa: B008 (frozen)
    *,
    out: Path = Path("demo"),
) -> None:
    """Compare plain, dilated and deformable networks on synthetic images or your own, on one page.

    Args:
        out: Folder for images, runs and results; repeat the command to resume.
    """
    from deformnet.demo.run import run_demo

    run_demo(settings, out, print)
