"""Figures of the sampling and border rules, computed by the operators themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from deformnet.ops import deform_conv2d, deform_roi_pool

# The reference defines the sample positions of a bin.
from deformnet.ops.roi_pool.checks import Rule, Sampling
from deformnet.ops.roi_pool.reference import Axis, axes
from deformnet.visualization import save_figure
from deformnet.visualization.colors import BLUE, GREEN, ORANGE, SKY, VERMILLION

_BORDERS: tuple[tuple[Literal["zeros", "msra2017"], str], ...] = (
    ("zeros", BLUE),
    ("msra2017", VERMILLION),
)
_RULES: tuple[tuple[Sampling, str], ...] = (
    ("bins", BLUE),
    ("msra", VERMILLION),
    ("aligned", GREEN),
)
_BOX = (13.0, 22.0, 69.0, 62.0)
_SCALE = 1 / 8
_SAMPLES = 2
_BINS = 3
_SIDE = 12
_MOVED = (0, 2)  # row and column of the shifted bin
_SHIFT = (0.9, 0.6)  # (x, y), in pixels


def make(folder: Path) -> None:
    """Saves all figures of the operators page to a folder."""
    save_figure(_border_line(), folder / "border-line.png")
    save_figure(_border_plane(), folder / "border-plane.png")
    save_figure(_rules(), folder / "rules.png")
    save_figure(_outside(), folder / "outside.png")


def _read(values: Tensor, y: Tensor, x: Tensor, border: Literal["zeros", "msra2017"]) -> Tensor:
    """Values [P] that the operator reads from a map [H, W] at positions [P]."""
    count = len(y)
    maps = values.expand(count, 1, *values.shape)
    offset = torch.stack([y, x], dim=1)[..., None, None].expand(-1, -1, *values.shape)
    # The tap of the first output is at (0, 0), where the offset is the position.
    return deform_conv2d(maps, offset, torch.ones(1, 1, 1, 1), border=border)[:, 0, 0, 0]


def _border_line() -> Figure:
    """A map with one column, read along its length and beyond its ends."""
    values = torch.tensor([2.0, 3.0, 1.0, 2.5])
    figure = Figure(figsize=(8, 2.9), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.bar(
        range(len(values)),
        values.tolist(),
        width=1,
        color="#e4e4e4",
        edgecolor="white",
        label="pixels of the map",
    )
    y = torch.linspace(-2, len(values) + 1, 1201)
    for (border, color), style in zip(_BORDERS, ("-", "--"), strict=True):
        read = _read(values[:, None], y, torch.zeros_like(y), border)
        # Do not draw jumps as lines.
        jumps = np.abs(np.diff(read.numpy(), append=read[-1].item())) > 0.5
        axes.plot(
            y.numpy(),
            np.where(jumps, np.nan, read.numpy()),
            style,
            color=color,
            label=f'border="{border}"',
            linewidth=2,
        )
    axes.set(
        xlabel="position y (integers are pixel centers)",
        ylabel="value read",
        xticks=range(-2, 6),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _border_plane() -> Figure:
    """A map of 4x4 pixels, read inside and around its border under both rules."""
    values = torch.tensor([[2.0, 3, 1, 2], [1, 2, 3, 3], [3, 1, 2, 1], [2, 3, 1, 3]])
    steps = torch.linspace(-2, 5, 281)
    y, x = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    figure = Figure(figsize=(8, 3.1), dpi=130, layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(values.numpy(), vmin=0, vmax=3, cmap="viridis")
    axes[0].set_title("pixels of the map")
    picture = None
    for ax, (border, _) in zip(axes[1:], _BORDERS, strict=True):
        read = _read(values, y, x, border).reshape(len(steps), -1)
        picture = ax.imshow(read.numpy(), extent=(-2, 5, 5, -2), vmin=0, vmax=3, cmap="viridis")
        ax.set_title(f'border="{border}"')
    for ax in axes:
        ax.set(xlim=(-2, 5), ylim=(5, -2), xticks=[-1, 0, 3, 4], yticks=[-1, 0, 3, 4])
        _frame(ax, (-0.5, -0.5, 3.5, 3.5), "black" if ax is axes[0] else "white", ":")
    assert picture is not None
    figure.colorbar(picture, ax=axes, label="value read", shrink=0.8)
    return figure


def _rules() -> Figure:
    """The pixels that contribute to each bin of a box under each rule, also with a shifted bin."""
    figure = Figure(figsize=(8.4, 5.9), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)
    for column, (rule, _) in zip(axes.T, _RULES, strict=True):
        column[0].set_title(f'sampling="{rule}"')
        for ax, moved in zip(column, (False, True), strict=True):
            _draw_rule(ax, rule, moved=moved)
    axes[0, 0].set_ylabel("no offsets")
    axes[1, 0].set_ylabel(f"one bin shifted by {_SHIFT} pixels")
    return figure


def _draw_rule(axes: Axes, rule: Sampling, *, moved: bool) -> None:
    x_axis, y_axis = _axes(rule)
    width, height = float(x_axis.size), float(y_axis.size)
    offset = torch.zeros(1, 2, _BINS, _BINS)
    if moved:
        offset[0, :, *_MOVED] = torch.tensor([_SHIFT[0] / width, _SHIFT[1] / height])
    weights = _weights(rule, offset)
    # Alternate two colors; their intensity is the weight of the pixel.
    picture = np.ones((_SIDE, _SIDE, 3))
    for row in range(_BINS):
        for column in range(_BINS):
            here = moved and (row, column) == _MOVED
            if moved and not here:
                continue
            color = np.array(to_rgb(VERMILLION if here else (SKY, GREEN)[(row + column) % 2]))
            fraction = (weights[row, column] / weights.max())[..., None]
            picture = picture * (1 - fraction * (1 - color))
    axes.imshow(picture, vmin=0, vmax=1)
    for edge in np.arange(-0.5, _SIDE):
        axes.axhline(edge, color="#d0d0d0", linewidth=0.5)
        axes.axvline(edge, color="#d0d0d0", linewidth=0.5)
    for row in range(_BINS):
        for column in range(_BINS):
            here = moved and (row, column) == _MOVED
            dx, dy = _SHIFT if here else (0.0, 0.0)
            if not moved or here:
                y, x = _positions(y_axis, row) + dy, _positions(x_axis, column) + dx
                grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
                axes.plot(grid[:, 0], grid[:, 1], ".", color="black", markersize=3)
    # "bins" counts whole pixels, whose edges are half a pixel from their centers.
    lead = 0.5 if rule == "bins" else float(x_axis.step[0, 0]) / 2 if rule == "aligned" else 0.0
    lead_y = 0.5 if rule == "bins" else float(y_axis.step[0, 0]) / 2 if rule == "aligned" else 0.0
    left, top = float(x_axis.start[0, 0]) - lead, float(y_axis.start[0, 0]) - lead_y
    _frame(axes, (left, top, left + width, top + height), "black", "-")
    _frame(axes, [side * _SCALE - 0.5 for side in _BOX], ORANGE, "--")
    axes.set(xticks=range(0, _SIDE, 2), yticks=range(0, _SIDE, 2))
    axes.tick_params(labelsize=8)


def _outside() -> Figure:
    """A bin on a map of ones, shifted across its right edge."""
    figure = Figure(figsize=(8, 2.9), dpi=130, layout="constrained")
    axes = figure.subplots()
    shifts = torch.linspace(0, 6, 601)
    for (rule, color), style in zip(_RULES, ("-", "--", ":"), strict=True):
        width = float(_axes(rule)[0].size)
        count = len(shifts)
        boxes = torch.tensor([[0, *_BOX]]).expand(count, -1)
        offset = torch.zeros(count, 2, _BINS, _BINS)
        offset[:, 0, 1, 2] = shifts / width
        ones = torch.ones(1, 1, _SIDE, _SIDE)
        read = deform_roi_pool(
            ones, boxes, offset, _BINS, _SCALE, 1.0, sampling=rule, samples_per_bin=_SAMPLES
        )
        axes.plot(
            shifts.numpy(),
            read[:, 0, 1, 2].numpy(),
            style,
            color=color,
            linewidth=2,
            label=f'sampling="{rule}"',
        )
    axes.set(xlabel="shift of the middle right bin, in pixels", ylabel="mean of a map of ones")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _axes(rule: Sampling) -> tuple[Axis, Axis]:
    """The horizontal and vertical axis of the box, from the reference."""
    pooling = Rule((_BINS, _BINS), _SCALE, 1.0, rule, _SAMPLES, position_sensitive=False)
    rows, columns = axes(torch.tensor([[0, *_BOX]]), torch.tensor([True]), pooling)
    return columns, rows


def _positions(axis: Axis, bin: int) -> np.ndarray:
    """Sample positions of a bin on one axis."""
    number = int(axis.number[0, bin])
    return float(axis.start[0, bin]) + float(axis.step[0, bin]) * np.arange(number)


def _weights(rule: Sampling, offset: Tensor) -> np.ndarray:
    """Weight of each pixel in each bin, [k, k, H, W]: the gradient with respect to the map."""
    maps = torch.zeros(1, 1, _SIDE, _SIDE, requires_grad=True)
    boxes = torch.tensor([[0, *_BOX]])
    pooled = deform_roi_pool(
        maps, boxes, offset, _BINS, _SCALE, 1.0, sampling=rule, samples_per_bin=_SAMPLES
    )
    found = [torch.autograd.grad(one, maps, retain_graph=True)[0][0, 0] for one in pooled.flatten()]
    return torch.stack(found).reshape(_BINS, _BINS, _SIDE, _SIDE).numpy()


def _frame(axes: Axes, box: Sequence[float], color: str, line: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=line, linewidth=1.6
        )
    )
