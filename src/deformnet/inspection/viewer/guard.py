"""Refuses requests that do not come from the page itself, and too many or too large ones.

Any web page that is open in the same browser can send requests to this machine. They are recognized
by headers that the browser sets and a page cannot change: Host contains a foreign name that points
to this machine (DNS rebinding); Origin and Sec-Fetch-Site tell which page sent the request.
"""

import asyncio
import ipaddress
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deformnet.inspection.viewer.images import LARGEST_FILE

UPLOADS = 4
"""Maximum number of simultaneous uploads, and of uploaded files that have not been shown."""

SILENCE = 60.0
"""Seconds without data after which an upload ends, so that others can begin."""

DEADLINE = 600.0
"""Seconds after which an upload ends even if data arrives."""

_UNFINISHED = 4 * UPLOADS  # files kept of uploads in progress; others may have been abandoned
_FORM = 2**16  # bytes of an upload besides its file
_LARGEST_EVENT = 2**20  # bytes
_ANY = ("0.0.0.0", "::")  # hosts that mean all addresses


class Guard:
    """Middleware that refuses foreign and oversized requests.

    Args:
        app: the page.
        host: address that it listens on.
        folder: a temporary folder, in whose `uploads` only the last `UPLOADS` files are kept, and
            those in progress.
    """

    def __init__(self, app: ASGIApp, host: str, folder: Path) -> None:
        self._app, self._uploads = app, folder / "uploads"
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._has_any_address = host in _ANY
        if self._has_any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        if scope["type"] == "websocket":  # the page has none
            status, text = 403, "WebSockets are not supported"
        elif (text := self._foreign(scope["method"], headers)) is not None:
            status = 403
        elif (text := _oversized(scope["method"], headers, is_upload)) is not None:
            status = 413
        elif is_upload and self._uploading >= UPLOADS:
            status, text = 503, f"{UPLOADS} uploads are in progress; try again later"
        elif is_upload:
            if await self._uploaded(scope, receive, send):
                return
            status = 408
            text = f"expected data every {SILENCE:g} s, and all of it within {DEADLINE:g} s"
        else:
            await self._app(scope, receive, send)
            return
        response = PlainTextResponse(f"deformnet: {text}\n", status)
        await response(scope, receive, send)

    async def _uploaded(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Passes an upload on; returns whether it arrived, or nobody waits for an answer."""

        is_complete = False
        end = time.monotonic() + DEADLINE

        async def receive_in_time() -> Message:
            nonlocal is_complete
            limit = None if is_complete else min(SILENCE, end - time.monotonic())
            message = await asyncio.wait_for(receive(), limit)
            is_complete = not message.get("more_body", False)
            return message

        self._remove_old_uploads(UPLOADS - 1)
        self._uploading += 1
        try:
            await self._app(scope, receive_in_time, send)
        except TimeoutError:
            return False
        except ClientDisconnect:
            pass
        finally:
            self._uploading -= 1
            self._remove_old_uploads(UPLOADS)  # one upload can have many files
        return True

    def _foreign(self, method: str, headers: Headers) -> str | None:
        """Why a request is refused: it comes from another page or has another host name."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return f"expected this page's host, such as localhost, but got {hosts}; see --host"
        for origin in headers.getlist("origin"):
            if origin.lower() not in {f"{scheme}://{hosts[0].lower()}" for scheme in _SCHEMES}:
                return f"expected a request from this page, but got one from {origin}"
        sender = headers.get("sec-fetch-site", "none")
        follows_link = (
            method == "GET"
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        if sender not in ("same-origin", "none") and not follows_link:
            return f"expected a request from this page, but got a {sender} one"
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or (self._has_any_address and _is_address(name))

    def _remove_old_uploads(self, kept: int) -> None:
        def age(path: Path) -> float:
            return path.stat().st_mtime if path.exists() else 0.0

        paths = sorted(self._uploads.glob("*"), key=age)
        for path in [path for path in paths if path.is_dir()][:-kept]:
            shutil.rmtree(path, ignore_errors=True)  # the page may be removing the file in it
        # Gradio moves a complete file into a folder. One in progress was written to recently.
        unfinished = [path for path in paths if not path.is_dir()]
        for path in unfinished[:-_UNFINISHED] if self._uploading else unfinished:
            path.unlink(missing_ok=True)


_SCHEMES = ("http", "https")


def _is_address(name: str) -> bool:
    """Whether a name is an IP address, which no DNS server can redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _oversized(method: str, headers: Headers, is_upload: bool) -> str | None:
    """Why a request is refused for its size."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return None
    most = LARGEST_FILE + _FORM if is_upload else _LARGEST_EVENT
    length = headers.get("content-length", "unknown")
    if not length.isdecimal() or int(length) > most:
        return f"expected a Content-Length of at most {most} bytes, but got {length}"
    return None
