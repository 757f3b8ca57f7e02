"""Sessions of the viewer, without the page."""

import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import classifier, faster_rcnn, noise, rfcn, segmenter, write_run

from deformnet import UserError
from deformnet.analysis import bin_locations, effective_dilation, sampling_locations
from deformnet.data import open_segmentation
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.inspection.runs import OpenedRun, open_runs
from deformnet.inspection.viewer import images, recording
from deformnet.inspection.viewer.images import DataSetImages, ImageFiles, open_image
from deformnet.inspection.viewer.pictures import LEVELS, UNIT, Frame
from deformnet.inspection.viewer.recording import record_pass
from deformnet.inspection.viewer.session import Controls, Session
from deformnet.recipes import RPNRecipe
from pictures import save, turned

SAMPLES = Controls(baseline=False, depth=3, bins=False, least_score=0.05)
BINS = SAMPLES._replace(bins=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "deeplab", segmenter())
    write_run(root / "baseline", segmenter(deform_layers=0))
    write_run(root / "rfcn", rfcn())
    write_run(root / "classifier", classifier())
    return root


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photo.png", noise(70, 100))


def session_of(run, photo, baseline=None):
    session = Session(ImageFiles([photo]), *open_runs(run, baseline, "cpu"))
    session.choose(0)
    return session


@pytest.mark.parametrize("size", [(600, 800), (37, 1000), (1000, 37), (3, 2)])
def test_pixels_of_picture_and_image(size):
    frame = Frame.around(size)
    assert max(frame.inner) == 840
    for pixel in [(0, 0), (100, 100), (frame.picture[0] - 1, frame.picture[1] - 1), (123, 217)]:
        point = frame.to_image(pixel)
        assert tuple(frame.to_picture(torch.tensor(point, dtype=torch.float64)).tolist()) == pixel
    corners = torch.tensor([[-0.5, -0.5], [size[0] - 0.501, size[1] - 0.501]])
    first, last = frame.to_picture(corners).tolist()
    assert first == [frame.margin, frame.margin]
    assert last == [frame.margin + side - 1 for side in frame.inner]
    box = frame.edges(torch.tensor([0.0, 0, size[1], size[0]])).tolist()
    assert box == [100, 100, 100 + frame.inner[1], 100 + frame.inner[0]]


@pytest.mark.parametrize("name", ["deeplab", "rfcn", "classifier"])
def test_samples_and_dilation_agree_with_analysis(runs, name):
    run = OpenedRun(runs / name, "cpu")
    image = noise(70, 100)
    done = record_pass(run, image)
    prepared = run.predictor.prepare(image)
    model = run.model
    call = model.features if name == "rfcn" else model
    chain = [f"backbone.{layer}" for layer in model.backbone.filter_chain()]
    dilation = effective_dilation(model, prepared.input, call=call)
    stride = model.backbone.stride
    scales, corner = torch.tensor(prepared.scale).double(), torch.tensor(prepared.corner)
    for point in [(0, 20), (35.2, 50), (69, 79)]:
        y, x = ((torch.tensor(point) + 0.5) * scales - 0.5 - corner).tolist()
        height, width = next(reversed(dilation.values())).shape[2:]
        unit = (min(round(y / stride), height - 1), min(max(round(x / stride), 0), width - 1))
        samples = done.samples(point, 3)
        for depth, level in enumerate(samples.levels, start=1):
            expected = sampling_locations(model, prepared.input, chain[:depth], unit, call=call)
            there = (expected.points[0] + corner + 0.5) / scales - 0.5
            torch.testing.assert_close(level.points, there)
            assert torch.equal(level.inside, expected.inside[0])
        center = (torch.tensor(unit) * stride + corner + 0.5) / scales - 0.5
        assert samples.center == pytest.approx(tuple(center.tolist()))
        rows = {row.layer: row for row in done.filters(point)}
        assert list(rows) == list(reversed(dilation))
        for layer, values in dilation.items():
            assert rows[layer].dilation == pytest.approx(float(values[0, 0, unit[0], unit[1]]))
            assert rows[layer].image == pytest.approx(float(values.mean()))


def test_predictions_are_those_of_the_predictor(runs):
    image = noise(70, 100)
    run = OpenedRun(runs / "deeplab", "cpu")
    assert torch.equal(record_pass(run, image).prediction.labels, run.predictor.predict(image))
    run = OpenedRun(runs / "classifier", "cpu")
    ranking = dict(record_pass(run, image).prediction.ranking(3))
    probabilities = [ranking[name] for name in run.classes]
    torch.testing.assert_close(torch.tensor(probabilities), run.predictor.predict(image))
    run = OpenedRun(runs / "rfcn", "cpu")
    found, expected = record_pass(run, image).prediction, run.predictor.predict(image)
    count = len(found.scores)
    assert 0 < count <= 100
    torch.testing.assert_close(found.boxes, expected.boxes[:count])
    torch.testing.assert_close(found.scores, expected.scores[:count])
    assert list(found.names) == [run.classes[k] for k in expected.labels[:count].tolist()]


def test_bins_agree_with_analysis(runs):
    run, image = OpenedRun(runs / "rfcn", "cpu"), noise(70, 100)
    done = record_pass(run, image)
    prepared = run.predictor.prepare(image)
    scale = torch.tensor([prepared.scale[1], prepared.scale[0]] * 2)
    arguments = (prepared.input, [prepared.size], [done.prediction.boxes * scale])
    expected = bin_locations(run.model, "score_pool", *arguments)
    regular, moved = done.bins
    torch.testing.assert_close(regular, expected.regular / scale)
    for k, name in enumerate(done.prediction.names):
        own = expected.deformed[k, run.classes.index(name) + 1]
        torch.testing.assert_close(moved[k], own / scale)
    assert (moved - regular).abs().max() > 1


def test_picture_has_a_dot_at_every_sample(runs, photo):
    session = session_of(runs / "deeplab", photo)
    bare = np.asarray(session.picture(SAMPLES))
    frame = session.shown.frame
    session.click((400, 500), margin=True)
    assert session.point == pytest.approx(frame.to_image((400, 500)))
    for depth in (1, 2, 3):
        drawn = np.asarray(session.picture(SAMPLES._replace(depth=depth))).astype(int)
        samples = session.samples(SAMPLES._replace(depth=depth))
        colors = [level.color for level in LEVELS[:depth]]
        marks = [(0, 0, 0), UNIT]  # edges of other dots, and the cross
        for level, (points, inside) in enumerate(samples.levels):
            found = [
                tuple(drawn[y, x])
                for y, x in frame.to_picture(points[inside]).tolist()
                if 0 <= y < frame.picture[0] and 0 <= x < frame.picture[1]
            ]
            # Dots of upper levels may cover it, those of lower ones not.
            assert set(found) <= {*colors[: level + 1], *marks}
            assert found.count(colors[level]) > 0.6 * len(found) > 3
    changed = (np.asarray(session.picture(SAMPLES._replace(depth=1))) != bare).any(-1)
    assert 0 < changed.sum() < 9 * 13**2 + 2 * 5 * 25


def test_samples_outside_the_map_are_faint(runs, photo):
    session = session_of(runs / "deeplab", photo)
    frame = session.shown.frame
    session.click((0, 0), margin=True)
    assert session.point == (0, 0)
    samples = session.samples(SAMPLES)
    bare, drawn = (np.asarray(it) for it in (session.shown.backdrop, session.picture(SAMPLES)))
    points, inside = samples.levels[1]
    seen = 0
    lit = {tuple(pixel) for level in samples.levels for pixel in near(frame, level)}
    for y, x in frame.to_picture(points[~inside]).tolist():
        if 0 <= y < len(drawn) and 0 <= x < drawn.shape[1] and (y, x) not in lit:
            seen += 1
            apart = np.abs(drawn[y, x].astype(int) - bare[y, x])
            assert 0 < apart.max() < 80
    assert seen > 3


def near(frame, level):
    """Yield the pixels that dots inside the map may cover."""
    for y, x in frame.to_picture(level.points[level.inside]).tolist():
        yield from ((y + i, x + j) for i in range(-7, 8) for j in range(-7, 8))


def test_baseline_samples_a_grid(runs, photo):
    session = session_of(runs / "deeplab", photo, runs / "baseline")
    session.click((400, 500), margin=True)
    regular = session.samples(SAMPLES._replace(baseline=True))
    steps = torch.unique(regular.levels[2].points[:, 0]).diff()
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)))
    moved = session.samples(SAMPLES)
    assert moved.center == regular.center
    assert (moved.levels[0].points - regular.levels[0].points).abs().max() > 1
    assert session.filters(SAMPLES._replace(baseline=True)) == []


def test_clicks_on_detections(runs, photo):
    session = session_of(runs / "rfcn", photo)
    found = session.forward(BINS).prediction
    area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
    smallest = int(area.argmin())
    x1, y1, x2, y2 = found.boxes[smallest].tolist()
    middle = torch.tensor([(y1 + y2) / 2 - 0.5, (x1 + x2) / 2 - 0.5])
    pixel = tuple(session.shown.frame.to_picture(middle).tolist())
    bare = np.asarray(session.picture(BINS))
    session.click(pixel, margin=True)
    assert session.detection(BINS) == smallest
    assert (np.asarray(session.picture(BINS)) != bare).any()
    assert session.detection(BINS._replace(least_score=1.1)) is None
    # The same point in the picture of the prediction, which has no margin.
    flat = session.prediction(BINS)
    width = session.shown.flat_width
    assert flat.width == width
    pixel = tuple(round(float(place + 0.5) * width / 100 - 0.5) for place in middle)
    session.click(pixel, margin=False)
    assert session.point == pytest.approx(tuple(middle.tolist()), abs=0.2)


def test_faster_rcnn_with_zero_offsets(tmp_path, photo):
    write_run(tmp_path / "run", faster_rcnn())
    session = session_of(tmp_path / "run", photo)
    session.click((400, 500), margin=True)
    assert session.filters(SAMPLES) == []
    regular, moved = session.forward(BINS).bins
    assert len(regular) == len(session.forward(BINS).prediction.boxes)
    torch.testing.assert_close(regular, moved)


def test_ground_truth_of_a_data_set(tmp_path, refused):
    write_shapes(tmp_path / "data", Shapes(train=2, val=2, height=64, width=64))
    write_run(tmp_path / "other", segmenter())
    line = refused(tmp_path / "other", "--data", tmp_path / "data")
    assert "expected the classes that the network was trained on (background, one, two)" in line
    write_run(tmp_path / "run", segmenter(), open_segmentation(tmp_path / "data", "val").classes)
    run = OpenedRun(tmp_path / "run", "cpu")
    listed = DataSetImages(run.task.annotated(tmp_path / "data", "val", run.data))
    session = Session(listed, run, None)
    session.choose(1)
    assert session.shown.name == listed.names[1]
    assert session.ground_truth().size[0] == session.prediction(SAMPLES).size[0] == 840
    colors = np.asarray(session.ground_truth()).reshape(-1, 3)
    assert len(np.unique(colors, axis=0)) > 20


def test_classes_of_a_classifier(runs, photo):
    session = session_of(runs / "classifier", photo)
    best = session.best_classes(SAMPLES)
    assert len(best) == 3
    assert sum(probability for _, probability in best) == pytest.approx(1)
    assert session.prediction(SAMPLES) is None
    x1, y1, x2, y2 = session.forward(SAMPLES).frame
    assert (y1, y2) == pytest.approx((0, 70), abs=0.6)
    assert (x1 + x2) / 2 == pytest.approx(50, abs=0.6)


def damaged(tmp_path):
    """Return damaged files with the messages about them."""
    whole = save(tmp_path / "whole.png", noise(50, 60)).read_bytes()
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    huge = (tmp_path / "huge.png").read_bytes()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    return [
        ("text.png", b"not an image", "not a readable image"),
        ("empty.jpg", b"", "not a readable image"),
        ("cut.png", whole[: len(whole) // 2], "not a readable image"),
        ("head.png", whole[:20], "not a readable image"),
        ("huge.png", huge, "at most 30 million pixels, but got 8000x8000"),
        ("script.eps", script, "not a readable image"),
    ]


def test_damaged_uploads_are_rejected(tmp_path, runs, photo, monkeypatch):
    session = session_of(runs / "deeplab", photo)
    before = session.shown
    for name, content, message in damaged(tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as refused:
            session.upload(tmp_path / name)
        assert str(refused.value).startswith(f"{name}: ")
        assert "\n" not in str(refused.value)
        assert session.shown is before
    monkeypatch.setattr(images, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match=r"photo.png: expected a file of at most 0 MB"):
        open_image(photo)


def test_images_beyond_the_memory_are_named(tmp_path, runs, photo, monkeypatch):
    session = session_of(runs / "classifier", photo)
    before = session.shown
    strip = save(tmp_path / "strip.png", noise(1, 30000))
    with pytest.raises(UserError, match=r"^strip.png: expected an image of at most 100 million"):
        session.upload(strip)

    def forward(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(recording, "record_pass", forward)
    with pytest.raises(UserError, match=r"^photo.png: too large for the memory"):
        session.upload(photo)
    assert session.shown is before


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_other_modes(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (40, 30)).save(path)
    assert open_image(path).shape == (3, 30, 40)


def test_images_are_upright(tmp_path):
    photo = save(tmp_path / "photo.jpg", noise(30, 40), exif=turned())
    assert open_image(photo).shape == (3, 40, 30)


@pytest.fixture
def refused(complaint):
    return lambda *arguments: complaint("inspect", "view", *arguments, "--device", "cpu")


def test_rejected_runs_and_files(runs, tmp_path, refused):
    write_run(tmp_path / "others", segmenter(deform_layers=0), ("background", "cat", "dog"))
    write_run(tmp_path / "rpn", RPNRecipe(backbone="resnet18", anchor_sizes=(16,)))
    (tmp_path / "notes.txt").write_text("these are not pixels")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would block
    run = runs / "deeplab"
    for message, *arguments in (
        ("expected a network with deformable layers, but got none", runs / "baseline"),
        ("expected a network that runs conv5", tmp_path / "rpn"),
        ("expected a baseline of deeplab", run, "--baseline", runs / "rfcn"),
        ("but got background, cat, dog", run, "--baseline", tmp_path / "others"),
        ("expected a baseline without deformable layers, but got 2", run, "--baseline", run),
        ("no such run folder", tmp_path / "missing"),
        ("missing.png: no such file", run, tmp_path / "missing.png"),
        ("notes.txt: not a readable image", run, tmp_path / "notes.txt"),
        ("pipe.png: no such file", run, tmp_path / "pipe.png"),
    ):
        assert message in refused(*arguments)


def test_port_in_use(runs, refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(runs / "deeplab", "--port", port)
    message = f"port {port} is in use on 127.0.0.1; choose another one, or none for a free one"
    assert line == message
    assert "cannot listen on" in refused(runs / "deeplab", "--host", "192.0.2.1")
