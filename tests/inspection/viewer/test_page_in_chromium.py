"""The page in a browser, with its dots at the computed samples."""

import io
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import noise, rfcn, segmenter, write_run

from deformnet.inspection.runs import OpenedRun
from deformnet.inspection.settings import Page
from deformnet.inspection.viewer.images import Sample
from deformnet.inspection.viewer.pictures import LEVELS, MOVED_BIN, UNIT
from deformnet.inspection.viewer.recording import record_pass
from deformnet.inspection.viewer.session import Shown
from deformnet.metrics.segmentation import connected_regions
from pictures import save

pytest.importorskip("gradio", reason="Gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.is_file():
    pytest.skip(f"{CHROMIUM} does not exist", allow_module_level=True)

from deformnet.inspection.viewer.serving import serving  # noqa: E402

SIZE = (64, 96)
SLOW = 30_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("view")
    write_run(root / "deeplab", segmenter())
    write_run(root / "baseline", segmenter(deform_layers=0))
    write_run(root / "rfcn", rfcn())
    write_run(root / "average", rfcn(deform_layers=0, pool="average"))
    save(root / "first.png", noise(*SIZE))
    save(root / "second.png", noise(80, 64))
    (root / "notes.png").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        rebound = "--host-resolver-rules=MAP evil.test 127.0.0.1"
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rebound])
        yield opened
        opened.close()


@pytest.fixture
def asked():
    """Addresses that the browser requested."""
    return []


@pytest.fixture
def page(browser, asked):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(SLOW)
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()


def picture(page, name="picture"):
    """Return the picture in the browser, [H, W, 3], and its address."""
    source = page.locator(f"#{name} img").get_attribute("src")
    read = page.request.get(source).body()
    return np.asarray(Image.open(io.BytesIO(read)).convert("RGB")).astype(int), source


def changed(page, source, name="picture"):
    """Wait for another picture in its place."""
    page.wait_for_function(
        "([name, source]) => { const image = document.querySelector(`#${name} img`);"
        "return image && image.src != source && image.complete }",
        arg=[name, source],
    )
    return picture(page, name)


def click(page, pixel, name="picture"):
    """Click a pixel (y, x) of the picture, wherever the browser shows it."""
    image = page.locator(f"#{name} img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    wide = image.evaluate("image => image.naturalWidth")
    scale = box["width"] / wide
    page.mouse.click(box["x"] + (pixel[1] + 0.5) * scale, box["y"] + (pixel[0] + 0.5) * scale)


def clicked(page):
    """Return the clicked point (y, x) of the image, as the page states it."""
    text = page.locator("#panel").inner_text()
    x, y = map(int, re.search(r"Clicked: x (\d+), y (\d+)", text).groups())
    return y, x


def dots(drawn, color):
    """Return the centers (y, x) of the discs of a color."""
    mask = (drawn == color).all(-1)
    regions = connected_regions(mask.astype(np.uint8))
    centers = [np.argwhere(regions == region).mean(0) for region in np.unique(regions[mask])]
    return {tuple(round(float(place)) for place in center) for center in centers}


def pixels(frame, samples):
    """Return the pixels (y, x) of the picture that samples of one layer are drawn at."""
    ((points, inside),) = samples.levels
    return {tuple(pixel) for pixel in frame.to_picture(points[inside]).tolist()}


def test_load_upload_and_click(folder, page, asked):
    opened = OpenedRun(folder / "deeplab", "cpu")
    given = [folder / "first.png", folder / "second.png"]
    run, baseline = folder / "deeplab", folder / "baseline"
    with serving(run, given, Page(baseline=baseline, device="cpu")) as address:
        assert urlparse(address).hostname == "127.0.0.1"
        page.goto(address)
        page.wait_for_selector("#picture img")
        bare, source = picture(page)
        frame = Shown("first", Sample(noise(*SIZE))).frame
        assert bare.shape[:2] == frame.picture
        assert not dots(bare, LEVELS[0].color)
        assert page.locator("#prediction img").count() == 1
        assert (
            page.locator("#ground-truth").count() == 0
            or not page.locator("#ground-truth").is_visible()
        )

        # One layer down all nine dots show: nothing is drawn on them but the cross, perhaps.
        page.locator("#depth input[type=number]").fill("1")
        page.locator("#depth input[type=number]").press("Enter")
        middle = (frame.margin + frame.inner[0] // 2, frame.margin + frame.inner[1] // 3)
        click(page, middle)
        drawn, source = changed(page, source)
        legend = page.locator("#legend").inner_text()
        assert "1 layer down" in legend
        assert "2 layers" not in legend
        point = frame.to_image(middle)
        assert np.abs(np.subtract(clicked(page), point)).max() <= 1
        samples = record_pass(opened, noise(*SIZE)).samples(point, 1)
        expected = pixels(frame, samples)
        assert len(expected) > 4
        assert dots(drawn, LEVELS[0].color) == expected
        center = frame.to_picture(torch.tensor(samples.center))
        assert tuple(drawn[tuple(center)]) == UNIT

        page.get_by_label("baseline").check()
        drawn, source = changed(page, source)
        grid = record_pass(OpenedRun(baseline, "cpu"), noise(*SIZE)).samples(point, 1)
        # The cross covers the middle one but for four corners.
        middle = tuple(frame.to_picture(torch.tensor(grid.center)).tolist())
        found = dots(drawn, LEVELS[0].color)
        around = {it for it in found if np.abs(np.subtract(it, middle)).max() > 6}
        assert around == pixels(frame, grid) - {middle}
        page.get_by_label("deformable").check()
        drawn, source = changed(page, source)
        assert dots(drawn, LEVELS[0].color) == expected

        # The prediction has no margin; the same place in it selects the same point.
        click(page, (5, 5))
        _, source = changed(page, source)
        assert clicked(page) == (0, 0)
        wide = page.locator("#prediction img").evaluate("image => image.naturalWidth")
        flat = tuple((place + 0.5) * wide / SIZE[1] for place in point)
        click(page, flat, "prediction")
        drawn, source = changed(page, source)
        assert np.abs(np.subtract(clicked(page), point)).max() <= 1
        assert dots(drawn, LEVELS[0].color) == expected

        # A file that is not an image leaves the page as it is.
        page.locator("input[type=file]").set_input_files(folder / "notes.png")
        page.wait_for_selector("#message .error")
        message = page.locator("#message .error").inner_text()
        assert message.startswith("notes.png: not a readable image")
        assert dots(picture(page)[0], LEVELS[0].color) == expected

        other = noise(48, 80)
        save(folder / "third.png", other)
        _, source = picture(page)
        page.locator("input[type=file]").set_input_files(folder / "third.png")
        _, source = changed(page, source)
        assert page.locator("#message .error").count() == 0
        assert page.locator("#choice input").input_value() == ""
        frame = Shown("third", Sample(other)).frame
        click(page, (300, 400))
        drawn, _ = changed(page, source)
        samples = record_pass(opened, other).samples(frame.to_image((300, 400)), 1)
        assert dots(drawn, LEVELS[0].color) == pixels(frame, samples)
        temporary = Path(os.environ["GRADIO_TEMP_DIR"])
        assert temporary.is_dir()
        assert not {"third.png", "notes.png"} & {path.name for path in temporary.rglob("*")}
    assert not temporary.exists()
    hosts = {urlparse(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


def test_click_on_a_detection(folder, page):
    opened = OpenedRun(folder / "rfcn", "cpu")
    image = noise(*SIZE)
    done = record_pass(opened, image)
    frame = Shown("first", Sample(image)).frame
    run, baseline = folder / "rfcn", folder / "average"
    with serving(run, [folder / "first.png"], Page(baseline=baseline, device="cpu")) as address:
        page.goto(address)
        page.wait_for_selector("#picture img")
        page.locator("#score input[type=number]").fill("0.05")
        page.locator("#score input[type=number]").press("Enter")
        page.get_by_label("bins of a box").check()
        page.wait_for_function("document.querySelector('#panel').innerText.includes('or a box')")
        _, source = picture(page)
        y, x = 32, 48
        click(page, frame.to_picture(torch.tensor([y, x])).tolist())
        page.wait_for_function("document.querySelector('#panel').innerText.includes('3 x 3 bins')")
        drawn, _ = changed(page, source)
        assert "moved by their offsets" in page.locator("#legend").inner_text()
        chosen = done.detection_at((y, x), 0.05)
        for x1, y1, x2, y2 in frame.edges(done.bins.moved[chosen]).reshape(-1, 4).tolist():
            sides = drawn[y1, x1 : x2 + 1], drawn[y2, x1 : x2 + 1]
            for side in sides:
                assert (side == MOVED_BIN).all(-1).mean() > 0.95
        # The baseline has no moved bins: none are drawn, and the legend omits them.
        page.get_by_label("baseline").check()
        page.wait_for_function("document.querySelector('#legend').innerText.trim() == 'detection'")
        assert "3 x 3 bins" not in page.locator("#panel").inner_text()


@pytest.fixture
def foreign():
    """The address of another page of this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p>foreign</p>")

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ATTACK = """async target => {
  const form = new FormData();
  form.append("files", new File(["pixels"], "foreign.png"));
  const upload = {method: "POST", body: form, mode: "no-cors"};
  await fetch(target + "gradio_api/upload", upload).catch(() => null);
  const event = {method: "POST", body: '{"data": []}', mode: "no-cors"};
  await fetch(target + "gradio_api/queue/join", event).catch(() => null);
  const read = await fetch(target + "config").then(it => it.text()).catch(() => "refused");
  const image = new Image();
  const seen = new Promise(done => { image.onload = () => done("seen");
                                     image.onerror = () => done("refused"); });
  image.src = target + "static/img/logo.svg";
  return [read, await seen];
}"""


def test_foreign_pages_and_names(folder, page, foreign):
    with serving(folder / "deeplab", [folder / "first.png"], Page(device="cpu")) as address:
        answers = []
        page.on("response", lambda it: answers.append((it.url, it.status)))
        rebound = page.goto(address.replace("127.0.0.1", "evil.test"))
        assert rebound.status == 403
        page.goto(foreign)
        read, seen = page.evaluate(ATTACK, address)
        assert read.startswith("deformnet: expected a request from this page")
        assert seen == "refused"
        there = [status for url, status in answers if url.startswith(address)]
        assert len(there) >= 3
        assert set(there) == {403}
        temporary = Path(os.environ["GRADIO_TEMP_DIR"])
        assert not [it for it in temporary.rglob("*") if it.name == "foreign.png"]
        page.set_content(f"<form method=post action={address}gradio_api/upload><button>go</form>")
        with page.expect_navigation() as moved:
            page.get_by_text("go").click()
        assert moved.value.status == 403
        page.goto(foreign)
        page.set_content(f"<a href={address}>link</a>")  # as in a chat message or a notes page
        page.get_by_text("link").click()
        page.wait_for_selector("#picture img")
