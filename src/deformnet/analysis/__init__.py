"""What deformable networks have learned, seen from outside: for any model that holds the layers."""

from deformnet.analysis.bins import MovedBins, moved_bins
from deformnet.analysis.sampling import SamplingLocations, sampling_locations

__all__ = ["MovedBins", "SamplingLocations", "moved_bins", "sampling_locations"]
