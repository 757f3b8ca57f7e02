"""Commands about data sets and detections, without a network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from deformnet.cli.errors import BAD_INPUT
from deformnet.cli.options import DirPath, location


def score(
    *, boxes: Path, data: Path, split: str | None = None, ious: tuple[float, ...] = (0.5, 0.7)
) -> None:
    """Score detections from any program.

    For VOC layout and text files: VOC AP, 11-point and area. For COCO layout: the 12 COCO metrics.

    Args:
        boxes: Detections: a .jsonl file from `deformnet predict` or `evaluate`, a .json file of
            COCO results, or a folder of VOC result files or text files (class score x y w h).
        data: Ground truth: a folder in VOC or COCO layout, a .json file of COCO annotations, or a
            folder of text files (class x y w h).
        split: Split of a folder in VOC or COCO layout.
        ious: IoU thresholds of VOC AP; those of COCO AP are fixed.
    """
    from deformnet.tasks.scoring import score

    print(score(boxes, data, split=split, ious=ious))


def check(
    root: Annotated[Path | None, Positional, tyro.conf.arg(metavar="DIR")] = None,
    *,
    images: Path | None = None,
    annotations: Path | None = None,
    custom: bool = False,
    workers: int | None = None,
    record: Path | None = None,
    report: Path | None = None,
) -> None:
    """Check every image, label map and box of a data set, and report contents and problems.

    Valid files are recorded, so an interrupted check resumes and a second one is fast.

    Args:
        root: Folder of one or more data sets.
        images: Folder of images whose annotations are stored elsewhere; use with --annotations
            instead of DIR.
        annotations: File or folder with the annotations for --images.
        custom: Custom data sets: skip the check against official image counts.
        workers: Number of worker processes; None selects it automatically.
        record: File that records valid files; None uses the user's cache folder.
        report: File that lists all problems; None writes it next to the record.
    """
    from deformnet.data.check import check_data

    place = location(root, images, annotations, "DIR")
    result = check_data(place, custom=custom, workers=workers, record=record, report=report)
    print(result)
    if not result.ok:
        raise SystemExit(BAD_INPUT)


def convert(
    source: Annotated[Path, Positional, tyro.conf.arg(metavar="FROM")],
    out: Annotated[Path, Positional, tyro.conf.arg(metavar="TO")],
    *,
    layout: Literal["coco", "voc", "yolo"],
    hard_links: bool = False,
) -> None:
    """Convert a data set with all its splits to the COCO, VOC or YOLO layout.

    Boxes are preserved exactly. Label maps, including those drawn from polygons, are written only
    in the VOC layout.

    Args:
        source: Folder of a data set in any layout.
        out: Folder to create.
        layout: Layout of the new data set.
        hard_links: Create hard links to the images instead of copying them.
    """
    from deformnet.data.convert import convert

    print(convert(source, out, layout, hard_links=hard_links))


def where() -> None:
    """Print where to get the paper's data sets, their expected layout, and their contents."""
    from deformnet.data.check import where_text

    print(where_text())


def synthesize_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The command `data synthesize`, whose options come from a class that is slow to import."""
    if "synthesize" not in arguments:

        def unused() -> None:
            """Generate synthetic shapes with exact label maps and boxes."""

        return unused

    from deformnet.data.synthetic import Shapes, write_shapes

    def synthesize(
        root: DirPath,
        shapes: Annotated[Shapes, tyro.conf.arg(name="")] = Shapes(),  # noqa: B008 (frozen)
    ) -> None:
        """Generate synthetic shapes with exact label maps and boxes, in VOC or image-folder layout.

        Args:
            root: Folder to create.
        """
        write_shapes(root, shapes)
        print(f"{shapes.train} training and {shapes.val} validation images in {root}")

    return synthesize
