"""Commands that show what the paper shows."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from deformnet.demo.settings import Demo
from deformnet.paper.settings import (
    TABLE4_NETWORKS,
    DryRun,
    Machines,
    Splits,
    Table4Network,
    TimingOptions,
)
from deformnet.recipes import BackboneName


def reproduce(
    rows: Positional[tuple[str, ...]] = (),
    *,
    list: bool = False,
    dry_run: bool = False,
    data: Path | None = None,
    out: Path | None = None,
    init: str | None = None,
    splits: Annotated[Splits, tyro.conf.arg(name="")] = Splits(),  # noqa: B008 (it is frozen)
    machines: Annotated[Machines, tyro.conf.arg(name="")] = Machines(),  # noqa: B008
    dry: Annotated[DryRun, tyro.conf.arg(name="")] = DryRun(),  # noqa: B008
) -> None:
    """Train and score rows of the paper's Tables 1, 3, 5 and 7, with the published settings.

    The same command continues a stopped run. --list prints the rows with the paper's numbers, or
    of the named ones all settings; --dry-run builds the networks at full size, takes two training
    steps and scores once, on made images or on those of --data.

    Args:
        rows: Names of rows, or patterns such as 'table3/rfcn-*'.
        list: Print and do no more.
        dry_run: Find out that it runs, in how much memory and time.
        data: Folder of the data set; see docs/data.md.
        out: Folder of runs, proposals and results; of a dry run for dry-run.json.
        init: What the backbone starts from, in the place of what the row names.
    """
    from deformnet.paper.listing import compare, describe_row, list_rows
    from deformnet.paper.rows import ROWS, find_rows

    found = find_rows(rows) if rows else [*ROWS]
    if list:
        print("\n\n".join(map(describe_row, found)) if rows else list_rows(found, out))
        return
    if not rows:
        raise ValueError("rows: name at least one; --list prints all")
    if dry_run:
        from deformnet.paper.dry_run import dry_run_rows, dry_run_table

        file = None if out is None else out / "dry-run.json"
        print(dry_run_table(dry_run_rows(found, dry, data=data, out=file, splits=splits)))
        return
    from lightning.pytorch.utilities import rank_zero_only

    from deformnet.paper.reproduce import reproduce, require_runnable

    if data is None or out is None:
        raise ValueError("data, out: wanted the folder of the data set and one for the results")
    require_runnable(found, data, splits)
    for row in found:
        result = reproduce(row, data, out, init=init, splits=splits, machines=machines)
        rank_zero_only(print)(compare(row, result))


def parameters(*, classes: int = 20, backbone: BackboneName = "resnet101") -> None:
    """Print how many parameters deformable layers add to each network (Table 4 of the paper).

    Args:
        classes: Classes of objects.
        backbone: As in training.
    """
    from deformnet.paper.parameters import parameter_table

    print(parameter_table(classes, backbone))


def table4(
    bench: Annotated[TimingOptions, tyro.conf.arg(name="")] = TimingOptions(),  # noqa: B008 (it is frozen)
    *,
    rows: tuple[Table4Network, ...] = TABLE4_NETWORKS,
    out: Path | None = None,
) -> None:
    """Parameters, FLOPs and times of the networks of Table 4, and the ratios beside the paper's.

    FLOPs: two for a multiply-add. Forward is the network alone; whole is what a predictor does with
    an image, resizing and suppression included. At full size it takes minutes.

    Args:
        rows: Networks.
        out: JSON file of the results.
    """
    from deformnet.paper.table4 import run_table4

    run_table4(bench, rows, out)


def training_step(
    bench: Annotated[TimingOptions, tyro.conf.arg(name="")] = TimingOptions(),  # noqa: B008 (it is frozen)
    *,
    network: Table4Network = "deeplab-voc",
    out: Path | None = None,
) -> None:
    """A training step of a deformable network, and each deformable layer alone, beside the plain.

    Args:
        network: As in table4.
        out: JSON file of the results.
    """
    from deformnet.paper.training_step import run_training_step

    run_training_step(bench, network, out)


def demo(
    options: Annotated[Demo, tyro.conf.arg(name="")] = Demo(),  # noqa: B008 (it is frozen)
    *,
    out: Path = Path("demo"),
) -> None:
    """Compare a plain and a deformable network on made images, in a table and in pictures.

    Args:
        out: Folder of images, runs and results; the same command continues what is in it.
    """
    from deformnet.demo.run import run_demo

    run_demo(options, out, print)


def analyse(
    run: Positional[Path],
    *,
    data: Path,
    out: Path,
    split: str = "val",
    plain: Path | None = None,
    images: int | None = None,
    objects: tuple[str, ...] = (),
    device: str | None = None,
) -> None:
    """Show what a run's offsets have learned: Figures 5 to 7, Table 2 and more, on one page.

    OUT/index.html has the pictures, which lie beside it as PNG and SVG, OUT/analysis.json the
    numbers: sampling locations, effective dilation by size of object, moved bins, effective
    receptive fields, how far offsets reach, and what each layer costs.

    Args:
        run: Run folder of a DeepLab or a detector with deformable layers.
        data: Folder of images with label maps (DeepLab) or boxes (detectors), as for training.
        out: Folder of the results.
        split: Images to look at.
        plain: Run folder of the same network without deformable layers, to compare with.
        images: Only so many of the split, from its beginning.
        objects: Of label maps, the classes whose connected regions are objects; all others are
            background. Without names, all but the likes of sky, road and building.
        device: Where to compute, such as cpu or cuda:1; None takes a GPU if there is one.
    """
    from deformnet.inspection.report import analyse

    analyse(
        run,
        data,
        out,
        split=split,
        plain=plain,
        images=images,
        objects=objects,
        device=device,
    )
    print(f"what {run} has learned: {out / 'index.html'}")
