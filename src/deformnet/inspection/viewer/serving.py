"""Serving the page of a run and its images."""

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

from deformnet._errors import UserError, require_extra
from deformnet.inspection.runs import open_runs
from deformnet.inspection.settings import Page
from deformnet.inspection.viewer.images import LARGEST_FILE, DataSetImages, ImageFiles, Images

_PORTS = range(7860, 7960)  # to pick a free one from


@contextmanager
def serving(
    run: Path,
    images: Sequence[Path] = (),
    page: Page = Page(),  # noqa: B008 (frozen)
) -> Iterator[str]:
    """Serve the page in the background.

    Args:
        run: run folder of a network with deformable layers.
        images: image files and folders to choose from; more can be uploaded on the page.
        page: what it shows, and where it is served.
    Yields:
        The address of the page.
    Raises:
        FileNotFoundError, UserError: as `open_runs` and `ImageFiles`; also if both images and data
            are given, or the data do not fit the run.
        OSError: if it cannot listen on host and port.
        MissingExtraError: if Gradio is not installed.
    """
    host, port, data = page.host, page.port, page.data
    if images and data is not None:
        raise UserError("expected either images or data, but got both")
    require_extra("the page", "view", "gradio")
    _free_port(host, port)  # checked before the networks are loaded
    with _temporary_folder() as folder:
        from starlette.middleware import Middleware

        from deformnet.inspection.viewer.guard import Guard
        from deformnet.inspection.viewer.page import CSS, build_page, theme

        opened, compared = open_runs(run, page.baseline, page.device)
        offered: Images | None = ImageFiles(images) if images else None
        if data is not None:
            offered = DataSetImages(opened.task.annotated(data, page.split, opened.data))
        blocks = build_page(run.name, offered, opened, compared)
        try:
            app, address, _ = blocks.launch(
                server_name=host,
                server_port=_free_port(host, port),
                inbrowser=page.open,
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
                app_kwargs={"middleware": [Middleware(Guard, host=host, folder=folder)]},
            )
            app.uploaded_file_dir = str(folder / "uploads")  # separate from pictures
            yield address
        finally:
            blocks.close(verbose=False)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Make Gradio keep uploads and pictures in a folder that is removed with the page."""
    folder = _folder()
    # Gradio reads these when it is imported. It must not send usage data.
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_EXAMPLES_CACHE"] = folder  # pictures, the only files that it serves
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_NUM_WORKERS"] = "0"  # the guard does not cover other processes
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _folder() -> str:
    """Return one folder for the whole program: Gradio keeps using the first that it was given."""
    folder = tempfile.mkdtemp(prefix="deformnet-view-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _free_port(host: str, port: int | None) -> int:
    """Return the port, or the first free one.

    Raises:
        OSError: if it is in use, or the host is not an address of this machine.
    """
    for number in _PORTS if port is None else (port,):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, number, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind, protocol) as candidate:
                # As servers do: a port that was closed just now is free.
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                candidate.bind(address)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            raise OSError(f"cannot listen on {host}:{number}: {error}") from error
        return number
    if port is None:
        raise OSError(f"ports {_PORTS[0]} to {_PORTS[-1]} are all in use on {host}")
    raise OSError(f"port {port} is in use on {host}; choose another one, or none for a free one")
