"""What `deformnet.analysis` finds, as pictures; results in, a matplotlib figure out.

`save` writes one as PNG or SVG. Nothing here runs a network, and nothing needs pyplot.
"""

from deformnet.visualization.canvas import save
from deformnet.visualization.dilation import dilation_cell, dilation_figure, dilation_table
from deformnet.visualization.fields import Heat, fields_figure, receptive_fields_figure
from deformnet.visualization.looks import Look, contact_sheet, draw_look, draw_looks, sampling_figure
from deformnet.visualization.parts import Parts, draw_parts, parts_figure

__all__ = [
    "Heat",
    "Look",
    "Parts",
    "contact_sheet",
    "dilation_cell",
    "dilation_figure",
    "dilation_table",
    "draw_look",
    "draw_looks",
    "draw_parts",
    "fields_figure",
    "parts_figure",
    "receptive_fields_figure",
    "sampling_figure",
    "save",
]
