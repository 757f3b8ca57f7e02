"""The command that shows where a network looks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tyro.conf import Positional


def view(
    run: Positional[Path],
    images: Positional[tuple[Path, ...]] = (),
    *,
    plain: Path | None = None,
    data: Path | None = None,
    split: str = "val",
    host: str = "127.0.0.1",
    port: int | None = None,
    open: bool = False,
    device: str | None = None,
) -> None:
    """Look at where a network looks, on a local web page.

    Click a point of an image, and its sampling locations appear, layer by layer; click a detection,
    and its bins. The page is for this machine alone unless --host says otherwise, and keeps nothing
    that it is sent. It needs Gradio: pip install 'deformnet[view]'.

    Args:
        run: Run folder, of a network with deformable layers.
        images: Image files, or folders of them, to choose from; others can be opened on the page.
        plain: Run folder of the plain twin, to switch to.
        data: Folder of a data set, as for training, in the place of IMAGES; its truth is shown.
        split: Images of the data set.
        host: Address to listen at; 0.0.0.0 lets everybody in who can reach this machine.
        port: Port to listen at; None takes a free one.
        open: Open the page in a browser.
        device: Where to compute, such as cpu or cuda:1; None takes a GPU if there is one.
    """
    from deformnet.inspection.viewer.serving import serving

    page = serving(
        run,
        images,
        plain=plain,
        data=data,
        split=split,
        host=host,
        port=port,
        open=open,
        device=device,
    )
    with _ended_in_order(), page as address:
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Where the system ends the program, too, what was sent is removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
