"""Handmade requests that the page refuses: other names, other pages, too large or too many."""

import asyncio
import http.client
import json
import os
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
from tiny_runs import noise, segmenter, write_run

from deformnet.inspection.settings import Page
from pictures import save

pytest.importorskip("gradio", reason="Gradio is not installed")

from starlette.requests import ClientDisconnect

from deformnet.inspection.viewer.guard import UPLOADS, Guard
from deformnet.inspection.viewer.images import LARGEST_FILE
from deformnet.inspection.viewer.serving import serving

OWN = {"host": "localhost:7860"}
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def asked(headers, *, method="GET", path="/", kind="http", host="127.0.0.1", folder="/nowhere"):
    """The status of a request; 200 if it reaches the page."""
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": pairs}
    asyncio.run(Guard(page, host, Path(folder))(scope, receive, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:80", "127.0.0.1:7860", "[::1]:7860", "10.0.0.5"]
)
def test_own_names(name):
    assert asked({"host": name}, host="10.0.0.5") == 200
    assert asked({"host": name, "origin": f"http://{name}"}, host="10.0.0.5") == 200


@pytest.mark.parametrize(
    "name",
    [
        *("evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.nip.io", ""),
        *("0.0.0.0:7860", "10.0.0.6", "localhost@evil.example", "[::1", "localhost."),
    ],
)
def test_other_names(name):
    assert asked({"host": name}, host="10.0.0.5") == 403
    assert asked({}) == 403


def test_all_addresses_of_a_machine_if_the_page_listens_on_them():
    for name in ("192.168.1.7:7860", "[fe80::1]:7860", "0.0.0.0:7860"):
        assert asked({"host": name}, host="0.0.0.0") == 200
    assert asked({"host": "evil.example"}, host="0.0.0.0") == 403


@pytest.mark.parametrize(
    "foreign",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},  # another page of this machine
        {"origin": "http://localhost"},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {**LINK, "sec-fetch-dest": "iframe"},
    ],
)
def test_foreign_pages(foreign):
    upload = {**foreign, "content-length": "10"}
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload")):
        assert asked({**OWN, **upload}, method=method, path=path) == 403
    assert asked({**OWN, **LINK, "content-length": "1"}, method="POST") == 403


def test_own_pages_and_links():
    assert asked(OWN) == asked({**OWN, **LINK}) == 200
    same = {**OWN, "origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}
    assert asked(same) == asked({**OWN, "sec-fetch-site": "none"}) == 200
    assert asked({**same, "content-length": "100"}, method="POST", path="/queue/join") == 200


def test_websockets():
    assert asked(OWN, kind="websocket") != 200


@pytest.mark.parametrize("length", [LARGEST_FILE + 10**6, 10**30, "", "-1", "1e3", None])
def test_large_requests(length):
    size = {} if length is None else {"content-length": str(length)}
    for path in ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/queue/join"):
        assert asked({**OWN, **size}, method="POST", path=path) == 413
    assert asked({**OWN, "content-length": str(LARGEST_FILE)}, method="POST") == 413
    upload = {**OWN, "content-length": str(LARGEST_FILE)}
    assert asked(upload, method="POST", path="/gradio_api/upload") == 200


def uploaded(page, receive, folder="/nowhere"):
    """The statuses that an upload gets from a page."""
    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(b"host", b"localhost"), (b"content-length", b"10")]
    scope = {"type": "http", "method": "POST", "path": "/upload", "headers": pairs}
    guard = Guard(page, "127.0.0.1", Path(folder))
    asyncio.run(guard(scope, receive, send))
    assert guard._uploading == 0
    return [message["status"] for message in sent if "status" in message]


def test_silent_uploads_end(monkeypatch):
    """They would keep others out."""
    monkeypatch.setattr("deformnet.inspection.viewer.guard.SILENCE", 0.05)

    async def page(scope, receive, send):
        await receive()

    async def silent():
        await asyncio.sleep(100)

    assert uploaded(page, silent) == [408]

    async def leaves(scope, receive, send):
        raise ClientDisconnect

    assert uploaded(leaves, silent) == []


def test_slow_uploads_end(monkeypatch):
    """Also those that never pause."""
    monkeypatch.setattr("deformnet.inspection.viewer.guard.DEADLINE", 0.2)

    async def page(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def slow():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    begun = time.monotonic()
    assert uploaded(page, slow) == [408]
    assert time.monotonic() - begun < 10


def test_uploads_in_progress_are_kept(tmp_path):
    """Gradio writes them to files, and moves the complete ones into folders."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    path = uploads / "begun"
    guard = Guard(None, "127.0.0.1", tmp_path)
    events = []

    async def slow(scope, receive, send):
        path.touch()
        os.utime(path, (0, 0))
        events.append("begun")
        while "done" not in events:
            await asyncio.sleep(0.01)
        assert path.exists()

    async def quick(scope, receive, send):
        (uploads / str(len(events))).mkdir()
        events.append("quick")

    async def both():
        scope = {"type": "http", "method": "POST", "path": "/upload", "headers": []}
        scope["headers"] = [(b"host", b"localhost"), (b"content-length", b"10")]
        guard._app = slow
        first = asyncio.create_task(guard(scope, None, None))
        while not events:
            await asyncio.sleep(0.01)
        guard._app = quick
        for _ in range(2 * UPLOADS):
            await guard(scope, None, None)
        events.append("done")
        await first

    asyncio.run(both())
    assert not path.exists()  # it was left behind
    assert len(list(uploads.iterdir())) == UPLOADS


def test_uploads_that_the_page_is_removing(tmp_path, monkeypatch):
    for number in range(2 * UPLOADS):
        (tmp_path / f"uploads/{number}").mkdir(parents=True)
        (tmp_path / f"uploads/{number}/image.png").touch()
    unlink = os.unlink

    def raced(*arguments, **options):
        unlink(*arguments, **options)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "unlink", raced)
    upload = {**OWN, "content-length": "10"}
    assert asked(upload, method="POST", path="/gradio_api/upload", folder=tmp_path) == 200


def test_an_upload_of_many_files(tmp_path):
    async def page(scope, receive, send):
        for number in range(9):
            (tmp_path / f"uploads/{number}").mkdir(parents=True)
            os.utime(tmp_path / f"uploads/{number}", (number, number))

    assert uploaded(page, None, tmp_path) == []
    assert sorted(path.name for path in tmp_path.glob("uploads/*")) == ["5", "6", "7", "8"]


def test_old_uploads_make_room(tmp_path):
    uploads = tmp_path / "uploads"
    for number in range(10):
        (uploads / str(number)).mkdir(parents=True)
        (uploads / f"{number}/image.png").touch()
        os.utime(uploads / str(number), (number, number))
    (uploads / "left").touch()
    upload = {**OWN, "content-length": "10"}
    assert asked(upload, method="POST", path="/gradio_api/upload", folder=tmp_path) == 200
    assert {path.name for path in uploads.iterdir()} == {"9", "8", "7"}


# Served.


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    write_run(root / "run", segmenter())
    photo = save(root / "photo.png", noise(64, 96))
    with serving(root / "run", [photo], Page(device="cpu")) as address:
        yield urlparse(address), photo


def request(page, method, path, body=None, **headers):
    """Status and content of an answer."""
    connection = http.client.HTTPConnection(page.hostname, page.port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    return answer.status, answer.read()


def upload(page, content, name="x.png", field="files", **headers):
    body = (
        f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + content
    headers["Content_Type"] = "multipart/form-data; boundary=b"
    return request(page, "POST", "/gradio_api/upload", body + b"\r\n--b--\r\n", **headers)


def test_rebinding_and_foreign_origins(page):
    address, photo = page
    assert request(address, "GET", "/")[0] == 200
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{address.port}"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        names = {name.replace("-", "_"): value for name, value in headers.items()}
        for path in ("/", "/config", "/gradio_api/info", f"/gradio_api/file={photo}"):
            status, content = request(address, "GET", path, **names)
            assert status == 403, path
            assert content.startswith(b"deformnet: expected ")
        assert upload(address, b"x", **names)[0] == 403


def test_pictures_are_sent(page):
    address, _ = page
    picture = Path(os.environ["GRADIO_TEMP_DIR"]) / "picture/image.png"
    picture.parent.mkdir(parents=True)
    save(picture, noise(8, 9))
    status, content = request(address, "GET", f"/gradio_api/file={picture}")
    assert (status, content) == (200, picture.read_bytes())


def test_files_of_this_machine_stay_here(page):
    address, photo = page
    for path in (photo, "/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd"):
        for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/proxy="):
            assert request(address, "GET", f"{route}{path}")[0] >= 400


def test_many_and_large_uploads(page):
    address, photo = page
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "uploads"
    before = photo.read_bytes()
    for number in range(3 * UPLOADS):
        assert upload(address, before + bytes([number]))[0] == 200
        assert len(list(folder.iterdir())) <= UPLOADS
    for number in range(3 * UPLOADS):  # a field that the page does not have
        upload(address, before + bytes([number]), field="other")
        assert len(list(folder.iterdir())) <= UPLOADS
    status, _ = request(
        *(address, "POST", "/gradio_api/upload", b""), Content_Length=str(LARGEST_FILE + 10**6)
    )
    assert status == 413
    status, content = upload(address, b"x", name="../../../../tmp/escaped.png")
    assert status == 200
    assert Path(json.loads(content)[0]).is_relative_to(folder)


def test_an_upload_is_removed_when_it_is_shown(page):
    address, photo = page
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "uploads"
    (path,) = json.loads(upload(address, photo.read_bytes(), name="shown.png")[1])
    assert Path(path).is_file()
    config = json.loads(request(address, "GET", "/config")[1])
    (button,) = (it["id"] for it in config["components"] if it["type"] == "uploadbutton")
    (event,) = (
        it for it in config["dependencies"] if [button, "upload"] in map(list, it["targets"])
    )
    values = {it["id"]: it["props"].get("value") for it in config["components"]}
    data = [values[number] for number in event["inputs"]]
    data[event["inputs"].index(button)] = {
        "path": path,
        "meta": {"_type": "gradio.FileData"},
    }
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "probe"})
    status, content = request(
        *(address, "POST", "/gradio_api/queue/join", body), Content_Type="application/json"
    )
    assert status == 200, content
    for _ in range(200):
        if not Path(path).exists():
            break
        time.sleep(0.1)
    assert not [it for it in folder.rglob("*") if it.is_file() and it.name == Path(path).name]
