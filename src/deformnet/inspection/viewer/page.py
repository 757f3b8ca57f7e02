"""The page in Gradio: its components and the handlers of their events."""

import html
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes
from gradio.components import Component

from deformnet.inspection.pages import render
from deformnet.inspection.runs import OpenedRun
from deformnet.inspection.viewer.images import Images
from deformnet.inspection.viewer.pictures import BOX, LEVELS, MOVED_BIN, UNIT
from deformnet.inspection.viewer.recording import UnitSamples, depth_limit
from deformnet.inspection.viewer.session import Controls, Session

_SESSIONS = 8  # browser tabs that are remembered; the oldest is forgotten first
_WAITING = 64  # maximum number of queued events
_CLEAN_EVERY, _CLEAN_AFTER = 30, 60  # seconds that pictures stay in the temporary folder
_SAMPLES, _BINS = "samples", "bins of a box"
_DEFORMABLE, _BASELINE = "deformable", "baseline"
_TEMPLATES = Path(__file__).parent / "templates"

CSS = (_TEMPLATES / "page.css").read_text()

_Values = Mapping[Component, Any]  # what Gradio passes for a set of components


def build_page(
    title: str, images: Images | None, run: OpenedRun, baseline: OpenedRun | None
) -> gr.Blocks:
    """Build the page for a run, its baseline, and images to choose from."""
    return _Page(title, images, run, baseline).blocks


def theme() -> themes.Base:
    """Return a theme with system fonts, which fetches nothing from the internet."""
    return themes.Base(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        text_size="md",
    )


class _Page:
    """The components, and the handlers of their events."""

    def __init__(
        self, title: str, images: Images | None, run: OpenedRun, baseline: OpenedRun | None
    ) -> None:
        self._images, self._run, self._baseline = images, run, baseline
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        with gr.Blocks(
            title=f"deformnet view {title}",
            analytics_enabled=False,
            delete_cache=(_CLEAN_EVERY, _CLEAN_AFTER),
            fill_width=True,
        ) as self.blocks:
            gr.Markdown(f"## Sampling locations &nbsp; <small>{html.escape(title)}</small>")
            with gr.Row(equal_height=True):
                self._place_controls()
            self.message = gr.HTML(elem_id="message")
            with gr.Row():
                self._place_pictures()
            self._connect()
        self.blocks.queue(max_size=_WAITING)

    def _place_controls(self) -> None:
        names = [] if self._images is None else list(self._images.names)
        self.choice = gr.Dropdown(
            [(name, index) for index, name in enumerate(names)],
            value=0 if names else None,
            label="Image",
            visible=bool(names),
            elem_id="choice",
            scale=3,
        )
        self.upload = gr.UploadButton("Open an image", elem_id="upload", scale=1, min_width=190)
        self.which = gr.Radio(
            [_DEFORMABLE, _BASELINE],
            value=_DEFORMABLE,
            label="Network",
            visible=self._baseline is not None,
            elem_id="which",
            scale=2,
        )
        depths = max(depth_limit(run) for run in (self._run, self._baseline) if run is not None)
        self.depth = gr.Slider(
            *(1, depths),
            value=min(3, depths),
            step=1,
            label="Layers down",
            elem_id="depth",
            scale=2,
        )
        self.shows = gr.Radio(
            [_SAMPLES, _BINS],
            value=_SAMPLES,
            label="A click shows",
            visible=self._run.predictor.pooling is not None,
            elem_id="shows",
            scale=3,
        )
        self.score = gr.Slider(
            *(0.05, 0.95),
            value=0.5,
            step=0.05,
            label="Minimum score",
            visible=self._run.predictor.has_boxes,
            elem_id="score",
            scale=2,
        )

    def _place_pictures(self) -> None:
        with gr.Column(scale=3, min_width=480):
            self.picture = _image("Click a point", "picture")
            self.legend = gr.HTML(elem_id="legend")
            self.panel = gr.HTML(elem_id="panel")
        with gr.Column(scale=2, min_width=320):
            self.prediction = _image(
                "Prediction", "prediction", visible=self._run.predictor.has_picture
            )
            self.ground_truth = _image("Ground truth", "ground-truth", visible=False)

    def _connect(self) -> None:
        """Attach the handlers to the events."""
        controls: set[Component] = {self.which, self.depth, self.shows, self.score}
        clicked = [self.message, self.picture, self.legend, self.panel]
        everything = [*clicked, self.prediction, self.ground_truth]

        def on(
            event: Callable[..., object],
            handler: Callable[..., list[object]],
            outputs: list[Component],
            source: Component | None = None,
        ) -> None:
            event(
                handler,
                controls if source is None else {source, *controls},
                outputs,
                show_progress="minimal",
                api_visibility="private",
                trigger_mode="always_last",  # of a moving slider, only the last value counts
                # In turn: each event builds on the state that the one before has left.
                concurrency_limit=1,
                concurrency_id="session",
            )

        on(self.blocks.load, self._choose, everything, self.choice)
        on(self.choice.input, self._choose, everything, self.choice)
        on(self.upload.upload, self._upload, [*everything, self.choice], self.upload)
        for picture in (self.picture, self.prediction, self.ground_truth):
            on(picture.select, self._click, clicked)
        for control in (self.which, self.score):
            on(control.input, self._redraw, everything)
        for control in (self.depth, self.shows):
            on(control.input, self._redraw_picture, clicked)
        self.blocks.unload(self._forget)

    def _session(self, request: gr.Request) -> Session:
        """Return the session of the browser tab."""
        key = request.session_hash or ""
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = Session(self._images, self._run, self._baseline)
            self._sessions.move_to_end(key)
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
            return self._sessions[key]

    def _forget(self, request: gr.Request) -> None:
        """Drop the session of a closed tab."""
        with self._lock:
            self._sessions.pop(request.session_hash or "", None)

    def _controls(self, values: _Values) -> Controls:
        return Controls(
            baseline=values[self.which] == _BASELINE,
            depth=int(values[self.depth]),
            bins=values[self.shows] == _BINS,
            least_score=values[self.score],
        )

    def _choose(self, values: _Values, request: gr.Request) -> list[object]:
        session, problem = self._session(request), None
        if values[self.choice] is not None:
            problem = _problem(lambda: session.choose(values[self.choice]))
        return self._everything(session, self._controls(values), problem)

    def _upload(self, values: _Values, request: gr.Request) -> list[object]:
        session, problem = self._session(request), None
        if values[self.upload] is not None:
            file = Path(values[self.upload])
            problem = _problem(lambda: session.upload(file))
            file.unlink(missing_ok=True)
        shown = values[self.upload] is not None and problem is None
        # After an upload, none of the offered images is shown.
        choice = None if shown else gr.skip()
        return [*self._everything(session, self._controls(values), problem), choice]

    def _click(self, values: _Values, request: gr.Request, event: gr.SelectData) -> list[object]:
        session = self._session(request)
        if session.shown is not None:
            x, y = event.index
            # By name: a component that was changed in a tab is another object there.
            margin = event.target is not None and event.target.elem_id == self.picture.elem_id
            session.click((int(y), int(x)), margin=margin)
        return self._clicked(session, self._controls(values))

    def _redraw(self, values: _Values, request: gr.Request) -> list[object]:
        return self._everything(self._session(request), self._controls(values))

    def _redraw_picture(self, values: _Values, request: gr.Request) -> list[object]:
        return self._clicked(self._session(request), self._controls(values))

    def _everything(
        self, session: Session, controls: Controls, problem: str | None = None
    ) -> list[object]:
        """Return all outputs."""
        ground_truth = session.ground_truth()
        return [
            *self._clicked(session, controls, problem),
            session.prediction(controls),
            gr.update(value=ground_truth, visible=ground_truth is not None),
        ]

    def _clicked(
        self, session: Session, controls: Controls, problem: str | None = None
    ) -> list[object]:
        """Return the outputs that a click changes."""
        message = "" if problem is None else f'<p class="error">{html.escape(problem)}</p>'
        shown = session.shown
        label = "Choose an image" if shown is None else f"{shown.name}: click a point"
        picture = gr.update(value=session.picture(controls), label=label)
        return [message, picture, _legend(session, controls), panel(session, controls)]


def _image(label: str, elem_id: str, *, visible: bool = True) -> gr.Image:
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["fullscreen"],
        visible=visible,
        elem_id=elem_id,
    )


def panel(session: Session, controls: Controls) -> str:
    """Return what is known about the selected point, as HTML."""
    samples = session.samples(controls)
    filters = session.filters(controls)
    lines: list[str] = []
    if session.shown is None:
        lines.append("Choose an image.")
    elif samples is None:
        lines.append(f"Click a point of the image{' or a box' if controls.bins else ''}.")
    else:
        lines += _about_bins(session, controls) if controls.bins else _about(session, samples)
        if not filters:
            lines.append("This network has no deformable convolutions: its filters are regular.")
    values = {
        "ranking": [(name, f"{p:.1%}") for name, p in session.best_classes(controls)],
        "true_class": session.true_class(),
        "lines": lines,
        "filters": [
            (
                row.layer.removeprefix("backbone."),
                *(f"{row.dilation:.2f}", f"{row.image:.2f}"),
                *(str(row.layer_dilation), f"{row.shift:.2f}"),
            )
            for row in filters
        ],
    }
    return render(_TEMPLATES / "panel.html", values)


def _about(session: Session, samples: UnitSamples) -> Sequence[str]:
    """Describe the sampling locations of the selected point."""
    assert session.point is not None
    y, x = (round(place) for place in session.point)
    points, inside = samples.levels[-1]
    counts = [f"{len(points)} sampling locations, {len(samples.levels)} layers down"]
    if off := int((~inside).sum()):
        counts.append(f"{off} outside the map (faint)")
    if beyond := session.beyond(samples):
        counts.append(f"{beyond} beyond the picture")
    cy, cx = (round(place) for place in samples.center)
    clicked = f"Clicked: x {x}, y {y}. Nearest unit (cross): x {cx}, y {cy}."
    return clicked, f"{', '.join(counts)}."


def _about_bins(session: Session, controls: Controls) -> Sequence[str]:
    """Describe the bins of the selected detection."""
    index, done = session.detection(controls), session.forward(controls)
    if index is None or done is None:
        return ("No box here; a lower minimum score shows more boxes.",)
    caption = done.prediction.captions()[index]
    if done.bins is None:
        return (f"{caption}: this network pools without offsets.",)
    regular, moved = (bins[index] for bins in done.bins)
    width, height = (it.item() for it in done.prediction.boxes[index].reshape(2, 2).diff(dim=0)[0])
    shift = (moved - regular)[..., :2].norm(dim=-1)
    return (
        f"{caption}: {width:.0f} x {height:.0f} pixels, {regular.shape[0]} x {regular.shape[1]} "
        f"bins, shifted by {shift.mean():.1f} pixels on average, {shift.max():.1f} at most.",
    )


def _legend(session: Session, controls: Controls) -> str:
    """Return the legend of the picture, as HTML."""
    predictor = session.run(controls).predictor
    values = {
        "boxes": predictor.has_boxes,
        "pooling": predictor.pooling is not None,
        "bins": controls.bins,
        "levels": LEVELS[: session.depth(controls)],
        **{"box": BOX, "unit": UNIT, "moved_bin": MOVED_BIN},
    }
    return render(_TEMPLATES / "legend.html", values)


def _problem(action: Callable[[], None]) -> str | None:
    """Run an action on an image; return what is wrong with the image in one line, or None."""
    try:
        action()
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{Path(str(error.filename)).name}: {error.strerror}"
        return " ".join(text.split())
    return None
