"""Analysis of any model with deformable layers: sampling, dilation, receptive fields, cost."""

from deformnet.analysis.bins import BinLocations, bin_locations
from deformnet.analysis.cost import LayerCost, ModelCost, count_flops, model_cost
from deformnet.analysis.dilation import (
    AnnotatedImage,
    DilationMap,
    LayerDilation,
    MeanStd,
    dilation_maps,
    dilation_statistics,
    effective_dilation,
)
from deformnet.analysis.fields import (
    EffectiveField,
    ReceptiveField,
    effective_receptive_field,
    receptive_field,
)
from deformnet.analysis.health import LayerHealth, OffsetObserver, has_deformable_layers
from deformnet.analysis.sampling import (
    SamplingLocations,
    SamplingStack,
    record_sampling,
    sampling_locations,
)

__all__ = [
    "AnnotatedImage",
    "BinLocations",
    "DilationMap",
    "EffectiveField",
    "LayerCost",
    "LayerDilation",
    "LayerHealth",
    "MeanStd",
    "ModelCost",
    "OffsetObserver",
    "ReceptiveField",
    "SamplingLocations",
    "SamplingStack",
    "bin_locations",
    "count_flops",
    "dilation_maps",
    "dilation_statistics",
    "effective_dilation",
    "effective_receptive_field",
    "has_deformable_layers",
    "model_cost",
    "receptive_field",
    "record_sampling",
    "sampling_locations",
]
