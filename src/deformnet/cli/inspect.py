"""Commands that show what a network has learned."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from deformnet.cli.options import GROUP, RunPath
from deformnet.inspection.settings import Analysis, Page


def analyze(
    run: RunPath,
    *,
    data: Path,
    out: Path,
    analysis: Annotated[Analysis, GROUP] = Analysis(),  # noqa: B008 (frozen)
) -> None:
    """Write a report of what the offsets have learned: Figures 5 to 7, Table 2 and more.

    OUT/index.html shows the figures, which are also saved as PNG and SVG. OUT/analysis.json has the
    numbers: sampling locations, effective dilation by object size, moved bins, effective receptive
    fields, offset ranges, and the cost of each layer.

    Args:
        run: Run folder or exported network: DeepLab or a detector with deformable layers.
        data: Data set folder with label maps (DeepLab) or boxes (detectors).
        out: Folder for the report.
    """
    from deformnet.inspection.report import analyze

    analyze(run, data, out, analysis)
    print(f"report: {out / 'index.html'}")


def view(
    run: RunPath,
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")] = (),
    page: Annotated[Page, GROUP] = Page(),  # noqa: B008 (frozen)
) -> None:
    """Explore sampling locations interactively on a local web page.

    Click a point of an image to see its sampling locations, layer by layer; click a detection to
    see its bins. By default, the page is served to this machine only (see --host). Uploaded images
    are not kept. Requires Gradio: pip install 'deformnet[view]'.

    Args:
        run: Run folder or exported network with deformable layers.
        images: Image files, or folders of images, to choose from; more can be uploaded on the page.
    """
    from deformnet.inspection.viewer.serving import serving

    with _interrupted_by_sigterm(), serving(run, images, page) as address:
        print(f"The page is at {address} (Ctrl-C to stop)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM end the program like Ctrl-C, so that uploads are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
