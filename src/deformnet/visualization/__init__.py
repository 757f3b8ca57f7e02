"""What `deformnet.analysis` finds, as pictures; results in, a matplotlib figure out.

`save` writes one as PNG or SVG. Nothing here runs a network, and nothing needs pyplot.
"""

from deformnet.visualization.bins import DetectionBins, bins_figure, draw_bins
from deformnet.visualization.canvas import save_figure
from deformnet.visualization.dilation import dilation_cell, dilation_figure, dilation_table
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

__all__ = [
    "DetectionBins",
    "ReceptiveFieldMap",
    "SampledUnit",
    "bins_figure",
    "contact_sheet_figure",
    "dilation_cell",
    "dilation_figure",
    "dilation_table",
    "draw_bins",
    "draw_sampled_unit",
    "draw_sampling_grid",
    "receptive_field_figure",
    "sampling_figure",
    "save_figure",
    "two_layer_figure",
]
