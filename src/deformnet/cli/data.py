"""Commands about data sets and detections, without a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from deformnet.cli.errors import BAD_INPUT


def score(
    *, boxes: Path, data: Path, split: str | None = None, ious: tuple[float, ...] = (0.5, 0.7)
) -> None:
    """Score detections from a file, whoever made them.

    VOC's average precision, by 11 points and by area, for data in VOC layout or text files; the 12
    numbers of COCO for data in COCO layout.

    Args:
        boxes: Detections: a .jsonl of `deformnet predict` or `evaluate`, a .json of COCO results,
            or a folder of VOC's result files or of text files (class score x y w h).
        data: Truth: a folder in VOC or COCO layout, a .json of COCO annotations, or a folder of
            text files (class x y w h).
        split: Images to score, of a folder in VOC or COCO layout.
        ious: Overlaps from which VOC counts a detection as right; COCO's are fixed.
    """
    from deformnet.metrics.detections import score, score_table

    print(score_table(score(boxes, data, split=split, ious=ious)))


def check(
    root: Positional[Path],
    *,
    own: bool = False,
    workers: int | None = None,
    record: Path | None = None,
    report: Path | None = None,
) -> None:
    """Look at every image, label and box of a data set, and name what is wrong or missing.

    Files that were found good are remembered: a check that was stopped goes on, and a second one is
    quick.

    Args:
        root: Folder of one or more data sets.
        own: They are own sets in the layout of others, whose official numbers do not apply.
        workers: Processes that look; None chooses.
        record: File of what was found good; None takes one in the user's cache.
        report: File of all that is wrong; None takes one beside the record.
    """
    from deformnet.data.check import check_data

    found = check_data(root, own=own, workers=workers, record=record, report=report)
    print(found)
    if not found.ok:
        raise SystemExit(BAD_INPUT)


def where() -> None:
    """Print where the paper's data sets come from, how they must lie, and what is in them."""
    from deformnet.data.check import where_text

    print(where_text())


def shapes_command() -> Callable[..., None]:
    """The command `shapes`."""
    from deformnet.data.synthetic.shapes import Shapes, write_shapes

    def shapes(
        root: Positional[Path],
        options: Annotated[Shapes, tyro.conf.arg(name="")] = Shapes(),  # noqa: B008 (frozen)
    ) -> None:
        """Make a data set of shapes: with exact masks and boxes, in the VOC layout, or by class.

        Args:
            root: Folder to make.
        """
        write_shapes(root, options)
        print(f"{options.train} training and {options.val} validation images in {root}")

    return shapes
