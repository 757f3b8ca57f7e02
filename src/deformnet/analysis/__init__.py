"""What deformable networks have learned, and what they cost; for any model that has the layers."""

from deformnet.analysis.bins import MovedBins, moved_bins
from deformnet.analysis.cost import LayerCost, ModelCost, count_flops, model_cost
from deformnet.analysis.dilation import (
    AnnotatedImage,
    FilterMap,
    LayerDilation,
    Spread,
    dilation_statistics,
    effective_dilation,
    record_filters,
)
from deformnet.analysis.fields import (
    EffectiveField,
    ReceptiveField,
    effective_receptive_field,
    receptive_field,
)
from deformnet.analysis.health import LayerHealth, OffsetObserver
from deformnet.analysis.sampling import (
    SamplingLocations,
    SamplingStack,
    record_sampling,
    sampling_locations,
)

__all__ = [
    "AnnotatedImage",
    "EffectiveField",
    "FilterMap",
    "LayerCost",
    "LayerDilation",
    "LayerHealth",
    "ModelCost",
    "MovedBins",
    "OffsetObserver",
    "ReceptiveField",
    "SamplingLocations",
    "SamplingStack",
    "Spread",
    "count_flops",
    "dilation_statistics",
    "effective_dilation",
    "effective_receptive_field",
    "model_cost",
    "moved_bins",
    "receptive_field",
    "record_filters",
    "record_sampling",
    "sampling_locations",
]
