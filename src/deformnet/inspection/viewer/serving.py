"""Opening runs and images, and serving the page."""

import atexit
import errno
import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from deformnet.inspection.viewer.images import LARGEST_FILE, ImageFiles, LabelledImages
from deformnet.inspection.viewer.networks import open_networks

_PORTS = range(7860, 7960)  # of which one that is free is taken


@contextmanager
def serving(
    run: Path,
    images: Sequence[Path] = (),
    *,
    plain: Path | None = None,
    data: Path | None = None,
    split: str = "val",
    host: str = "127.0.0.1",
    port: int | None = None,
    open: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[str]:
    """Serves the page while the program goes on.

    Args:
        run: with deformable layers.
        images: files and folders to choose from; more can be sent to the page.
        plain: run of the plain twin.
        data, split: a data set to choose images from, whose truth is then shown.
        host: address to listen at.
        port: None takes one that is free.
        open: open the page in a browser.
        device: where to compute; None takes a GPU if there is one.
    Yields:
        Its address.
    Raises:
        FileNotFoundError, ValueError: as `open_networks`, `ImageFiles` and `LabelledImages`.
        OSError: if it cannot listen there.
        RuntimeError: if Gradio is not installed.
    """
    if images and data is not None:
        raise ValueError("images, data: wanted one of them, got both")
    _free_port(host, port)  # so that it is known before networks are opened
    with _own_folder():
        try:
            from deformnet.inspection.viewer.page import CSS, build_page, theme
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "gradio":
                raise
            raise RuntimeError(
                "the page needs Gradio, which is not installed: pip install 'deformnet[view]'"
            ) from error
        network, twin = open_networks(run, plain, device)
        if data is not None:
            listed = LabelledImages.open(network.predictor, data, split)
        else:
            listed = ImageFiles(images) if images else None
        page = build_page(run.name, listed, network, twin)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=_free_port(host, port),
                inbrowser=open,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                enable_monitoring=False,
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                theme=theme(),
                css=CSS,
            )
            yield address
        finally:
            page.close(verbose=False)


@contextmanager
def _own_folder() -> Iterator[None]:
    """Gradio keeps what it is sent and what it shows in a folder that ends with the page."""
    folder = _folder()
    # It reads these when it is imported. Nothing is to be told to anybody.
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _folder() -> str:
    """One for the whole program: Gradio goes on to use the first that it was given."""
    folder = tempfile.mkdtemp(prefix="deformnet-view-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _free_port(host: str, port: int | None) -> int:
    """The port, or the first that is free.

    Raises:
        OSError: if it is in use, or the host is not one of this machine.
    """
    for number in _PORTS if port is None else (port,):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, number, type=socket.SOCK_STREAM
            )[0]
        except (OSError, OverflowError) as error:
            raise OSError(f"host, port: cannot listen at {host}:{number}: {error}") from error
        with socket.socket(family, kind, protocol) as tried:
            # As servers do: a port whose last user has just ended is free.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(address)
            except (OSError, OverflowError) as error:
                in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                if not in_use:
                    raise OSError(
                        f"host, port: cannot listen at {host}:{number}: {error}"
                    ) from error
                continue
        return number
    if port is None:
        raise OSError(f"port: all from {_PORTS[0]} to {_PORTS[-1]} are in use at {host}")
    raise OSError(f"port: {port} is in use at {host}; name another one, or none to take a free one")
