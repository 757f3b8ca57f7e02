"""Figures of the results of `deformnet.analysis`, and pictures of label maps and boxes.

A function `..._figure` returns a matplotlib figure, which `save_figure` writes as PNG or SVG;
`draw_...` draws into axes or an image. Nothing here runs a network or needs pyplot.
"""

from deformnet._errors import require_extra

require_extra(__name__, "train", "matplotlib", "PIL", "torchvision")

from deformnet.visualization.bins import DetectionBins, bins_figure, draw_bins
from deformnet.visualization.canvas import save_figure
from deformnet.visualization.colors import distinct_colors, palette
from deformnet.visualization.dilation import dilation_cell, dilation_figure, dilation_table
from deformnet.visualization.drawing import draw_boxes, label_image, overlay
from deformnet.visualization.receptive_fields import (
    ReceptiveFieldMap,
    receptive_field_figure,
    two_layer_figure,
)
from deformnet.visualization.sampling import (
    SampledUnit,
    contact_sheet_figure,
    draw_sampled_unit,
    draw_sampling_grid,
    sampling_figure,
)
from deformnet.visualization.scores import confusion_figure, precision_recall_figure

__all__ = [
    "DetectionBins",
    "ReceptiveFieldMap",
    "SampledUnit",
    "bins_figure",
    "confusion_figure",
    "contact_sheet_figure",
    "dilation_cell",
    "dilation_figure",
    "dilation_table",
    "distinct_colors",
    "draw_bins",
    "draw_boxes",
    "draw_sampled_unit",
    "draw_sampling_grid",
    "label_image",
    "overlay",
    "palette",
    "precision_recall_figure",
    "receptive_field_figure",
    "sampling_figure",
    "save_figure",
    "two_layer_figure",
]
