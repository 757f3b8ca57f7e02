"""Commands that show what a network has learned."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from tyro.conf import Positional


def analyze(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    *,
    data: Path,
    out: Path,
    split: str = "val",
    baseline: Path | None = None,
    images: int | None = None,
    objects: tuple[str, ...] = (),
    device: str | None = None,
) -> None:
    """Write a report of what the offsets have learned: Figures 5 to 7, Table 2 and more.

    OUT/index.html shows the figures, which are also saved as PNG and SVG. OUT/analysis.json has the
    numbers: sampling locations, effective dilation by object size, moved bins, effective receptive
    fields, offset ranges, and the cost of each layer.

    Args:
        run: Run folder of DeepLab or a detector with deformable layers.
        data: Data set folder with label maps (DeepLab) or boxes (detectors).
        out: Folder for the report.
        split: Split to analyze.
        baseline: Run folder of the same network without deformable layers, for comparison.
        images: Number of images to analyze, from the start of the split; None analyzes all.
        objects: For label maps: classes whose connected regions count as objects; all others are
            background. By default, all classes except stuff such as sky, road and building.
        device: Device, such as cpu or cuda:1; None uses a GPU if there is one.
    """
    from deformnet.inspection.report import analyze

    analyze(
        run,
        data,
        out,
        split=split,
        baseline=baseline,
        images=images,
        objects=objects,
        device=device,
    )
    print(f"report: {out / 'index.html'}")


def view(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")] = (),
    *,
    baseline: Path | None = None,
    data: Path | None = None,
    split: str = "val",
    host: str = "127.0.0.1",
    port: int | None = None,
    open: bool = False,
    device: str | None = None,
) -> None:
    """Explore sampling locations interactively on a local web page.

    Click a point of an image to see its sampling locations, layer by layer; click a detection to
    see its bins. By default, the page is served to this machine only (see --host). Uploaded images
    are not kept. Requires Gradio: pip install 'deformnet[view]'.

    Args:
        run: Run folder of a network with deformable layers.
        images: Image files, or folders of images, to choose from; more can be uploaded on the page.
        baseline: Run folder of the same network without deformable layers, for comparison.
        data: Data set folder to use instead of IMAGE; its ground truth is shown.
        split: Split of the data set.
        host: Address to listen on; 0.0.0.0 makes the page accessible from other machines.
        port: Port to listen on; None picks a free one.
        open: Open the page in a browser.
        device: Device, such as cpu or cuda:1; None uses a GPU if there is one.
    """
    from deformnet.inspection.viewer.serving import serving

    page = serving(
        run,
        images,
        baseline=baseline,
        data=data,
        split=split,
        host=host,
        port=port,
        open=open,
        device=device,
    )
    with _interrupted_by_sigterm(), page as address:
        print(f"The page is at {address} (Ctrl-C to stop)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the program like Ctrl-C, so that uploads are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
