"""A local server that answers downloads as the Hugging Face Hub does."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", "refs%2Fpr%2F2", COMMIT)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves the files OWNER/REPO/FILE of a folder; yields the URL of the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            repo, _, rest = self.path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            path = folder / repo / name
            for exists, code in (
                (path.parent.is_dir(), "RepoNotFound"),
                (revision in REVISIONS, "RevisionNotFound"),
                (path.is_file(), "EntryNotFound"),
            ):
                if not exists:
                    self.send_response(404)
                    self.send_header("X-Error-Code", code)
                    self.end_headers()
                    return b""
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
