"""What deformable networks have learned, and what they cost; for any model that has the layers."""

from deformnet.analysis.bins import MovedBins, moved_bins
from deformnet.analysis.cost import count_flops
from deformnet.analysis.sampling import SamplingLocations, sampling_locations

__all__ = ["MovedBins", "SamplingLocations", "count_flops", "moved_bins", "sampling_locations"]
