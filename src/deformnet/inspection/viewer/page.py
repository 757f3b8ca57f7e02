"""The page, made with Gradio: what is on it, and what happens when something is clicked."""

import html
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from deformnet.inference import ClassificationPredictor, DetectionPredictor
from deformnet.models.detection.detector import Detections
from deformnet.inspection.viewer.images import Images
from deformnet.inspection.viewer.networks import Network, Sampling
from deformnet.inspection.viewer.pictures import BOX, LEVELS, MOVED_BIN, PLAIN_BIN, UNIT, Colour
from deformnet.inspection.viewer.session import Controls, Session

_SESSIONS = 16  # browser tabs that are remembered; of one more, the oldest is forgotten
_CLEAN_EVERY, _CLEAN_AFTER = 30, 60  # seconds: how long pictures lie in the temporary folder
_SAMPLES, _BINS = "samples", "bins of a box"
_DEFORMABLE, _PLAIN = "deformable", "plain"

CSS = """
.gradio-container { max-width: 1500px !important; }
#picture img { cursor: crosshair; image-rendering: auto; }
#message { min-height: 0; }
#message .error { color: #b00020; font-weight: 600; }
#panel table, #panel tr { border: 0 !important; }
#panel table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  width: 100%; }
#panel th, #panel td { padding: .25rem .6rem; text-align: right; border: 0 solid #ddd;
  border-bottom-width: 1px; }
#panel th:first-child, #panel td:first-child { text-align: left; padding-left: 0; }
#panel p { margin: .4rem 0; }
#legend { margin-top: -.4rem; }
#legend span.item { display: inline-block; white-space: nowrap; margin-right: 1rem; }
#legend span.dot { display: inline-block; border-radius: 50%; border: 1px solid #000;
  vertical-align: middle; margin-right: .35rem; }
#legend span.line { display: inline-block; width: 1.6rem; margin-right: .35rem;
  vertical-align: middle; }
"""


def build_page(
    title: str, images: Images | None, network: Network, twin: Network | None
) -> gr.Blocks:
    """The page for a network, its plain twin and images to choose from."""
    return _Page(title, images, network, twin).blocks


def theme() -> themes.Base:
    """One whose fonts are those of the system: nothing is fetched from the internet."""
    return themes.Base(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        text_size="md",
    )


class _Page:
    """The components, and the handlers of their events."""

    def __init__(
        self, title: str, images: Images | None, network: Network, twin: Network | None
    ) -> None:
        self._images, self._network, self._twin = images, network, twin
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._classifies = isinstance(network.predictor, ClassificationPredictor)
        self._detects = isinstance(network.predictor, DetectionPredictor)
        with gr.Blocks(
            title=f"deformnet view {title}",
            analytics_enabled=False,
            delete_cache=(_CLEAN_EVERY, _CLEAN_AFTER),
            fill_width=True,
        ) as self.blocks:
            self._place(title)
            self._connect()

    def _place(self, title: str) -> None:
        """Puts everything on the page."""
        gr.Markdown(f"## Where does it look? &nbsp; <small>{html.escape(title)}</small>")
        with gr.Row(equal_height=True):
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
                [_DEFORMABLE, _PLAIN],
                value=_DEFORMABLE,
                label="Network",
                visible=self._twin is not None,
                elem_id="which",
                scale=2,
            )
            depths = max(it.depths for it in (self._network, self._twin) if it is not None)
            self.depth = gr.Slider(
                1,
                depths,
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
                visible=self._network.pool is not None,
                elem_id="shows",
                scale=3,
            )
            self.score = gr.Slider(
                0.05,
                0.95,
                value=0.5,
                step=0.05,
                label="Least score",
                visible=self._detects,
                elem_id="score",
                scale=2,
            )
        self.message = gr.HTML(elem_id="message")
        with gr.Row():
            with gr.Column(scale=3, min_width=480):
                self.picture = gr.Image(
                    label="Click a point",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="picture",
                )
                self.legend = gr.HTML(elem_id="legend")
                self.panel = gr.HTML(elem_id="panel")
            with gr.Column(scale=2, min_width=320):
                self.prediction = gr.Image(
                    label="Prediction",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    visible=not self._classifies,
                    elem_id="prediction",
                )
                self.truth = gr.Image(
                    label="Truth",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    visible=False,
                    elem_id="truth",
                )

    def _connect(self) -> None:
        """Says what happens when."""
        controls = [self.which, self.depth, self.shows, self.score]
        looked = [self.message, self.picture, self.legend, self.panel]
        everything = [*looked, self.prediction, self.truth]

        def on(
            event: Callable[..., Any], handler: Any, inputs: list[Any], outputs: list[Any]
        ) -> None:
            event(
                handler,
                inputs,
                outputs,
                show_progress="minimal",
                api_visibility="private",
                trigger_mode="always_last",  # while a slider moves, only where it is now
                # One after the other: each works on what the one before has left.
                concurrency_limit=1,
                concurrency_id="look",
            )

        on(self.blocks.load, self._choose, [self.choice, *controls], everything)
        on(self.choice.input, self._choose, [self.choice, *controls], everything)
        on(self.upload.upload, self._upload, [self.upload, *controls], [*everything, self.choice])
        for picture in (self.picture, self.prediction, self.truth):
            on(picture.select, self._click, controls, looked)
        for control in (self.which, self.score):
            on(control.input, self._redraw, controls, everything)
        on(self.depth.input, self._redraw_picture, controls, looked)
        on(self.shows.input, self._redraw_picture, controls, looked)
        self.blocks.unload(self._forget)

    def _session(self, request: gr.Request) -> Session:
        """That of the browser tab."""
        key = request.session_hash or ""
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = Session(self._images, self._network, self._twin)
            self._sessions.move_to_end(key)
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
            return self._sessions[key]

    def _forget(self, request: gr.Request) -> None:
        """The tab was closed."""
        with self._lock:
            self._sessions.pop(request.session_hash or "", None)

    def _choose(
        self,
        index: int | None,
        which: str,
        depth: float,
        shows: str,
        score: float,
        request: gr.Request,
    ) -> list[Any]:
        session, controls = self._session(request), _controls(which, depth, shows, score)
        if index is None:
            return self._all(session, controls)
        try:
            session.choose(index)
        except (ValueError, OSError) as error:
            return self._all(session, controls, problem=_line(error))
        return self._all(session, controls)

    def _upload(
        self,
        path: str | None,
        which: str,
        depth: float,
        shows: str,
        score: float,
        request: gr.Request,
    ) -> list[Any]:
        session, controls = self._session(request), _controls(which, depth, shows, score)
        if path is None:
            return [*self._all(session, controls), gr.skip()]
        file = Path(path)
        try:
            session.upload(file)
        except (ValueError, OSError) as error:
            return [*self._all(session, controls, problem=_line(error)), gr.skip()]
        finally:
            file.unlink(missing_ok=True)
        return [*self._all(session, controls), None]  # none of the given images is shown

    def _click(
        self,
        which: str,
        depth: float,
        shows: str,
        score: float,
        request: gr.Request,
        event: gr.SelectData,
    ) -> list[Any]:
        session = self._session(request)
        if session.shown is not None:
            x, y = event.index
            # By name: a component that was changed in a tab is another object there.
            margin = event.target is not None and event.target.elem_id == self.picture.elem_id
            take = session.click if margin else session.click_flat
            take((int(y), int(x)))
        return self._looked(session, _controls(which, depth, shows, score))

    def _redraw(
        self, which: str, depth: float, shows: str, score: float, request: gr.Request
    ) -> list[Any]:
        return self._all(self._session(request), _controls(which, depth, shows, score))

    def _redraw_picture(
        self, which: str, depth: float, shows: str, score: float, request: gr.Request
    ) -> list[Any]:
        return self._looked(self._session(request), _controls(which, depth, shows, score))

    def _all(self, session: Session, controls: Controls, problem: str | None = None) -> list[Any]:
        """All that is on the page."""
        truth = session.truth()
        return [
            *self._looked(session, controls, problem),
            session.prediction(controls),
            gr.update(value=truth, visible=truth is not None),
        ]

    def _looked(
        self, session: Session, controls: Controls, problem: str | None = None
    ) -> list[Any]:
        """What a click changes."""
        message = "" if problem is None else f'<p class="error">{html.escape(problem)}</p>'
        picture = gr.update(value=session.picture(controls), label=self._label(session))
        return [message, picture, _legend(session, controls), panel(session, controls)]

    def _label(self, session: Session) -> str:
        if session.shown is None:
            return "Choose an image"
        return f"{session.shown.name}: click a point"


def panel(session: Session, controls: Controls) -> str:
    """What is said of the clicked point, as HTML."""
    parts = []
    best = session.best_classes(controls)
    if best:
        known = session.true_class()
        truth = "" if known is None else f" (it is: <b>{html.escape(known)}</b>)"
        rows = [(html.escape(name), f"{100 * share:.1f} %") for name, share in best]
        parts.append(f"<p>Most probable classes{truth}</p>{_table(('class', ''), rows)}")
    sampling = session.sampling(controls)
    if session.shown is None:
        parts.append("<p>Choose an image.</p>")
    elif sampling is None or session.point is None:
        parts.append(f"<p>Click a point of the image{' or a box' if controls.bins else ''}.</p>")
    else:
        if controls.bins:
            parts.append(_about_bins(session, controls))
        else:
            parts.append(_about_samples(session, controls, sampling))
        parts.append(_about_filters(session, controls))
    return "".join(parts)


def _about_samples(session: Session, controls: Controls, sampling: Sampling) -> str:
    assert session.point is not None
    y, x = (round(place) for place in session.point)
    points, inside = sampling.levels[-1]
    said = [f"{len(points)} sampling locations, {len(sampling.levels)} layers down"]
    if off := int((~inside).sum()):
        said.append(f"{off} outside the map (faint)")
    if beyond := session.beyond(sampling):
        said.append(f"{beyond} beyond the picture")
    cy, cx = (round(place) for place in sampling.centre)
    where = f"Clicked: x {x}, y {y}. Nearest unit (cross): x {cx}, y {cy}."
    return f"<p>{where}<br>{', '.join(said)}.</p>"


def _about_bins(session: Session, controls: Controls) -> str:
    chosen, look = session.detection(controls), session.look(controls)
    if chosen is None or look is None or not isinstance(look.found, Detections):
        return "<p>No box there; a lower least score shows more boxes.</p>"
    what = html.escape(session.what(look.found, chosen))
    if look.bins is None:
        return f"<p>{what}: this network pools without offsets.</p>"
    plain, moved = (bins[chosen] for bins in look.bins)
    width, height = (look.found.boxes[chosen, 2:] - look.found.boxes[chosen, :2]).tolist()
    shift = (moved - plain)[..., :2]
    far = shift.norm(dim=-1)
    return (
        f"<p>{what}: {width:.0f} x {height:.0f} pixels, {plain.shape[0]} x {plain.shape[1]} bins, "
        f"moved by {far.mean():.1f} pixels in the mean, {far.max():.1f} at most.</p>"
    )


def _about_filters(session: Session, controls: Controls) -> str:
    rows = [
        (
            html.escape(row.layer.removeprefix("backbone.")),
            f"<b>{row.dilation:.2f}</b>",
            f"{row.image:.2f}",
            str(row.at_rest),
            f"{row.shift:.2f}",
        )
        for row in session.filters(controls)
    ]
    if not rows:
        return (
            "<p>This network has no deformable convolutions: its filters are everywhere alike.</p>"
        )
    head = ("layer", "here", "image", "plain", "shift")
    return (
        f"<p>Effective dilation of the filter at this point, its mean over the image, and that of "
        f"a plain filter; mean shift of its taps, in cells of the map.</p>{_table(head, rows)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _legend(session: Session, controls: Controls) -> str:
    """What the colours of the picture mean, as HTML."""
    network, parts = session.network(controls), []
    if isinstance(network.predictor, DetectionPredictor):
        parts.append(_line_sign(BOX, "detection"))
    if not controls.bins:
        parts.append(_line_sign(UNIT, "unit at the click"))
        for number, (colour, radius) in enumerate(LEVELS[: session.depth(controls)], start=1):
            side, layers = 2 * radius + 3, "layer" if number == 1 else "layers"
            parts.append(
                f'<span class="item"><span class="dot" style="width:{side}px;height:{side}px;'
                f'background:rgb{colour}"></span>{number} {layers} down</span>'
            )
    elif network.pool is not None:
        parts.append(_line_sign(PLAIN_BIN, "its bins", dotted=True))
        parts.append(_line_sign(MOVED_BIN, "moved by their offsets"))
    return f"<div>{' '.join(parts)}</div>"


def _line_sign(colour: Colour, text: str, *, dotted: bool = False) -> str:
    style = "dotted" if dotted else "solid"
    colour = (128, 128, 128) if dotted else colour  # white would not show on the page
    sign = f'<span class="line" style="border-top:4px {style} rgb{colour}"></span>'
    return f'<span class="item">{sign}{text}</span>'


def _controls(which: str, depth: float, shows: str, score: float) -> Controls:
    return Controls(which == _PLAIN, int(depth), shows == _BINS, score)


def _line(error: Exception) -> str:
    """The message of an error, in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{Path(str(error.filename)).name}: {error.strerror}"
    return " ".join(text.split())
